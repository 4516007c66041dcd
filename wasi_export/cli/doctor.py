"""`wasi-export doctor`: is this machine fit, and if not, why not?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table
from wasi_export.cli._target import TargetsOption, end, on_targets
from wasi_export.errors import UsageError

if TYPE_CHECKING:
    from wasi_export.runtimes.doctor import Examination


@exit_codes
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle to load and run here as well, in a fresh process.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where results will be written, for its free space. Default: the current folder."),
    ] = None,
    target: TargetsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Look whether a machine can run models, and say what is wrong and what helps.

    Exit code 3 where something keeps models from running; what makes them slow is a warning.
    """
    from wasi_export.runtimes.doctor import Examination, examine, try_bundle
    from wasi_export.runtimes.machine import gather

    if target:
        if folder is not None:
            raise UsageError(f"--folder {folder} is of this machine, --target looks at others: leave one out")
        from wasi_export.runtimes.elsewhere.doctor import examine_elsewhere

        outcomes = on_targets(target, lambda there: examine_elsewhere(there, bundle))
        examined = [(outcome.name, outcome.result) for outcome in outcomes if outcome.error is None]
        if not as_json:
            for name, result in examined:
                _show(name, result)
        end(outcomes, [int(result.exit_code) for _, result in examined], as_json=as_json)
    facts = gather(folder or Path())
    findings = examine(facts)
    if bundle is not None and facts.runtime.exit_code == 0:
        findings = (*findings, try_bundle(bundle, facts))
    result = Examination(facts=facts, findings=findings)
    if as_json:
        print_json(result)
    else:
        _show("", result)
    raise typer.Exit(int(result.exit_code))


def _show(title: str, examination: "Examination") -> None:
    rows = [(f.name, f.status, f.found, f.remedy) for f in examination.findings]
    print_table(title, ("", "", "found", "what helps"), rows, align="llll")
