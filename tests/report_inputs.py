"""Reports and a finished run for the tests of the page, written as the real ones are."""

import json
from pathlib import Path

from helpers import make_bundle

from wasi_export.cli._summary import ModelSummary, RunSummary, StepMemoryPair
from wasi_export.report import (
    ChangedImage,
    Check,
    Comparison,
    Confusion,
    Host,
    Instructions,
    Latency,
    LayerTime,
    Predictions,
    Report,
)
from wasi_export.step_memory import Phase, StepCurve

HOST = Host(
    machine="x86_64", processor="p", cores=2, memory_mb=8000, system="Linux", versions={"numpy": "2.4.6"}
)
CHECKS = (
    Check(name="parity error", status="passed", value=4e-7, threshold=1e-5, detail="largest 4e-07"),
    Check(name="accuracy", status="passed", value=0.97, threshold=0.9, detail="97 of 100"),
    Check(name="accuracy drop", status="passed", value=-0.01, threshold=0.03),
    Check(name="latency ratio", status="passed", value=0.5, threshold=0.95),
    Check(name="size", status="passed", value=2.5, threshold=5.0, unit="MB"),
    Check(name="accuracy of bundle, int8", status="info", value=0.95),
)
EPOCH = {
    "epoch": 1, "step": 44, "train_loss": 2.25, "val_loss": 1.875, "val_accuracy": 0.5, "lr": 1e-3,
    "seconds": 5.0, "cpu_seconds": 5.0, "images_per_second": 100.0,
}  # fmt: skip


def make_report(*checks: Check, latency: tuple[Latency, ...] = (), **changes: object) -> Report:
    return Report(
        bundle="b", model="m", model_sha256="0" * 64, checks=checks, latency=latency, host=HOST
    ).model_copy(update=changes)


def make_latency(model: str, ms: float = 1.0) -> Latency:
    return Latency(
        model=model, batch=1, threads=1, p50_ms=ms, p90_ms=1.25 * ms, p99_ms=1.5 * ms, ratio_to_first=ms,
        ratio_low=0.9 * ms, ratio_high=1.1 * ms, ratio_interval=(0.95 * ms, 1.05 * ms), noise_floor=0.05,
        load_ms=20.0, peak_rss_mb=80.0, clock="cpu",
        samples_ms=tuple(ms * factor for factor in (0.9, 1.0, 1.0, 1.5, 9.0)),
    )  # fmt: skip


def make_answers(classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, object]:
    """What a report has of 100 images: 90 both right, 4 lost, 5 won, 1 wrong both times."""
    dense, own = ((56, 4), (2, 38)), ((57, 3), (2, 38))
    thumbnail = "data:image/jpeg;base64,/9j/4AAQSkZJRg=="
    return {
        "classes": classes,
        "predictions": tuple(
            Predictions(
                model=model, correct=matrix[0][0] + matrix[1][1], total=100, matrix=matrix,
                confusions=(
                    Confusion(label=0, answer=1, images=matrix[0][1]), Confusion(label=1, answer=0, images=2),
                ),
            )
            for model, matrix in (("baseline", dense), ("bundle", own))
        ),
        "comparison": Comparison(
            both_right=90, lost=4, won=5, both_wrong=1, drop=-0.01, interval=(-0.07, 0.05), confidence=0.95,
            p_value=1.0, changed=9,
            images=(
                ChangedImage(image="cat/a.jpg", label=0, baseline=0, bundle=1, thumbnail=thumbnail),
                ChangedImage(image="dog/b.jpg", label=1, baseline=0, bundle=1),
                ChangedImage(image="dog/c.jpg", label=1, baseline=0, bundle=-1),
            ),
        ),
    }  # fmt: skip


def make_layer_times(*names: str) -> tuple[LayerTime, ...]:
    times = (LayerTime(layer=name, baseline_ms=0.2, bundle_ms=0.1) for name in names)
    return (*times, LayerTime(layer="", baseline_ms=0.5, bundle_ms=0.6))


def make_curve(scale: int = 1) -> StepCurve:
    """A step of 8 ms with its peak of 9 MB, times a scale, in the backward pass."""
    mb = scale * 10**6
    return StepCurve(
        batch_size=32,
        phases=(
            Phase(name="forward", begin_ms=0, end_ms=3), Phase(name="backward", begin_ms=3, end_ms=6),
            Phase(name="update", begin_ms=6, end_ms=8),
        ),
        at_ms=(0.0, 2.0, 4.0, 7.0),
        held_bytes={
            "parameters": (mb,) * 4, "optimizer": (2 * mb,) * 4, "gradients": (0, 0, mb, mb),
            "activations": (0, 3 * mb, 5 * mb, 0), "inputs": (0, 0, 0, 0),
        },
    )  # fmt: skip


def make_board_report() -> Report:
    """A report of an emulated board."""
    counts = Instructions(
        model="bundle", batch=1, total=4_910_808, simd=3_090_341, fmla=2_488_135, dot=0, load_store=999_699,
        branch=262_798, ratio_to_first=1.0, estimate_ms=(0.72, 0.92),
    )  # fmt: skip
    host = HOST.model_copy(update={"machine": "Raspberry Pi 5, emulated", "evidence": "emulated"})
    return make_report(CHECKS[0], target="arm64:pi5", instructions=(counts,), host=host)


def write_report_json(folder: Path, report: Report) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(report.model_dump_json())
    return folder


def make_run(folder: Path) -> Path:
    """Writes what is read of the folder of a finished run."""
    names = ("baseline", "bundle", "baseline, int8", "bundle, int8")
    report = make_report(
        *CHECKS,
        latency=tuple(make_latency(name, 1 / (i + 1)) for i, name in enumerate(names)),
        layers=make_layer_times("blocks.0.mlp.fc1"),
        **make_answers(),
    )
    write_report_json(folder / "report", report)
    rows = [
        ModelSummary(
            model=model, accuracy=0.96, parameters=1_797_706, size_mb=7.2, latency_ms=1.0, latency_ratio=1.0,
            step_memory_mb=memory,
        )
        for model, memory in (
            ("dense", 54.0), ("low-rank", 35.0), ("dense, int8", None), ("low-rank, int8", None),
        )
    ]  # fmt: skip
    summary = RunSummary(
        name="m", verdict="passed", exit_code=0, dense=rows[0], low_rank=rows[1], dense_int8=rows[2],
        low_rank_int8=rows[3], bundle=Path("bundle"), report=Path("report.md"),
    )  # fmt: skip
    (folder / "report" / "summary.json").write_text(summary.model_dump_json())
    memory = StepMemoryPair(
        dense_mb=54.0, low_rank_mb=35.0, dense_curve=make_curve(2), low_rank_curve=make_curve()
    )
    (folder / "report" / "memory.json").write_text(memory.model_dump_json())
    make_bundle(folder / "bundle")
    for stage in ("dense", "subspace"):
        (folder / stage).mkdir()
        lines = (json.dumps(EPOCH | {"epoch": epoch, "val_accuracy": 0.5 + 0.1 * epoch}) for epoch in (1, 2))
        (folder / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder
