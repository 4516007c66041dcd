"""Would the tests of gates and of integrity notice a bug in them? Bugs are put in, one at a time.

    python benchmarks/mutation.py                          # half an hour on one core
    python benchmarks/mutation.py runtimes/parity.py       # of one file; it takes the place of what is there
    python benchmarks/mutation.py --json                   # the result that is there
    python benchmarks/mutation.py --docs                   # and into docs/fuzzing.md

cosmic-ray makes the mutants: another comparison, the opposite operator, a number one higher or lower, a
condition turned round, `and` for `or`, a loop that is not entered, another exception caught, a decorator
left out. A mutant is killed when a test fails or hangs; the score is the share of those that are killed, of
all but the equivalent ones, which differ in nothing that can be seen. Those are in `EQUIVALENT`, with the
reason.

A mutant lives in a process that was forked from one that has imported the libraries; no file is changed.
"""

import ast
import contextlib
import importlib.abc
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from kept import new_parser, new_result, read_result, to_json, write_result
from pages import fill

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/mutation.json"
PAGE, MARK, END = ROOT / "docs/fuzzing.md", "<!-- benchmarks/mutation.py -->\n", "<!-- end of mutation.py -->"
SECONDS = 60
IMPORTED_BEFORE = "ignore::pytest.PytestAssertRewriteWarning"  # the plugins, by the parent
_BOARD, _DOCUMENTS = "tests/runtimes/test_properties.py::test_", "tests/test_document_properties.py::test_"
SOURCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "runtimes/parity.py": (
        (),
        (
            "tests/runtimes/test_parity.py",
            f"{_BOARD}parity_holds_exactly_where_every_error_is_a_number_within_the_tolerance",
        ),
    ),
    "runtimes/checks.py": ((), ("tests/runtimes/test_checks.py",)),
    "runtimes/significance.py": ((), ("tests/runtimes/test_significance.py",)),
    "runtimes/accuracy.py": ((), ("tests/runtimes/test_accuracy.py", "tests/runtimes/test_comparison.py")),
    "runtimes/validate.py": ((), ("tests/runtimes/test_validate.py",)),
    "runtimes/state_folder.py": (
        (),
        ("tests/runtimes/test_state_folder.py", f"{_DOCUMENTS}a_state_is_read_as_it_was_committed"),
    ),
    "wasi_export/report.py": (
        ("Report.exit_code", "Report.verdict"),
        ("tests/test_report.py", "tests/test_properties.py"),
    ),
    "wasi_export/config.py": (("Thresholds",), ("tests/test_config.py",)),
    "wasi_export/settings.py": ((), ("tests/test_config.py",)),
    "wasi_export/manifest.py": (
        (),
        ("tests/test_artifact_facts.py", "tests/test_artifact.py", "tests/test_hostile_bundles.py"),
    ),
    "wasi_export/artifact.py": (
        (),
        ("tests/test_artifact_facts.py", "tests/test_artifact.py", "tests/test_hostile_bundles.py"),
    ),
    "wasi_export/durable.py": (
        (),
        ("tests/test_durable.py", f"{_DOCUMENTS}a_file_has_the_bytes_that_were_written_last"),
    ),
    "wasi_export/untrusted/document.py": (
        (),
        ("tests/untrusted/test_document.py", "tests/untrusted/test_document_limits.py"),
    ),
    "wasi_export/untrusted/graph.py": (
        (),
        ("tests/untrusted/test_graph.py", "tests/untrusted/test_graph_limits.py"),
    ),
    "wasi_export/untrusted/tensors.py": ((), ("tests/untrusted/test_tensors.py",)),
    "wasi_export/untrusted/values.py": (
        (),
        ("tests/untrusted/test_values.py",),
    ),
}
"""Of each file the functions that count (all, where there are none), and the tests that are to notice."""
_OPPOSITES = {
    ("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Div", "Mul"), ("FloorDiv", "Mul"), ("Mod", "Mul"),
    ("Pow", "Mul"), ("LShift", "RShift"), ("RShift", "LShift"), ("BitAnd", "BitOr"),
}  # fmt: skip
EQUIVALENT: dict[tuple[str, str], str] = {
    ("wasi_export/report.py", "if self.exit_code <= ExitCode.PASSED:"): "no exit code is below 0",
    ("runtimes/parity.py", "if len(golden.images) <= 0:"): "no length is below 0",
    ("runtimes/parity.py", "if error <= 0:"): "no error is below 0",
    (
        "runtimes/parity.py",
        "for start in range( -1, count, batch):",
    ): "all images are covered from the last one on, too",
    (
        "wasi_export/untrusted/document.py",
        """more = f" (and {len(details) - 1} more)" if len(details) != 1 else \"\"""",
    ): "there is one error at least",
    (
        "wasi_export/untrusted/document.py",
        "details = error.errors(include_url=True, include_context=False)",
    ): "nothing but place and message is told",
    (
        "wasi_export/untrusted/document.py",
        "details = error.errors(include_url=False, include_context=True)",
    ): "nothing but place and message is told",
    (
        "runtimes/parity.py",
        'return error / scale if 0 != scale < float("inf") else float("inf")',
    ): "no scale is below 0",
    (
        "runtimes/parity.py",
        'return error / scale if 0 < scale != float("inf") else float("inf")',
    ): "nothing is above infinity",
    (
        "wasi_export/untrusted/graph.py",
        "if not 0 != (size := path.stat().st_size) <= MAX_BYTES:",
    ): "no size is below 0",
    ("wasi_export/untrusted/graph.py", "if len(set(names)) != len(names):"): "a set is never larger",
    ("wasi_export/untrusted/graph.py", "if depth <= 0:"): "the depth falls by one from above 0",
    (
        "wasi_export/untrusted/graph.py",
        'if not model.HasField("graph") or (opset := max(versions.values(), default= -1)) < 1:',
    ): "both are below 1",
    ("runtimes/accuracy.py", "if len(images) <= 0:"): "no length is below 0",
    (
        "runtimes/significance.py",
        "return max( -1.0, centre - half), min(1.0, centre + half)",
    ): "it is 0 at least: in floats the root of a square is exact",
    (
        "runtimes/validate.py",
        'return check is not None and check.status < "undecided"',
    ): "of all statuses it is the last one in the alphabet",
    (
        "wasi_export/durable.py",
        'remedy = REMEDIES.get(error.errno or 1, "choose another place")',
    ): "nothing else is to be done about error 1",
    (
        "wasi_export/durable.py",
        'remedy = REMEDIES.get(error.errno or -1, "choose another place")',
    ): "no error is below 0",
    (
        "wasi_export/artifact.py",
        'count = len(tensors["labels"]) if "labels" in tensors and tensors["labels"].ndim else 1',
    ): "without labels in a row golden data are refused, whatever their number",
    (
        "wasi_export/artifact.py",
        'count = len(tensors["labels"]) if "labels" in tensors and tensors["labels"].ndim else -1',
    ): "without labels in a row golden data are refused, whatever their number",
    (
        "wasi_export/artifact.py",
        "return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1",
    ): "what is found under a name has one at least",
    (
        "wasi_export/artifact.py",
        'for kind, found, expected in zip(("input", "output"), (facts.inputs, facts.outputs), '
        "wanted, strict=False):",
    ): "all three have two",
    (
        "wasi_export/manifest.py",
        "0 < std != math.inf for std in self.std",
    ): "nothing is above infinity",
    (
        "wasi_export/settings.py",
        'near = difflib.get_close_matches(str(details["loc"][-1]), known, n= 2)',
    ): "the first one is the nearest",
    (
        "wasi_export/settings.py",
        """hint = f"did you mean {near[ -1]!r}?" if near else f"known keys: {', '.join(known)}\"""",
    ): "there is one at most",
    ("wasi_export/settings.py", "model = nested[ -1]"): "no field is of two models",
    (
        "wasi_export/manifest.py",
        "def _created_is_a_time(cls, created: str) -> str:",
    ): "pydantic makes a method of the class of it",
    ("runtimes/significance.py", "if k <= 0:"): "k is counted up from 0",
    (
        "wasi_export/durable.py",
        "return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) >= 0)",
    ): "the call returns 0 or -1",
}
"""By file and the line as it is in the mutant."""


