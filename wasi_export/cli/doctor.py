"""`wasi-export doctor`: is this machine fit, and if not, why not?"""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table


@exit_codes
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle to load and run here as well, in a fresh process.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where results will be written, for its free space.")] = Path(),
    as_json: JsonFlag = False,
) -> None:
    """Look whether this machine can run models, and say what is wrong and what helps.

    Exit code 3 where something keeps models from running; what makes them slow is a warning.
    """
    from wasi_export.runtimes.doctor import Examination, examine, try_bundle
    from wasi_export.runtimes.machine import gather

    facts = gather(folder)
    findings = examine(facts)
    if bundle is not None and facts.runtime.exit_code == 0:
        findings = (*findings, try_bundle(bundle, facts))
    result = Examination(facts=facts, findings=findings)
    if as_json:
        print_json(result)
    else:
        rows = [(f.name, f.status, f.found, f.remedy) for f in result.findings]
        print_table("", ("", "", "found", "what helps"), rows, align="llll")
    raise typer.Exit(int(result.exit_code))
