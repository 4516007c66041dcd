import json
import shutil
import subprocess
import sys

import pytest
from helpers import require_schema
from typer.testing import CliRunner

from wasi_export.artifact import Bundle
from wasi_export.cli import app
from wasi_export.config import Config

# Wide enough for its factors to pay, trained far too short to be good.
CONFIG = """
name = "tiny"
[model]
name = "vit_tiny_patch16_224"
img_size = 16
in_chans = 1
kwargs = { embed_dim = 128, depth = 2, num_heads = 2, patch_size = 4 }
[data]
source = "digits"
train_images = 64
val_images = 20
batch_size = 16
[subspace]
calibration_images = 32
[train.dense]
epochs = 1
[train.subspace]
epochs = 1
"""
STAGES = [
    "dense: training",
    "subspace: training",
    "baseline: exporting",
    "bundle: exporting",
    "memory: measuring training steps",
    "report: validating",
]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def stages_of(result):
    """Returns the stages that were done, by the lines on stderr."""
    return [line.split(",")[0] for line in result.stderr.splitlines() if not line.startswith(" ")]


def test_a_dry_run_prints_the_whole_configuration_and_does_nothing(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_schema("config", run(config, "--dry-run", "--json").stdout)
    result = run(config, "--dry-run", "-s", "train.dense.lr=0.5")
    assert result.exit_code == 0
    (tmp_path / "again.toml").write_text(result.stdout)
    assert Config.from_toml(tmp_path / "again.toml") == Config.from_toml(config, ["train.dense.lr=0.5"])
    assert "weight_decay = 0.05" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_a_wrong_key_is_one_line(config):
    result = run(config, "-s", "thresholds.min_acuracy=0.9")
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {config}: unknown key 'thresholds.min_acuracy', did you mean 'min_accuracy'?\n"
    )


@pytest.mark.slow
def test_the_pipeline_does_each_stage_once(config, tmp_path):
    folder = tmp_path / "out"
    first = run(config, "-o", folder, "--json")
    assert first.exit_code == 0, first.output
    assert stages_of(first) == STAGES
    require_schema("summary", first.stdout)
    require_schema("memory", (folder / "report" / "memory.json").read_bytes())
    require_schema("report", (folder / "report" / "report.json").read_bytes())
    require_schema("manifest", (folder / "bundle" / "manifest.json").read_bytes())
    summary = json.loads(first.stdout)
    assert summary["dense"]["parameters"] > summary["low_rank"]["parameters"]
    assert summary["dense"]["size_mb"] > summary["low_rank"]["size_mb"]
    assert summary["dense"]["step_memory_mb"] > 0
    assert summary["dense"]["latency_ratio"] == 1.0
    # Neither bundle ships int8, and the report has it all the same.
    for form in ("dense", "low_rank"):
        int8 = summary[f"{form}_int8"]
        assert int8["size_mb"] < 0.5 * summary[form]["size_mb"]
        assert 0 <= int8["accuracy"] <= 1
        assert int8["step_memory_mb"] is None
    assert summary["page"] == str(folder / "report" / "report.html")
    memory = json.loads((folder / "report" / "memory.json").read_text())
    peaks = [
        max(map(sum, zip(*memory[curve]["held_bytes"].values(), strict=True)))
        for curve in ("dense_curve", "low_rank_curve")
    ]
    assert 0 < peaks[1] < peaks[0] < 1e6 * memory["dense_mb"]
    written = json.loads((folder / "report" / "report.json").read_text())
    times = {time["layer"]: time for time in written["layers"]}
    assert {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "mlp.fc1", "mlp.fc2")} <= set(times)
    assert all(time["baseline_ms"] > 0 and time["bundle_ms"] > 0 for time in times.values())
    names = ["baseline", "bundle", "baseline, int8", "bundle, int8"]
    assert [latency["model"] for latency in written["latency"]] == names
    assert Bundle.open(folder / "bundle").manifest.model.method == "subspace"
    assert Bundle.open(folder / "baseline").manifest.model.method == "dense"
    assert {path.name for path in (folder / "report").iterdir()} == {
        "report.json",
        "report.md",
        "report.junit.xml",
        "report.html",
        "summary.json",
        "memory.json",
    }

    again = run(config, "-o", folder)
    assert again.exit_code == 0
    assert again.stderr == ""
    assert f"bundle: {folder / 'bundle'}" in again.stdout
    assert f"report: {folder / 'report' / 'report.md'}" in again.stdout
    page = folder / "report" / "report.html"
    assert f"page: {page}" in again.stdout
    assert "<h2>Memory over a training step, batch 16</h2>" in page.read_text()

    page.unlink()
    code = "import sys; sys.modules['jinja2'] = None; from wasi_export.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(config), "-o", str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert "page: not written, jinja2 is not installed: pip install 'wasi-export[report]'" in told.stdout
    assert not page.exists()
    assert stages_of(run(config, "-o", folder)) == []
    assert page.exists()

    shutil.rmtree(folder / "bundle")  # what is not there any more is made again
    assert STAGES[3] in stages_of(run(config, "-o", folder))
    assert Bundle.open(folder / "bundle").manifest.model.method == "subspace"

    # Only what depends on the change is done again; a threshold that is missed is the exit code.
    stricter = run(config, "-o", folder, "-s", "thresholds.min_accuracy=1.0")
    assert stages_of(stricter) == STAGES[-1:]
    assert stricter.exit_code == 1
    assert "failed: accuracy" in stricter.stdout
    assert "Failed: accuracy" in page.read_text()
    assert run(config, "-o", folder, "-s", "thresholds.min_accuracy=1.0").exit_code == 1

    longer = run(config, "-o", folder, "-s", "train.subspace.epochs=2")
    assert stages_of(longer) == [STAGES[1], *STAGES[3:]]
    assert longer.exit_code == 0
    assert longer.stderr.count("epoch ") == 2

    other_opset = run(config, "-o", folder, "-s", "train.subspace.epochs=2", "-s", "export.opset=20")
    assert stages_of(other_opset) == [*STAGES[2:4], STAGES[5]]
    assert Bundle.open(folder / "bundle").manifest.opset == 20

    forced = run(config, "-o", folder, "--force")
    assert stages_of(forced) == STAGES
