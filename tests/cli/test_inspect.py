import pytest
from helpers import make_bundle, require_schema
from typer.testing import CliRunner

from wasi_export.artifact import Bundle
from wasi_export.cli import app
from wasi_export.manifest import Manifest


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def test_inspect_shows_layers_files_and_preprocessing(bundle):
    result = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["head", "48", "2", "2", "0.950", "96", "100"] in rows
    assert ["blocks.0.mlp.fc1", "6", "3", "–", "–", "18", "18"] in rows
    assert ["total", "114", "118"] in rows
    for fact in (
        "1 of 2 layers factored",
        "images [B, 3, 4, 4]",
        "bicubic, crop 1",
        "dark, light",
        "23, IR version 10",
        "val_top1",
        "golden/golden.safetensors",
    ):
        assert fact in result.stdout


def test_inspect_as_json_is_the_manifest(bundle):
    result = CliRunner().invoke(app, ["inspect", str(bundle), "--json"])
    require_schema("manifest", result.stdout)
    assert Manifest.model_validate_json(result.stdout) == Bundle.open(bundle).manifest
