"""`wasi-export card` and `sbom`: what others want to know of a bundle before they take it."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import BundleArgument, JsonFlag, exit_codes, print_json

OutOption = Annotated[Path | None, typer.Option("--out", "-o", help="File to write. Default: stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


@exit_codes
def card(
    bundle: BundleArgument,
    report: Annotated[
        Path | None, typer.Option(help="report.json of the bundle: what was checked is on the card.")
    ] = None,
    out: OutOption = None,
    force: ForceOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a model card: what the model is, how it was made and checked, in Markdown."""
    from wasi_export.artifact import Bundle
    from wasi_export.errors import DataError, UsageError
    from wasi_export.manifest import MODEL
    from wasi_export.model_card import to_model_card
    from wasi_export.runtimes.validate import read_report

    if as_json and out is None:
        raise UsageError("a card is Markdown, --json tells where it was written: give --out too")
    opened = Bundle.open(bundle)
    found = read_report(report) if report else None
    if found and found.model_sha256 != opened.manifest.files[MODEL].sha256:
        raise DataError(f"{report} is of another model than {bundle}: give the report of this bundle")
    _write(to_model_card(opened, found), out, force=force, as_json=as_json)


@exit_codes
def sbom(
    bundle: BundleArgument, out: OutOption = None, force: ForceOption = False, as_json: JsonFlag = False
) -> None:
    """Write a bill of materials in CycloneDX 1.6: the model, its files, and what it was made with.

    Needs the extra `trust`. The same bundle gives the same bytes.
    """
    from wasi_export.artifact import Bundle
    from wasi_export.sbom import to_cyclonedx

    _write(to_cyclonedx(Bundle.open(bundle)), out, force=force, as_json=as_json)


def _write(text: str, out: Path | None, *, force: bool, as_json: bool) -> None:
    """Prints a document, or writes it and says where."""
    from wasi_export.cli._documents import WrittenFile
    from wasi_export.durable import require_new, write_bytes

    if out is None:
        typer.echo(text, nl=False)
        return
    require_new(out, force=force)
    write_bytes(out, text.encode())
    if as_json:
        print_json(WrittenFile(written=out))
    else:
        typer.echo(f"written: {out}")
