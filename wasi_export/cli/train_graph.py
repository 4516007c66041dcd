"""`wasi-export train-graph`: a training step for a bundle that has none, or another one."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._config import Overrides
from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table
from wasi_export.cli._torch import prepare_torch


@exit_codes
def train_graph(
    bundle: Annotated[Path, typer.Argument(help="The bundle, which is replaced when all is checked.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run that it was exported from.")],
    trainable: Annotated[
        str | None, typer.Option(help="What it trains: factors, right, head, blocks:N, all, or patterns.")
    ] = None,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
) -> None:
    """Add the training step of [adapt] to a bundle, for `adapt`. Its model.onnx stays as it is."""
    prepare_torch()
    from wasi_export.cli._train_graph import add_training_step

    given = [f"adapt.trainable={trainable}"] if trainable else []
    training = add_training_step(bundle, run, [*(overrides or ()), *given])
    if as_json:
        print_json(training)
        return
    print_table(
        f"training step of {bundle}",
        ("", ""),
        [
            ("trains", str(training)),
            ("parity error", f"{training.parity_error:.1e} of its outputs or its loss"),
        ],
        align="lr",
    )
