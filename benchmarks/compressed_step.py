"""Memory, size and time of a training step that keeps its inputs compressed, with and without the barrier.

    python benchmarks/compressed_step.py [--batch 8] [--steps 3]

vit_tiny_patch16_224 at 224 px, factored at f = 0.2, its factors trained by gradient descent (so that what
optimisers keep is not in the way), random weights and bases. Every graph runs in a fresh process on one
thread: its peak of memory less what the imports take, process time of a step, time to load.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from step_graph_memory import memory_mib

WAYS = (
    "whole", "feature 32", "feature 32, no barrier", "feature+token 32", "feature+token 32, no barrier",
    "feature+token 16", "feature+token 16, no barrier", "block", "block, feature 32", "wsi 32",
    "wsi 32, block", "accumulate", "accumulate, block",
)  # fmt: skip


def write(way: str, folder: Path) -> dict[str, Any]:
    """Writes the step of a way into a folder; returns facts of it."""
    import torch
    from safetensors.numpy import save_file
    from step_graph_models import SIZE, make_case

    from wasi_export.config import AdaptConfig
    from wasi_export.converters.step_graph import compress
    from wasi_export.converters.step_graph.function import StepSettings
    from wasi_export.converters.training_step import export_training_step
    from wasi_export.manifest import BASES, PARAMETERS, STEP, UPDATE, InputSpec, TrainingGraph
    from wasi_export.subspace import subspace_layers
    from wasi_export.subspace.tucker import Bases

    model, trainable = make_case("factors")
    rank = next((int(word.strip(",")) for word in way.split() if word.strip(",").isdigit()), None)
    generator = torch.Generator().manual_seed(0)

    def basis(rows: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(rows, rank or 1, generator=generator))[0]

    settings = StepSettings(opt="sgd", recompute="block" if "block" in way else "none")
    settings = replace(settings, wsi="wsi" in way, momentum=0.0, accumulate="accumulate" in way)
    if rank is not None:
        token = model.patch_embed.num_patches + 1 if "token" in way else None
        bases = {
            name: Bases(basis(layer.in_features), None if token is None else basis(token))
            for name, layer in subspace_layers(model)
        }
        settings = replace(settings, bases=bases)
    if "no barrier" in way:
        compress.after = lambda value, *others: value  # type: ignore[assignment]
    spec = InputSpec(height=SIZE, width=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    start = time.process_time()
    exported = export_training_step(model, spec, trainable, settings)
    seconds = time.process_time() - start
    (folder / "train").mkdir()
    (folder / STEP).write_bytes(exported.step.SerializeToString())
    nodes = len(exported.step.graph.node)
    if exported.update is not None:
        (folder / UPDATE).write_bytes(exported.update.SerializeToString())
        nodes += len(exported.update.graph.node)
    if exported.bases:
        save_file({name: exported.optimizer[name] for name in exported.bases}, folder / BASES)
    save_file(exported.parameters, folder / PARAMETERS)
    facts = TrainingGraph(
        settings=AdaptConfig(opt="sgd", recompute=settings.recompute, accumulate=settings.accumulate),
        parameters=tuple(exported.parameters),
        optimizer=tuple(exported.optimizer),
        bases=exported.bases,
        sums=exported.sums,
        frozen=(),
        model_parameters=0,
        parity_error=0.0,
    )
    (folder / "training.json").write_text(facts.model_dump_json())
    state = sum(array.nbytes for array in (exported.parameters | exported.optimizer).values())
    return {"nodes": nodes, "state_mib": state / 2**20, "export_s": seconds}


def run(folder: Path, batch: int, steps: int) -> dict[str, float]:
    """Takes steps in this process; returns what they took."""
    from wasi_export.manifest import TrainingGraph
    from wasi_export.runtimes.training_session import TrainingSession

    imported = memory_mib("VmRSS")
    facts = TrainingGraph.model_validate_json((folder / "training.json").read_text())
    start = time.process_time()
    session = TrainingSession.load(folder, facts)
    load = time.process_time() - start
    generator, samples = np.random.default_rng(0), []
    images = generator.standard_normal((batch, 3, 224, 224), np.float32)
    labels = generator.integers(0, 10, batch)
    for _ in range(steps + 1):
        start = time.process_time()
        session.step(images, labels, lr=1e-3, weight_decay=0.05, clip_norm=1.0)
        samples.append(1e3 * (time.process_time() - start))
    return {
        "less_import_mib": memory_mib("VmHWM") - imported,
        "step_ms": float(np.median(samples[1:])),
        "load_s": load,
    }


def main() -> None:
    """Prints a line for every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=WAYS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        print(json.dumps(write(args.write[0], Path(args.write[1]))))
        return
    if args.run:
        print(json.dumps(run(Path(args.run), args.batch, args.steps)))
        return
    print(f"{'':32} {'nodes':>6} {'state':>6} {'MiB':>6} {'step ms':>8} {'load s':>7} {'export s':>8}")
    for way in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found = _in_process("--write", way, folder)
            found |= _in_process("--run", folder, "--batch", str(args.batch), "--steps", str(args.steps))
        print(
            f"{way:32} {found['nodes']:6} {found['state_mib']:6.1f} {found['less_import_mib']:6.0f} "
            f"{found['step_ms']:8.0f} {found['load_s']:7.2f} {found['export_s']:8.1f}",
            flush=True,
        )


def _in_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
