"""`wasi-export train`: one training stage, dense or with subspace layers."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wasi_export.cli._config import ConfigFile, Overrides, read_config
from wasi_export.cli._console import JsonFlag, exit_codes, note, print_json, print_table, track
from wasi_export.cli._torch import prepare_torch
from wasi_export.errors import UsageError

if TYPE_CHECKING:
    from wasi_export.training.profile import Profile
    from wasi_export.training.resume import EpochMetrics


@exit_codes
def train(
    config: ConfigFile = None,
    method: Annotated[
        Literal["dense", "subspace"], typer.Option(help="All layers dense, or the planned ones factored.")
    ] = "dense",
    init: Annotated[
        Path | None, typer.Option(help="Finished run to start from. Default: the config's weights.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder. Default: runs/NAME/METHOD.")
    ] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew whatever the folder holds.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure where a step's time goes, into profile.json.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Chrome trace of eight steps; with --profile.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a model into a run folder. Ctrl-C saves it, and the same command resumes.

    Several processes train together under `accelerate launch` or `torchrun`, see docs/scaling.md.
    """
    if trace is not None and not profile:
        raise UsageError(f"--trace {trace} needs --profile")
    settings = read_config(config, overrides)
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler tells what it does on stderr
    prepare_torch()
    from wasi_export.durable import locked_folder
    from wasi_export.training.processes import is_main_process, leave_processes
    from wasi_export.training.profile import PROFILE, Profile, ProfiledRun
    from wasi_export.training.stage import Profiling, train_run

    run_dir = out or Path("runs") / settings.name / method
    epochs: list[int] = []

    def on_epoch(metrics: "EpochMetrics") -> None:
        epochs.append(metrics.epoch)
        note(epoch_line(metrics))

    # Of several processes the main one, which writes the folder, has its lock.
    with locked_folder(run_dir) if os.environ.get("RANK", "0") == "0" else nullcontext():
        facts = train_run(
            settings,
            method,
            run_dir,
            init=init,
            force=force,
            track=track,
            on_epoch=on_epoch,
            profiling=Profiling(trace) if profile else None,
        )
    speaks = is_main_process()
    leave_processes()
    if not speaks:
        return
    measured = Profile.model_validate_json((run_dir / PROFILE).read_bytes()) if profile else None
    if as_json:
        print_json(facts if measured is None else ProfiledRun(run=facts, profile=measured))
        return
    if not epochs:
        note(f"{run_dir} was finished already: nothing to train (--force starts anew)")
    print_table(
        f"{facts.name}, {facts.method}",
        ("", ""),
        [
            ("parameters", f"{facts.parameters:,}"),
            *((name, f"{value:.6g}") for name, value in facts.metrics.items()),
            ("run", str(run_dir)),
        ],
        align="lr",
    )
    if measured is not None:
        _print_profile(measured)


def _print_profile(profile: "Profile") -> None:
    rows = [
        (phase.name, f"{phase.wall_ms:.2f}", f"{phase.cpu_ms:.2f}", f"{phase.share:.1%}")
        for phase in profile.phases
    ]
    rows.append(("whole step", f"{profile.step_ms:.2f}", f"{profile.step_cpu_ms:.2f}", ""))
    typer.echo(f"medians of {profile.steps} steps, {profile.device}, threads: {profile.threads}")
    print_table("by phase of a step", ("", "ms", "CPU ms", "share"), rows)
    print_table(
        "by part of the model, mean ms",
        ("", "forward", "backward", "update"),
        [
            (part.name, f"{part.forward_ms:.2f}", f"{part.backward_ms:.2f}", f"{part.update_ms:.2f}")
            for part in profile.parts
        ],
    )


def epoch_line(metrics: "EpochMetrics") -> str:
    """Returns one line for people about one epoch."""
    return (
        f"epoch {metrics.epoch}: loss {metrics.train_loss:.4f}, validation loss {metrics.val_loss:.4f}, "
        f"accuracy {metrics.val_accuracy:.4f}, {metrics.seconds:.0f} s, "
        f"{metrics.images_per_second:.0f} images/s"
    )
