import json

import pytest
from helpers import require_schema
from report_inputs import CHECKS, make_board_report, make_report, make_run, write_report_json
from typer.testing import CliRunner

from wasi_export.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def refused(result, code, words):
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_finished_run_becomes_a_page_beside_its_report(tmp_path):
    folder = make_run(tmp_path / "run")
    result = run(folder)
    page = folder / "report" / "report.html"
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"report: {page}\n", "")
    text = page.read_text()
    for heading in ("Latency", "Accuracy over latency", "Size and memory", "Training", "Layers", "Checks"):
        assert f"<h2>{heading}</h2>" in text
    assert "<h2>Memory over a training step, batch 32</h2>" in text
    assert "<h2>Answers <small>100 images</small></h2>" in text
    assert "dense: 2 epochs in 10" in text
    assert "Peak of a training step, batch 32, MB" in text
    assert "1 of 2 layers are factored" in text
    assert "time of each layer:" not in text
    assert list((folder / "report").glob(".*")) == []


def test_the_folder_of_the_report_of_a_run_gives_the_same_page(tmp_path):
    folder = make_run(tmp_path / "run")
    run(folder, "-o", tmp_path / "a.html")
    run(folder / "report", "-o", tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_folder_of_the_report_can_be_the_current_one(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    run(folder, "-o", tmp_path / "a.html")
    monkeypatch.chdir(folder / "report")
    result = run(".", "-o", tmp_path / "b.html")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_run_that_shares_its_dense_run_shows_its_own_training(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "dense" / "metrics.jsonl").unlink()
    assert run(folder).exit_code == 0
    text = (folder / "report" / "report.html").read_text()
    assert "low-rank: 2 epochs" in text
    assert "dense: 2 epochs" not in text


def test_what_an_older_run_has_not_measured_is_told(tmp_path):
    folder = make_run(tmp_path / "run")
    report = json.loads((folder / "report" / "report.json").read_text())
    left = {
        name: value for name, value in report.items() if name not in ("layers", "predictions", "comparison")
    }
    (folder / "report" / "report.json").write_text(json.dumps(left))
    (folder / "report" / "memory.json").write_text('{"dense_mb": 54.0, "low_rank_mb": 35.0}')
    assert run(folder).exit_code == 0
    text = (folder / "report" / "report.html").read_text()
    for what in (
        "time of each layer",
        "memory over a training step",
        "answers beside those of the dense model",
    ):
        assert f"<li>{what}: <code>wasi-export " in text
    assert "<h2>Answers" not in text
    assert "<h2>Memory over" not in text


def test_the_page_does_not_go_over_another_file(tmp_path):
    folder = write_report_json(tmp_path / "report", make_report(CHECKS[0]))
    before = (folder / "report.json").read_bytes()
    refused(run(folder, "-o", folder / "report.json", "--force"), 2, "give a name that ends with .html")
    assert (folder / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("target", "other"), [((), "validation"), (("--target", "ssh://pi@board"), "report/ssh---pi-board")]
)
def test_a_report_does_not_go_over_that_of_a_run(tmp_path, target, other):
    run_folder = make_run(tmp_path / "run")
    folder = run_folder / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    validate = ["validate", str(run_folder / "bundle"), "--report"]
    result = CliRunner().invoke(app, [*validate, str(folder), *target])
    refused(
        result,
        2,
        f"{folder} has the report of a run, which would be lost: give another, as {run_folder / other}",
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_current_folder_has_a_name_when_another_is_to_be_given(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run") / "report"
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["validate", "../bundle", "--report", "."])
    refused(result, 2, f"would be lost: give another, as {folder.with_name('validation')}")


def test_reports_of_several_targets_are_on_one_page(tmp_path):
    folder = write_report_json(tmp_path / "report", make_report(CHECKS[0]))
    write_report_json(folder / "arm64", make_board_report())
    result = run(folder, "--json")
    assert result.exit_code == 0
    require_schema("page", result.stdout)
    assert json.loads(result.stdout) == {
        "schema_version": 1,
        "report": str(folder / "report.html"),
        "model": "m",
        "verdicts": [
            {"target": "this machine", "verdict": "passed"},
            {"target": "arm64:pi5", "verdict": "passed"},
        ],
    }


def test_two_reports_of_this_machine_are_two_verdicts(tmp_path):
    folder = write_report_json(tmp_path / "report", make_report(CHECKS[0]))
    write_report_json(folder / "again", make_report(CHECKS[0].model_copy(update={"status": "failed"})))
    result = run(folder, "--json")
    require_schema("page", result.stdout)
    verdicts = json.loads(result.stdout)["verdicts"]
    assert [found["verdict"] for found in verdicts] == ["passed", "failed: parity error"]
    assert {found["target"] for found in verdicts} == {"this machine"}


def test_a_page_is_not_overwritten_without_force(tmp_path):
    folder = write_report_json(tmp_path, make_report(CHECKS[0]))
    page = tmp_path / "report.html"
    page.write_text("mine")
    refused(run(folder), 2, f"{page} exists: choose another name or give --force")
    assert page.read_text() == "mine"
    assert run(folder, "--force").exit_code == 0
    assert page.read_text().startswith("<!doctype html>")


def test_a_report_that_failed_is_rendered_as_well(tmp_path):
    failed = CHECKS[0].model_copy(update={"status": "failed"})
    assert run(write_report_json(tmp_path, make_report(failed))).exit_code == 0
    assert "Failed: parity error" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("where", ["", "missing"])
def test_a_folder_without_a_report_is_refused(tmp_path, where):
    refused(run(tmp_path / where), 2, "has no report.json: give the folder of a finished `wasi-export run`")


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"checks": 1}')
    refused(run(tmp_path), 2, "report.json is no report.json of `wasi-export validate`")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("report/summary.json", 6, "summary.json is not what a run wrote"),
        ("bundle/manifest.json", 6, "manifest.json is not what a run wrote"),
        ("bundle/config.toml", 2, "config.toml"),
        ("subspace/metrics.jsonl", 2, "metrics.jsonl is not what training wrote"),
        ("report/report.json", 2, "report.json is no report.json"),
        ("report/memory.json", 6, "memory.json is not what a run wrote"),
        ("report/arm64/report.json", 2, "arm64/report.json is no report.json"),
    ],
)
@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": 1}', '"' + "\udcff"], ids=lambda text: text[:8])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, code, words, text):
    folder = make_run(tmp_path / "run")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, errors="surrogateescape")
    refused(run(folder), code, words)


