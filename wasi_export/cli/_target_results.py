"""What a command on several targets prints with `--json`."""

from typing import Literal

from wasi_export.cli._documents import ErrorFacts
from wasi_export.report import Benchmark, Report
from wasi_export.runtimes.doctor import Examination
from wasi_export.settings import Frozen


class TargetResult(Frozen):
    """What came of one target; either is None."""

    target: str
    result: Report | Benchmark | Examination | None = None
    error: ErrorFacts | None = None


class TargetResults(Frozen):
    """What came of several targets, in their order."""

    schema_version: Literal[1] = 1
    targets: tuple[TargetResult, ...]
