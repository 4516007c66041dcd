"""The result that a benchmark keeps in `benchmarks/results/`, and the option that prints it."""

import argparse
import json
from pathlib import Path
from typing import Any

from wasi_export.durable import write_bytes
from wasi_export.runtimes.host import describe_host


def new_parser(doc: str) -> argparse.ArgumentParser:
    """Returns a parser that shows the docstring as it is, and has `--json`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result")
    return parser


def new_result(doc: str, **facts: Any) -> dict[str, Any]:
    """Returns the beginning of a result: what is measured and how, the machine, and what else is given."""
    return {"protocol": doc, "host": describe_host().model_dump(mode="json"), **facts}


def read_result(path: Path, new: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the result that is kept, or the new one where there is none."""
    if new is not None and not path.exists():
        return new
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    write_bytes(path, to_json(result).encode() + b"\n")


def to_json(result: dict[str, Any]) -> str:
    """Returns a result as it is kept and printed."""
    return json.dumps(result, indent=1)
