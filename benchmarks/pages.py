"""Puts what a benchmark found into a page of the documentation."""

from pathlib import Path

from wasi_export.durable import write_bytes


def fill(page: Path, mark: str, end: str, text: str) -> None:
    """Replaces what stands between two marks of a page, which is written whole or not at all."""
    old = page.read_text(encoding="utf-8")
    start, stop = old.index(mark) + len(mark), old.index(end)
    write_bytes(page, f"{old[:start]}{text}\n{old[stop:]}".encode())
