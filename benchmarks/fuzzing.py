"""Odd and hostile input for every reader of ours: how much of it was tried, and what was found.

    python benchmarks/fuzzing.py                    # a minute for each reader, added to what was tried before
    python benchmarks/fuzzing.py address --seconds 600
    python benchmarks/fuzzing.py --json             # the result that is there
    python benchmarks/fuzzing.py --docs             # and into docs/fuzzing.md

libFuzzer (through atheris) makes inputs of valid ones, led by the lines of `wasi_export` that they reach; two
of three are changed as the documents that they are (`tests/fuzz/forms.py`). A reader may read an input, or
refuse it with an error of ours. A finding is another error, a hang of more than 5 s, memory above 1 GB, a
file written outside the reader's folder or read outside it, a program that is started, a connection, a pickle
(`tests/fuzz/guard.py`). One input of each kind of finding is kept in the result; it is fixed when the reader
gets that input again and does none of this, which a test looks at every time.
"""

import base64
import json
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kept
from pages import fill

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/fuzz.json"
MEMORY = Path("/dev/shm")
"""Where files are in memory, on Linux."""
ENGINE = ROOT / "tests/fuzz/engine.py"
PAGE, MARK, END = ROOT / "docs/fuzzing.md", "<!-- benchmarks/fuzzing.py -->\n", "<!-- end of fuzzing.py -->"
_RUNS = re.compile(rb"stat::number_of_executed_units: (\d+)")
_ENDED = {70: "hang of more than 5 s", 71: "more than 1 GB of memory"}


def main() -> None:
    """Gives the readers inputs for some time, one reader after another, and adds up."""
    parser = kept.new_parser(__doc__)
    parser.add_argument("readers", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--docs", action="store_true", help="write the result into docs/fuzzing.md")
    options = parser.parse_args()
    if options.json:
        print(kept.to_json(read_result()))
    elif options.docs:
        fill(PAGE, MARK, END, table(read_result()))
    else:
        sys.exit(max(fuzz(name, options.seconds) for name in options.readers or reader_names()))


def read_result() -> dict[str, Any]:
    """Returns what was tried and found so far."""
    return kept.read_result(RESULT, kept.new_result(__doc__, readers={}))


def reader_names() -> list[str]:
    """Returns the readers that there are."""
    return subprocess.run(
        [sys.executable, ENGINE, "--names"], check=True, capture_output=True, text=True
    ).stdout.split()


def fuzz(name: str, seconds: int) -> int:
    """Gives one reader inputs and adds what came of it to the result; returns 1 where something was found."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        findings = Path(folder) / "findings"
        started = time.monotonic()
        ended = subprocess.run(
            [sys.executable, ENGINE, name, findings, f"-max_total_time={seconds}"],
            capture_output=True,
            check=False,
        )
        taken = time.monotonic() - started
        runs = _RUNS.search(ended.stderr)
        if runs is None:
            sys.exit(f"{name} did not begin:\n{ended.stderr.decode(errors='replace')[-2000:]}")
        found = [*_kinds(findings), *_ending(Path(folder), ended.returncode)]
    result = read_result()
    reader = result["readers"].setdefault(name, {"inputs": 0, "seconds": 0.0, "findings": []})
    known = {finding["error"] for finding in reader["findings"]}
    new = [finding for finding in found if finding["error"] not in known]
    reader["inputs"] += int(runs[1])
    reader["seconds"] = round(reader["seconds"] + taken, 1)
    reader["findings"] += new
    kept.write_result(RESULT, result)
    print(f"{name}: {int(runs[1]):,} inputs in {taken:.0f} s, {len(found)} findings", file=sys.stderr)
    for finding in found:
        print(f"  {finding['error']}: {finding['message']}", file=sys.stderr)
    return 1 if found else 0


def _kinds(findings: Path) -> Iterator[dict[str, str]]:
    """Yields the errors that were found, one input for each kind."""
    for line in findings.read_text(encoding="utf-8").splitlines() if findings.exists() else ():
        finding = json.loads(line)
        yield finding | {"input": packed(base64.b64decode(finding["input"]))}


def _ending(folder: Path, code: int) -> Iterator[dict[str, str]]:
    """Yields what ended the process, with the input that libFuzzer left."""
    for file in folder.glob("findings.*") if code else ():
        error = _ENDED.get(code, f"exit code {code}")
        yield {"error": error, "message": file.name.split(".", 1)[1][:20], "input": packed(file.read_bytes())}


def packed(data: bytes) -> str:
    """Returns an input as the result keeps it."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpacked(text: str) -> bytes:
    """Returns an input of the result."""
    return zlib.decompress(base64.b64decode(text))


def table(result: dict[str, Any]) -> str:
    """Returns the figures as a table."""
    rows = ["| reader | inputs | minutes | findings, all fixed |", "| :-- | --: | --: | --: |"]
    readers = result["readers"]
    for name in sorted(readers):
        found = readers[name]
        rows.append(
            f"| {name} | {found['inputs']:,} | {found['seconds'] / 60:.1f} | {len(found['findings'])} |"
        )
    inputs, seconds, findings = (
        sum(of(found) for found in readers.values())
        for of in (lambda f: f["inputs"], lambda f: f["seconds"], lambda f: len(f["findings"]))
    )
    rows.append(f"| **all** | **{inputs:,}** | **{seconds / 60:.1f}** | **{findings}** |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
