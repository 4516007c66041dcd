"""`wasi-export plan`: the dry run of the subspace stage."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._config import ConfigFile, Overrides, read_config
from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track
from wasi_export.cli._torch import prepare_torch


@exit_codes
def plan(
    config: ConfigFile = None,
    init: Annotated[
        Path | None, typer.Option(help="Finished dense run to start from. Default: the config's weights.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this JSON file.")] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show which layers would be factored, at which rank and why. Trains nothing."""
    settings = read_config(config, overrides)
    from wasi_export.artifact import write_bytes
    from wasi_export.datasets import load_data
    from wasi_export.errors import ArtifactExistsError
    from wasi_export.ranks import break_even_rank

    if out is not None and out.exists() and not force:
        raise ArtifactExistsError(f"{out} exists: choose another name or give --force")
    prepare_torch()
    from wasi_export.training.stage import factorize, first_model

    images, _ = load_data(settings.data)
    model = first_model(settings, images.classes, init)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    made = factorize(settings, model, images, track=track)
    after = sum(parameter.numel() for parameter in model.parameters())
    if out is not None:
        write_bytes(out, made.model_dump_json(indent=2).encode())
    if as_json:
        print_json(made)
        return
    dense = sum(layer.out_features * layer.in_features for layer in made.layers)
    now = sum(layer.parameters for layer in made.layers)
    print_table(
        f"{settings.model.name}: {len(made.factored)} of {len(made.layers)} layers factored",
        ("layer", "out×in", "rank", "break-even", "energy", "dense", "now", "why"),
        [
            (
                layer.name,
                f"{layer.out_features}×{layer.in_features}",
                "–" if layer.rank is None else str(layer.rank),
                f"{break_even_rank(layer.out_features, layer.in_features):.0f}",
                "–" if layer.energy is None else f"{layer.energy:.4f}",
                f"{layer.out_features * layer.in_features:,}",
                f"{layer.parameters:,}",
                layer.reason,
            )
            for layer in made.layers
        ]
        + [
            ("targeted layers", "", "", "", "", f"{dense:,}", f"{now:,}", f"{now / dense:.1%} of dense"),
            ("whole model", "", "", "", "", f"{parameters:,}", f"{after:,}", f"{after / parameters:.1%}"),
        ],
        align="lrrrrrrl",
    )
