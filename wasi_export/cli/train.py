"""`wasi-export train`: one training stage, dense or with subspace layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wasi_export.cli._config import ConfigFile, Overrides, read_config
from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track
from wasi_export.cli._torch import prepare_torch

if TYPE_CHECKING:
    from wasi_export.training.resume import EpochMetrics


@exit_codes
def train(
    config: ConfigFile = None,
    method: Annotated[
        Literal["dense", "subspace"], typer.Option(help="All layers dense, or the planned ones factored.")
    ] = "dense",
    init: Annotated[
        Path | None, typer.Option(help="Finished dense run to start from. Default: the config's weights.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder. Default: runs/NAME/METHOD.")
    ] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew whatever the folder holds.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a model into a run folder. Ctrl-C saves it, and the same command resumes."""
    settings = read_config(config, overrides)
    prepare_torch()
    from wasi_export.training.stage import train_run

    run_dir = out or Path("runs") / settings.name / method
    epochs: list[int] = []

    def on_epoch(metrics: "EpochMetrics") -> None:
        epochs.append(metrics.epoch)
        typer.echo(epoch_line(metrics), err=True)

    facts = train_run(settings, method, run_dir, init=init, force=force, track=track, on_epoch=on_epoch)
    if as_json:
        print_json(facts)
        return
    if not epochs:
        typer.echo(f"{run_dir} was finished already: nothing to train (--force starts anew)", err=True)
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


def epoch_line(metrics: "EpochMetrics") -> str:
    """Returns one line for people about one epoch."""
    return (
        f"epoch {metrics.epoch}: loss {metrics.train_loss:.4f}, validation loss {metrics.val_loss:.4f}, "
        f"accuracy {metrics.val_accuracy:.4f}, {metrics.seconds:.0f} s, "
        f"{metrics.images_per_second:.0f} images/s"
    )
