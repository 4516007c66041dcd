import json

import pytest
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.ranks import Plan

CONFIG = """
[model]
name = "vit_tiny_patch16_224"
img_size = 16
in_chans = 1
kwargs = { embed_dim = 64, depth = 2, num_heads = 2, patch_size = 4 }
[data]
source = "digits"
[subspace]
rank = 16
exclude = ["*attn.proj"]
calibration_images = 32
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_table_has_every_layer_and_the_totals(config):
    result = plan(config)
    assert result.exit_code == 0, result.output
    rows = {cells[0]: cells for line in result.stdout.splitlines() if (cells := line.split())}
    assert {name for name in rows if name.startswith("blocks.")} == {
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")
    }
    _, shape, rank, break_even, energy, dense, now, *why = rows["blocks.0.mlp.fc1"]
    assert (shape, rank, break_even, dense, now) == ("256×64", "16", "51", "16,384", "5,120")
    assert 0 < float(energy) <= 1
    assert why == ["rank", "as", "given"]
    # Twice qkv (192×64), fc1 and fc2; at rank 16 the pairs have 16·(256 + 320 + 320) parameters.
    assert rows["targeted"][:4] == ["targeted", "layers", "90,112", "28,672"]


def test_nothing_is_written_unless_asked(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan(config).exit_code == 0
    assert list(tmp_path.iterdir()) == [config]


def test_the_plan_goes_to_a_file_and_to_json(config, tmp_path):
    result = plan(config, "-o", tmp_path / "plan.json", "--json")
    assert Plan.model_validate_json(result.stdout) == Plan.load(tmp_path / "plan.json")
    assert len(json.loads(result.stdout)["layers"]) == 6


def test_a_file_is_not_overwritten_without_force(config, tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    result = plan(config, "-o", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert "plan.json exists" in result.stderr
    assert (tmp_path / "plan.json").read_text() == "mine"
    assert plan(config, "-o", tmp_path / "plan.json", "--force").exit_code == 0


def test_patterns_that_match_nothing_are_one_line(config):
    result = plan(config, "-s", 'subspace.include=["*nothing"]')
    assert result.exit_code == 2
    assert "no Linear layer matches *nothing; the model has blocks.0.attn.qkv" in result.stderr


def test_a_rank_above_the_full_one_is_one_line(config):
    result = plan(config, "-s", "subspace.rank=65")
    assert result.exit_code == 2
    assert "rank 65 is above 64" in result.stderr
