import json
from pathlib import Path

import pytest
from helpers import require_schema
from typer.testing import CliRunner, Result

from wasi_export.cli import app
from wasi_export.ranks import Plan
from wasi_export.training.planning import PlannedModel

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
exclude = ["*proj"]
calibration_images = 32
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def planned(*arguments: object) -> PlannedModel:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    require_schema("planned-model", result.stdout)
    return PlannedModel.model_validate_json(result.stdout)


def cells_of(output: str) -> dict[str, list[str]]:
    """Returns the cells of every line by the first of them; cells are two spaces apart."""
    lines = ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in output.splitlines())
    return {cells[0]: cells[1:] for cells in lines if cells}


def test_the_table_has_every_layer_and_the_totals(config: Path) -> None:
    result = plan(config)
    assert result.exit_code == 0, result.output
    rows = cells_of(result.stdout)
    assert {name for name in rows if name.startswith("blocks.")} == {
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")
    }
    shape, rank, break_even, energy, error, ranks, parameters, macs, why = rows["blocks.0.mlp.fc1"]
    assert (shape, rank, break_even, why) == ("256×64", "16", "51", "rank as given")
    assert (parameters, macs) == ("5,120", f"{17 * 5120:,}")
    assert 0 < float(energy) <= 1
    assert 0 <= float(error.removesuffix("%")) <= 100
    assert 0 < int(ranks) < 64
    # Twice qkv (192×64), fc1 and fc2; at rank 16 the pairs have 16·(256 + 320 + 320) parameters.
    assert rows["parameters of these layers"] == ["90,112", "28,672", "31.8%"]
    dense, now, share = rows["training memory, batch 32, predicted MB"]
    assert int(now) < int(dense)
    assert float(share.removesuffix("%")) < 100
    assert "latency, predicted ms" not in rows


def test_the_shares_of_the_error_sum_to_all_of_it(config: Path) -> None:
    rows = cells_of(plan(config).stdout)
    shares = [float(cells[4].removesuffix("%")) for name, cells in rows.items() if name.startswith("blocks.")]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


@pytest.mark.parametrize("number", ["nan", "inf", "1.5"])
def test_a_budget_of_parameters_is_a_whole_number(config: Path, number: str) -> None:
    result = plan(config, "--max-params", number)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {config}: subspace.max_params")


def test_nothing_is_written_unless_asked(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan(config).exit_code == 0
    assert list(tmp_path.iterdir()) == [config]


def test_the_plan_goes_to_a_file_and_with_the_totals_to_json(config: Path, tmp_path: Path) -> None:
    made = planned(config, "-o", tmp_path / "plan.json")
    assert made.plan == Plan.load(tmp_path / "plan.json")
    require_schema("plan", (tmp_path / "plan.json").read_bytes())
    assert len(made.plan.layers) == 6
    assert made.dense.parameters - made.planned.parameters == 90_112 - 28_672


def test_a_file_is_not_overwritten_without_force(config: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    result = plan(config, "-o", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert "plan.json exists" in result.stderr
    assert (tmp_path / "plan.json").read_text() == "mine"
    assert plan(config, "-o", tmp_path / "plan.json", "--force").exit_code == 0


def test_patterns_that_match_nothing_are_one_line(config: Path) -> None:
    result = plan(config, "-s", 'subspace.include=["*nothing"]')
    assert result.exit_code == 2
    assert "no layer that can be factored matches *nothing; the model has patch_embed.proj" in result.stderr


def test_a_rank_above_the_full_one_is_one_line(config: Path) -> None:
    result = plan(config, "-s", "subspace.rank=65")
    assert result.exit_code == 2
    assert "rank 65 is above 64" in result.stderr


def test_every_budget_is_kept_and_replaces_the_measure_of_the_file(config: Path) -> None:
    dense = planned(config).dense
    assert planned(config, "--max-params", 9e4).planned.parameters <= 90_000
    assert planned(config, "--max-macs", 1.25e6).planned.macs <= 1_250_000
    memory_mb = 0.99 * dense.train_memory_mb
    factored_at_once = ("-s", "subspace.dense_epochs=0", "--max-train-memory-mb", memory_mb)
    assert planned(config, *factored_at_once).planned.train_memory_mb <= memory_mb
    both = planned(config, "--max-params", 9.5e4, "--max-macs", 1.3e6).planned
    assert both.parameters <= 95_000
    assert both.macs <= 1_300_000


def test_a_fraction_given_as_option_replaces_the_rank_of_the_file(config: Path) -> None:
    made = planned(config, "--fraction", 0.7)
    assert {layer.rank for layer in made.plan.layers} == {32}
    assert {layer.reason for layer in made.plan.layers} == {"fraction 0.7"}


def test_a_budget_that_cannot_be_met_names_the_smallest_on_one_line(config: Path) -> None:
    result = plan(config, "--max-params", 1000)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "parameters are needed, got 1,000" in result.stderr
    assert json.loads(plan(config, "--max-params", 1000, "--json").stdout)["error"]["type"] == "RankError"


@pytest.mark.slow
def test_a_budget_of_latency_is_predicted_from_this_machine_and_kept(config: Path) -> None:
    larger = ("-s", "model.kwargs={ depth = 2, patch_size = 8 }", "-s", "model.img_size=64")
    dense_ms = planned(config, *larger, "--max-latency-ms", 1000).dense.latency_ms
    assert dense_ms is not None
    budget_ms = 0.7 * dense_ms  # the layers are nearly all of it, and a tenth of them would do
    result = plan(config, *larger, "--max-latency-ms", budget_ms)
    assert result.exit_code == 0, result.output
    rows = cells_of(result.stdout)
    assert float(rows["latency, predicted ms"][1]) <= budget_ms + 0.005
    assert float(rows["latency, predicted ms"][1]) > 0.9 * budget_ms
