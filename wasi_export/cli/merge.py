"""`wasi-export merge`: what boards have learnt, into a new bundle, or back to torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track


@exit_codes
def merge(
    bundle: Annotated[Path, typer.Argument(help="The bundle that was trained.")],
    states: Annotated[
        list[Path], typer.Argument(metavar="STATE...", help="Folders that `adapt` or `Adapter.save` wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new bundle, or of the run.")],
    share: Annotated[
        list[float] | None, typer.Option(help="Of each state in the mean, as its images; once for each.")
    ] = None,
    to: Annotated[
        Literal["bundle", "torch"],
        typer.Option(help="A bundle for boards, or a run that `train --init` goes on with."),
    ] = "bundle",
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images: accuracy before and after, and to judge int8 by."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Put what boards have learnt into a new bundle, checked like an export. Needs no torch.

    Several states are averaged, factored layers in the product of their factors.
    """
    from wasi_export._extras import require
    from wasi_export.errors import UsageError

    require("onnx_ir", extra="merge")
    from wasi_export.cli._merge import Merge

    if to == "torch" and data is not None:
        raise UsageError("--data goes with --to bundle: a run is judged when it is trained")
    merged = Merge.of(bundle, states, share)
    if to == "torch":
        facts = merged.write_run(out, force=force)
        if as_json:
            print_json(facts)
        else:
            typer.echo(f"run: {out}\ngo on: wasi-export train CONFIG --method {facts.method} --init {out}")
        return
    result = merged.write_bundle(out, data=data, force=force, track=track)
    if as_json:
        print_json(result)
        return
    print_table(
        f"{len(states)} {'state' if len(states) == 1 else 'states'} into {out}",
        ("", ""),
        [
            ("parity error", f"{result.parity_error:.1e} of the output scale"),
            ("largest change", f"{result.change:.1e} of the output scale, on the golden images"),
            *([("quantized", str(result.quantized))] if result.quantized else []),
            *(
                [("accuracy", f"{result.accuracy_before:.4f} before, {result.accuracy:.4f} now")]
                if result.accuracy is not None
                else []
            ),
        ],
        align="lr",
    )