def test_a_damaged_run_is_made_anew_by_run_whose_force_it_is(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "report" / "summary.json").write_text("{")
    refused(run(folder), 6, "make it anew with `wasi-export run CONFIG --force`\n")


@pytest.mark.parametrize("name", ["report/report.json", "report/memory.json", "subspace/metrics.jsonl"])
def test_a_file_that_is_far_too_large_is_not_read_to_its_end(tmp_path, name):
    folder = make_run(tmp_path / "run")
    with (folder / name).open("r+b") as file:
        file.truncate(200 << 30)  # a hole: it takes no room
    assert run(folder).exit_code in (2, 6)


def test_a_curve_whose_parts_do_not_fit_is_refused(tmp_path):
    folder = make_run(tmp_path / "run")
    memory = json.loads((folder / "report" / "memory.json").read_text())
    del memory["dense_curve"]["held_bytes"]["inputs"]
    (folder / "report" / "memory.json").write_text(json.dumps(memory))
    refused(run(folder), 6, "held_bytes has not one number for each kind and moment")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    folder = write_report_json(tmp_path, make_report(CHECKS[0]))
    refused(run(folder, "-o", folder / "report.json" / "page.html"), 2, "cannot write")


def test_the_base_install_is_told_which_extra_it_needs(base_python, tmp_path):
    write_report_json(tmp_path, make_report(CHECKS[0]))
    done = base_python("-m", "wasi_export", "report", str(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: jinja2 is not installed: pip install 'wasi-export[report]'\n"
