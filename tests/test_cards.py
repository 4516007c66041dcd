"""What others read of a bundle: the model card, and the bill of materials."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from helpers import make_bundle, make_model, require_schema
from typer.testing import CliRunner, Result

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.cli import app
from wasi_export.config import Thresholds
from wasi_export.durable import file_sha256
from wasi_export.model_card import to_model_card
from wasi_export.runtimes.validate import validate, write_report
from wasi_export.sbom import to_cyclonedx


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_bill_of_materials_is_cyclonedx_and_lists_every_file_and_tool(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    text = to_cyclonedx(opened)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    assert found["metadata"]["component"]["type"] == "machine-learning-model"
    assert found["metadata"]["timestamp"].startswith("2026-01-01T00:00:00")
    hashes = {c["name"]: c["hashes"][0]["content"] for c in found["components"] if c["type"] == "file"}
    assert hashes == {name: file_sha256(bundle / name) for name in opened.manifest.files}
    libraries = {c["name"]: c["purl"] for c in found["components"] if c["type"] == "library"}
    assert libraries == {"torch": "pkg:pypi/torch@2.9.0"}


def test_what_is_no_cyclonedx_is_found(bundle: Path) -> None:
    text = to_cyclonedx(Bundle.open(bundle)).replace('"file"', '"thing"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is not None


def test_the_same_bundle_gives_the_same_bytes_and_another_one_others(bundle: Path, tmp_path: Path) -> None:
    copy = Bundle.open(Path(shutil.copytree(bundle, tmp_path / "copy")))
    before = to_cyclonedx(copy)
    assert before == to_cyclonedx(Bundle.open(bundle))
    write_bundle_manifest(copy.path, copy.manifest.model_copy(update={"seed": 1}))
    assert to_cyclonedx(Bundle.open(copy.path)) != before


def test_the_card_says_what_the_model_takes_and_how_it_was_made(bundle: Path) -> None:
    card = to_model_card(Bundle.open(bundle))
    assert card.startswith("---\nlibrary_name: onnxruntime\n")
    assert "1 of 2 Linear layers are pairs of low-rank factors; the model has 102 parameters." in card
    assert "| input | `images` float32 [B, 3, 4, 4] |" in card
    assert "| classes | dark, light |" in card
    assert "at most 1.0e-07 of their scale" in card
    assert "Verdict" not in card
    assert "\n\n\n" not in card


@pytest.mark.parametrize(
    ("name", "base"),
    [("vit_tiny_patch16_224.augreg", "timm/vit_tiny_patch16_224.augreg"), ("hf-hub:me/mine", "me/mine")],
)
def test_the_card_names_the_model_as_the_hub_does(bundle: Path, name: str, base: str) -> None:
    opened = Bundle.open(bundle)
    facts = opened.manifest.model.model_copy(update={"name": name})
    manifest = opened.manifest.model_copy(update={"model": facts})
    assert f'\nbase_model: "{base}"\n' in to_model_card(dataclasses.replace(opened, manifest=manifest))


def test_with_a_report_the_card_says_what_was_checked(bundle: Path, tmp_path: Path) -> None:
    write_report(validate(Bundle.open(bundle), Thresholds(max_size_mb=1e-6)), tmp_path)
    done = run("card", bundle, "--report", tmp_path / "report.json")
    assert done.exit_code == 0
    assert ": failed: size." in done.stdout
    assert "| integrity | passed |" in done.stdout


def test_a_report_of_another_model_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", model=make_model(opset=22))
    write_report(validate(Bundle.open(other), Thresholds()), tmp_path)
    done = run("card", bundle, "--report", tmp_path / "report.json")
    assert (done.exit_code, "is of another model than" in done.stderr) == (2, True)


@pytest.mark.parametrize("hostile", ["a | b", "`x` **y**", "<script>alert(1)</script>"])
def test_a_name_does_not_break_the_card_apart(tmp_path: Path, hostile: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", classes=(hostile, "light"))
    row = next(
        line for line in to_model_card(Bundle.open(bundle)).splitlines() if line.startswith("| classes")
    )
    assert row.replace("\\|", "").count("|") == 3
    assert "<script>" not in row


HOSTILE = "2026 |\n\n<script>alert(1)</script>\n\n# owned"


def test_no_text_of_a_manifest_or_a_report_begins_a_tag_or_a_line_of_the_card(
    bundle: Path, tmp_path: Path
) -> None:
    """Whatever the pattern of a field lets pass: the template trusts none of them."""
    opened = Bundle.open(bundle)
    report = validate(opened, Thresholds())
    facts = dict.fromkeys(("name", "output", "min_onnxruntime", "created", "data_fingerprint"), HOSTILE)
    manifest = opened.manifest.model_copy(
        update={
            **facts,
            "model": opened.manifest.model.model_copy(update={"name": HOSTILE}),
            "input": opened.manifest.input.model_copy(update={"name": HOSTILE}),
            "classes": (HOSTILE, HOSTILE),
            "tools": {HOSTILE: HOSTILE},
            "metrics": {HOSTILE: 1.0},
        }
    )
    hostile = report.model_copy(
        update={
            "host": report.host.model_copy(update={"processor": HOSTILE}),
            "checks": tuple(
                check.model_copy(update={"name": HOSTILE, "unit": HOSTILE, "detail": HOSTILE})
                for check in report.checks
            ),
        }
    )
    plain = to_model_card(opened, report)
    card = to_model_card(dataclasses.replace(opened, manifest=manifest), hostile)
    assert "<script" not in card
    assert not [line for line in card.splitlines() if line.startswith("# owned")]
    assert len(card.splitlines()) == len(plain.splitlines())


def test_a_card_is_no_json_so_it_needs_a_file_with_it(bundle: Path) -> None:
    done = run("card", bundle, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert "give --out too" in done.stderr


@pytest.mark.parametrize("command", ["card", "sbom"])
def test_a_document_is_printed_or_written_and_replaced_only_by_force(
    bundle: Path, tmp_path: Path, command: str
) -> None:
    printed = run(command, bundle).stdout
    assert run(command, bundle, "-o", tmp_path / "x").stdout == f"written: {tmp_path / 'x'}\n"
    assert (tmp_path / "x").read_text() == printed
    assert run(command, bundle, "-o", tmp_path / "x").exit_code == 2
    done = run(command, bundle, "-o", tmp_path / "x", "--force", "--json")
    require_schema("written", done.stdout)
    assert json.loads(done.stdout)["written"] == str(tmp_path / "x")
