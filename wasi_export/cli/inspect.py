"""`wasi-export inspect`: what is in a bundle."""

from wasi_export.cli._console import BundleArgument, JsonFlag, exit_codes, print_json, print_table


@exit_codes
def inspect(
    bundle: BundleArgument,
    as_json: JsonFlag = False,
) -> None:
    """Show what is in a bundle.

    Every file is checked against the manifest first.
    """
    from wasi_export.artifact import Bundle

    manifest = Bundle.open(bundle).manifest
    if as_json:
        print_json(manifest)
        return
    size = sum(entry.size_bytes for entry in manifest.files.values())
    spec = manifest.input
    print_table(
        f"{manifest.name} ({manifest.created})",
        ("", ""),
        [
            ("model", f"{manifest.model.name}, {manifest.model.method}"),
            ("parameters", f"{manifest.model.parameters:,}"),
            ("input", f"{spec.name} [B, {spec.channels}, {spec.height}, {spec.width}]"),
            (
                "preprocessing",
                f"{spec.interpolation}, crop {spec.crop_pct:g}, mean {_numbers(spec.mean)}, "
                f"std {_numbers(spec.std)}",
            ),
            ("output", f"{manifest.output} [B, {len(manifest.classes)}]"),
            ("classes", _some(manifest.classes)),
            ("opset", f"{manifest.opset}, IR version {manifest.ir_version}"),
            ("needs", f"onnxruntime {manifest.min_onnxruntime}"),
            ("parity error at export", f"{manifest.parity_error:.1e}"),
            *([("quantized", str(manifest.quantized))] if manifest.quantized else []),
            *([("training step", str(manifest.training))] if manifest.training else []),
            *((name, f"{value:g}") for name, value in manifest.metrics.items()),
            ("made with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
        ],
        align="ll",
    )
    if layers := manifest.model.layers:
        dense = sum(layer.out_features * layer.in_features for layer in layers)
        now = sum(layer.parameters for layer in layers)
        print_table(
            f"{sum(layer.rank is not None for layer in layers)} of {len(layers)} layers factored, "
            f"{now / dense:.1%} of their dense parameters",
            ("layer", "in", "out", "rank", "energy", "dense", "now"),
            [
                (
                    layer.name,
                    str(layer.in_features),
                    str(layer.out_features),
                    "–" if layer.rank is None else str(layer.rank),
                    "–" if layer.energy is None else f"{layer.energy:.3f}",
                    f"{layer.out_features * layer.in_features:,}",
                    f"{layer.parameters:,}",
                )
                for layer in layers
            ]
            + [("total", "", "", "", "", f"{dense:,}", f"{now:,}")],
        )
    print_table(
        f"{len(manifest.files)} files, {size / 1e6:.2f} MB",
        ("file", "bytes", "sha256"),
        [(name, f"{entry.size_bytes:,}", f"{entry.sha256[:12]}…") for name, entry in manifest.files.items()],
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _some(names: tuple[str, ...], limit: int = 10) -> str:
    more = f", … ({len(names)})" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