@dataclass(frozen=True)
class Mutant:
    """A file with one bug in it."""

    path: str
    line: int
    before: str
    after: str
    code: str


def main() -> None:
    """Tries the mutants of the files that are named, or of all."""
    parser = new_parser(__doc__)
    parser.add_argument("files", nargs="*", choices=[*SOURCES, []], help="default: all")
    parser.add_argument("--docs", action="store_true", help="write the result into docs/fuzzing.md")
    options = parser.parse_args()
    result = read_result(RESULT, new_result(__doc__, files={}))
    if options.json:
        print(to_json(result))
        return
    if options.docs:
        fill(PAGE, MARK, END, table(result))
        return
    for path in options.files or SOURCES:
        measured = measure(path)
        result = read_result(RESULT, result)  # another process may have added to it
        result["files"][path] = measured
        write_result(RESULT, result)


def measure(path: str) -> dict[str, Any]:
    """Returns how many mutants of a file were killed, and which were not."""
    names, tests = SOURCES[path]
    started = time.monotonic()
    source = (ROOT / path).read_text(encoding="utf-8")
    with quiet():
        code = run_pytest(tests)  # here, so that all that they import is there
    if code != 0:
        sys.exit(f"the tests of {path} do not pass as they are: pytest ends with {code}")
    mutants = list(mutants_of(path, source, names))
    seconds = SECONDS + 3 * (time.monotonic() - started)
    survivors = []
    for mutant in mutants:
        if run(mutant, tests, seconds) == 0:
            reason = EQUIVALENT.get((path, mutant.after))
            survivors.append(
                {"line": mutant.line, "was": mutant.before, "is": mutant.after, "equivalent": reason}
            )
            if reason is None:
                print(f"{path}:{mutant.line}: {mutant.before}  →  {mutant.after}", file=sys.stderr)
    equivalent = sum(survivor["equivalent"] is not None for survivor in survivors)
    killed = len(mutants) - len(survivors)
    print(f"{path}: {killed} of {len(mutants)} killed, {equivalent} equivalent", file=sys.stderr)
    return {"mutants": len(mutants), "killed": killed, "survivors": survivors}


