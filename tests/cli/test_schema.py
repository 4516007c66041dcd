"""The published JSON Schemas are those of the code; other tests hold real documents against them."""

import json

import jsonschema
import pytest
import typer
from helpers import SCHEMAS, TRAINING, make_bundle, require_schema
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from wasi_export.artifact import Bundle
from wasi_export.cli import app
from wasi_export.cli._schemas import DOCUMENTS, document_model, schema_of
from wasi_export.cli._target import Outcome, end
from wasi_export.config import Thresholds
from wasi_export.errors import ConfigError, HostError
from wasi_export.report import Report
from wasi_export.runtimes.validate import validate

THRESHOLDS = jsonschema.Draft202012Validator(schema_of("thresholds"))


def run(*arguments):
    return CliRunner().invoke(app, ["schema", *map(str, arguments)])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_published_schema_is_that_of_the_code(name):
    published = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    current = json.loads(json.dumps(schema_of(name)))  # of JSON: without tuples
    assert published == current, "make it anew: wasi-export schema --out docs/schemas --force"
    jsonschema.Draft202012Validator.check_schema(published)


def test_no_schema_is_of_a_document_that_is_gone():
    assert {path.stem for path in SCHEMAS.iterdir()} == set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_has_no_key_that_its_schema_does_not_know(name):
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        require_schema(name, '{"no key of ours": 1}')


@pytest.mark.parametrize("name", [n for n, d in DOCUMENTS.items() if "--json" in d.origin])
def test_what_a_command_prints_has_a_version_or_is_a_part_of_what_has(name):
    assert "schema_version" in document_model(name).model_fields or name in {"train-graph"}


def test_every_command_that_prints_json_has_a_document():
    origins = " ".join(document.origin for document in DOCUMENTS.values())
    commands = set(typer.main.get_command(app).commands)
    assert {command for command in commands if f"{command} " not in origins} == set()


def test_the_schemas_are_listed_printed_and_written(tmp_path):
    require_schema("schemas", run("--json").stdout)
    assert json.loads(run("report").stdout) == schema_of("report")
    assert run("report", "--out", tmp_path).stdout == f"{tmp_path / 'report.json'}\n"
    assert (tmp_path / "report.json").read_bytes() == (SCHEMAS / "report.json").read_bytes()
    assert "report.json; validate --json" in run().stdout


def test_where_schemas_were_written_is_json_as_well(tmp_path):
    one = run("report", "--out", tmp_path / "one", "--json")
    require_schema("written-files", one.stdout)
    assert json.loads(one.stdout)["written"] == [str(tmp_path / "one" / "report.json")]
    written = json.loads(run("--out", tmp_path / "all", "--json").stdout)["written"]
    assert {*written} == {str(path) for path in (tmp_path / "all").iterdir()}
    assert len(written) == len(DOCUMENTS)


def test_a_schema_that_exists_is_not_overwritten_without_force(tmp_path):
    mine = tmp_path / "report.json"
    mine.write_text("mine")
    for arguments in (["report", "--out", tmp_path], ["--out", tmp_path]):
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert refused.stderr == f"error: {mine} exists: choose another name or give --force\n"
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
        assert mine.read_text() == "mine"
    assert run("report", "--out", tmp_path, "--force").exit_code == 0
    assert json.loads(mine.read_text()) == json.loads(run("report").stdout)


def test_a_document_that_does_not_exist_names_the_nearest():
    assert run("raport").exit_code == 2
    assert run("raport").stderr == "error: no document 'raport', did you mean 'report'?\n"


def test_a_training_graph_is_valid():
    require_schema("train-graph", TRAINING.model_dump_json())


def test_results_and_errors_of_several_targets_are_valid(tmp_path, capsys):
    report = validate(Bundle.open(make_bundle(tmp_path / "bundle")), Thresholds())
    with pytest.raises(typer.Exit):
        end([Outcome("a", report, None), Outcome("b", None, HostError("lost"))], [0], as_json=True)
    printed = capsys.readouterr().out
    require_schema("targets", printed)
    first, second = json.loads(printed)["targets"]
    assert Report.model_validate(first["result"]) == report
    assert second["error"] == {"type": "HostError", "message": "lost", "exit_code": 3}


def taken(values: dict[str, float]) -> bool:
    """Returns whether these are thresholds."""
    try:
        Thresholds.from_toml(None, values)
    except ConfigError:
        return False
    return True


@given(
    st.dictionaries(st.sampled_from([*Thresholds.model_fields, "max_latency"]), st.floats(-2, 2, width=16))
)
def test_what_the_schema_of_thresholds_takes_the_code_takes_and_the_reverse(values):
    values = {"min_accuracy": 0.5} | values  # accuracy_confidence needs one, which no schema says
    assert taken(values) == THRESHOLDS.is_valid(values)
