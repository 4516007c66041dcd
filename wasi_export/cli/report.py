"""`wasi-export report`: one HTML page of a finished run, or of a report."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json


@exit_codes
def report(
    path: Annotated[
        Path, typer.Argument(help="Folder of a finished `run`, or of a report that `validate` wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file. Default: report.html beside report.json."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write what was checked and measured as one HTML page.

    The page opens from the disk, without network or script, in light and dark. It shows what was measured and
    nothing else, and says which command measures the rest. Reports in folders of that folder, one for each
    target, are on the same page.

    The exit code says whether the page was written; the verdict is on it.
    """
    from wasi_export.cli._documents import Verdict, WrittenPage
    from wasi_export.cli._report_inputs import read_inputs, report_folder_of
    from wasi_export.cli._summary import PAGE
    from wasi_export.durable import require_new, write_bytes
    from wasi_export.errors import UsageError
    from wasi_export.report_page import render_page

    destination = out or report_folder_of(path) / PAGE
    if destination.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"the page is HTML, got --out {destination}: give a name that ends with .html")
    require_new(destination, force=force)
    inputs = read_inputs(path)
    page = render_page(inputs)
    write_bytes(destination, page)
    if as_json:
        verdicts = tuple(
            Verdict(target=found.target or "this machine", verdict=found.verdict) for found in inputs.reports
        )
        print_json(WrittenPage(report=destination, model=inputs.reports[0].model, verdicts=verdicts))
    else:
        typer.echo(f"report: {destination}")
