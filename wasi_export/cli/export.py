"""`wasi-export export`: a run, or a plain timm model, into a bundle for the board."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wasi_export.cli._config import Overrides
from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track
from wasi_export.cli._torch import prepare_torch

if TYPE_CHECKING:
    from wasi_export.artifact import Bundle


@exit_codes
def export(
    run: Annotated[Path | None, typer.Argument(help="Folder of a finished run.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Bundle folder. Default: bundles/NAME.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of a run: this timm model, factored without training.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of --model with their head, .safetensors or .pth.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Let timm download the weights of --model.")
    ] = False,
    img_size: Annotated[int | None, typer.Option(help="Input size of --model in pixels.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Folder of real images for --model; or `digits`, `fashion-mnist`.")
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="How many of them to use. Default: 256.")
    ] = None,
    method: Annotated[
        Literal["sequential", "whitened", "plain", "dense"] | None,
        typer.Option(
            help="Factor --model layer after layer (the default), each by its output energy alone, by the "
            "SVD of its weight, or leave it dense."
        ),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Parameters of a pair over the dense ones. Default: 0.4.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Explained energy to keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="The same rank for every layer.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 17 to 25. Default: 23.")] = None,
    target_runtime: Annotated[
        str | None, typer.Option(help="Oldest onnxruntime to run in, as 1.18; instead of --opset.")
    ] = None,
    fold: Annotated[
        Literal["never", "auto", "always"] | None,
        typer.Option(help="Multiply factors out: where dense is faster here (auto), or everywhere."),
    ] = None,
    quantize: Annotated[
        Literal["none", "auto", "int8", "fp16-storage"] | None,
        typer.Option(help="Add a graph in int8, if it is as accurate and faster here, or in half."),
    ] = None,
    fold_normalization: Annotated[
        bool, typer.Option("--fold-normalization", help="Take pixels in [0, 1]: no mean and std outside.")
    ] = False,
    train_graph: Annotated[
        bool, typer.Option("--train-graph", help="Add the training step of [adapt], for `adapt`.")
    ] = False,
    trainable: Annotated[
        str | None, typer.Option(help="What it trains: factors, right, head, blocks:N, all, or patterns.")
    ] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a checked bundle: factors explicit in ONNX, equal to the torch model on real images."""
    from wasi_export.config import Config
    from wasi_export.errors import ConfigError

    if (run is None) == (model is None):
        raise ConfigError("give either the folder of a run or --model NAME")
    for_model = {
        "--checkpoint": checkpoint,
        "--pretrained": pretrained or None,
        "--img-size": img_size,
        "--calibration": calibration,
        "--calibration-images": calibration_images,
        "--method": method,
        **(measures := {"--fraction": fraction, "--epsilon": epsilon, "--rank": rank}),
    }
    if run is not None and (given := [flag for flag, value in for_model.items() if value is not None]):
        raise ConfigError(f"{', '.join(given)} goes with --model; a run has its own in config.toml")
    if model is not None and calibration is None:
        raise ConfigError("--model needs --calibration DIR: real images to factor by and to check with")
    if method == "dense" and (given := [flag for flag, value in measures.items() if value is not None]):
        raise ConfigError(f"{', '.join(given)} is of factors, which --method dense has not: leave one out")
    if target_runtime is not None:
        if opset is not None:
            raise ConfigError("--target-runtime chooses the opset: leave out --opset")
        from wasi_export.converters.check import newest_opset

        opset = newest_opset(target_runtime)
    chosen = {
        key: value
        for key, value in (
            ("opset", opset),
            ("fold", fold),
            ("quantize", quantize),
            ("fold_normalization", fold_normalization or None),
            ("train_graph", train_graph or trainable is not None or None),
        )
        if value is not None
    }
    prepare_torch()
    from wasi_export.cli._bundle import export_model, export_run

    if run is not None:
        destination = out or Path("bundles") / run.resolve().name
        given = [f"export.{key}={str(value).lower()}" for key, value in chosen.items()]
        given += [f"adapt.trainable={trainable}"] if trainable else []
        overrides = [*(overrides or ()), *given]
        bundle = export_run(run, destination, overrides=overrides, force=force, track=track)
    else:
        assert model is not None
        options = {
            "model": {
                "name": model,
                "checkpoint": checkpoint,
                "pretrained": pretrained,
                "img_size": img_size,
            },
            "data": {"source": calibration},
            "subspace": {
                **({} if method in (None, "dense") else {"method": method}),
                "fraction": fraction,
                "epsilon": epsilon,
                "rank": rank,
                "calibration_images": calibration_images or 256,
                "activation": "none",
            },
            "export": chosen,
            "adapt": {"trainable": trainable} if trainable else {},
            "name": name_of(model),
        }
        config = Config.from_mapping(options, overrides or (), origin="options")
        destination = out or Path("bundles") / config.name
        bundle = export_model(config, destination, dense=method == "dense", force=force, track=track)
    if as_json:
        print_json(bundle.manifest)
    else:
        _print_bundle(bundle)


def name_of(model: str) -> str:
    """Returns what a bundle of a timm model is called: without the tag, and what no name has replaced."""
    return re.sub(r"[^\w-]+", "-", model.split(".")[0])


def _print_bundle(bundle: "Bundle") -> None:
    manifest = bundle.manifest
    factored = [layer for layer in manifest.model.layers if layer.rank is not None]
    print_table(
        f"{manifest.model.name}, {manifest.model.method}",
        ("", ""),
        [
            ("factored layers", str(len(factored))),
            ("parameters", f"{manifest.model.parameters:,}"),
            ("model.onnx", f"{bundle.model_path.stat().st_size / 1e6:.2f} MB"),
            ("opset", f"{manifest.opset}, onnxruntime ≥ {manifest.min_onnxruntime}"),
            ("classes", f"{len(manifest.classes):,}"),
            ("parity error", f"{manifest.parity_error:.1e} of the output scale"),
            *([("quantized", str(manifest.quantized))] if manifest.quantized else []),
            *([("training step", str(manifest.training))] if manifest.training else []),
            ("bundle", str(bundle.path)),
        ],
        align="lr",
    )