def mutants_of(path: str, source: str, names: tuple[str, ...]) -> Iterator[Mutant]:
    """Yields every mutant of the named functions and classes, or of the whole file."""
    lines = source.splitlines()
    wanted = (
        set(range(len(lines))) if not names else {line for name in names for line in _lines_of(source, name)}
    )
    seen, meaning = set(), _meaning(source)
    for name in sorted(operator_names()):
        if _is_noise(name):
            continue
        for occurrence in range(10_000):
            code = mutate_code(source, get_operator(name)(), occurrence)
            if code is None:
                break
            changed = [
                (index, old, new)
                for index, (old, new) in enumerate(zip(lines, code.splitlines(), strict=False))
                if old != new
            ]
            if not changed or changed[0][0] not in wanted or code in seen:
                continue
            if _meaning(code) in (meaning, None):  # 1e300 and one more; what is no Python
                continue
            seen.add(code)
            index, old, new = changed[0]
            if ("/," in new and "*," in old) or "frozen=False" in new:  # mypy looks at both
                continue
            yield Mutant(path, index + 1, old.strip(), new.strip(), code)


def _meaning(code: str) -> str | None:
    """Returns what the code is to Python; None where it is none."""
    try:
        return ast.dump(ast.parse(code))
    except SyntaxError:
        return None


def _is_noise(operator: str) -> bool:
    """Returns whether an operator makes what nobody would write."""
    kind, *parts = operator.removeprefix("core/").split("_")
    if kind in ("VariableInserter", "VariableReplacer"):
        return True
    if kind == "ReplaceBinaryOperator":
        return tuple(parts) not in _OPPOSITES
    order, identity = {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}, {"Is", "IsNot"}
    return kind == "ReplaceComparisonOperator" and not (
        set(parts) <= order or set(parts) <= identity or set(parts) <= {"In", "NotIn"}
    )


def _lines_of(source: str, name: str) -> range:
    """Returns the lines of a function or class, as `Class.method`, counted from 0."""
    node: Any = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return range(node.lineno - 1, node.end_lineno)


class _Loader(SourceFileLoader):
    """Loads a module from a text that stands for its file."""

    def __init__(self, name: str, mutant: Mutant) -> None:
        super().__init__(name, str(ROOT / mutant.path))
        self._code = mutant.code

    def get_code(self, fullname: str) -> Any:
        return compile(self._code, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module of a mutant, before the one on disk."""

    def __init__(self, mutant: Mutant) -> None:
        parts = Path(mutant.path).with_suffix("").parts
        self.name = ".".join(parts if parts[0] == "wasi_export" else ("wasi_export", *parts))
        self._mutant = mutant

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(fullname, self._mutant))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets nothing be printed."""
    kept = [os.dup(stream) for stream in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    yield
    for stream, old in zip((1, 2), kept, strict=True):
        os.dup2(old, stream)


def run_pytest(tests: tuple[str, ...]) -> int:
    """Returns how pytest ends, in this process."""
    os.chdir(ROOT)
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", IMPORTED_BEFORE, *tests]))


def dependents(name: str) -> set[str]:
    """Returns the modules to import anew: one of ours, what imports it or those, and all of the tests."""
    files = {key: Path(getattr(module, "__file__", None) or "/") for key, module in sys.modules.items()}
    own = {key: file for key, file in files.items() if key.split(".")[0] == "wasi_export" and file.is_file()}
    found, waiting = {key for key, file in files.items() if file.is_relative_to(ROOT / "tests")}, [name]
    while waiting:
        found.add(current := waiting.pop())
        pattern = re.compile(rf"\b{re.escape(current)}\b|from {re.escape(current.rpartition('.')[0])} import")
        waiting += [key for key in own.keys() - found if pattern.search(own[key].read_text(encoding="utf-8"))]
    return found & sys.modules.keys()


def run(mutant: Mutant, tests: tuple[str, ...], seconds: float = 600) -> int:
    """Returns how pytest ends with the mutant in place of its file: 0 where no test notices."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        finder, code = _Finder(mutant), 1
        for name in dependents(finder.name):
            del sys.modules[name]
        sys.meta_path.insert(0, finder)
        try:
            with quiet():
                code = run_pytest(tests)
        finally:
            os._exit(code)  # without what else the parent had to do
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def table(result: dict[str, Any]) -> str:
    """Returns the scores as a table, and the equivalent mutants as a list."""
    rows = ["| file | mutants | killed | equivalent | score |", "| :-- | --: | --: | --: | --: |"]
    notes = []
    for path, found in sorted(result["files"].items()):
        equivalent = [survivor for survivor in found["survivors"] if survivor["equivalent"]]
        score = found["killed"] / (found["mutants"] - len(equivalent))
        rows.append(
            f"| `{path}` | {found['mutants']} | {found['killed']} | {len(equivalent)} | {score:.1%} |"
        )
        notes += [f"- `{path}`: `{survivor['is']}`: {survivor['equivalent']}" for survivor in equivalent]
    mutants = sum(found["mutants"] for found in result["files"].values())
    killed = sum(found["killed"] for found in result["files"].values())
    score = killed / (mutants - len(notes))
    rows.append(f"| **all** | **{mutants}** | **{killed}** | **{len(notes)}** | **{score:.1%}** |")
    return "\n".join((*rows, "", "Equivalent mutants:", "", *notes) if notes else rows)


if __name__ == "__main__":
    main()
