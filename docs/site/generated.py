"""What the pages show of the code: a line `<!-- generated: NAME -->` becomes what `GENERATED[NAME]` returns.

mkdocs calls `on_page_markdown` for each page. Nothing of it is kept in the repository, so it cannot be stale.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel

from wasi_export.cli._schemas import DOCUMENTS
from wasi_export.config import Config
from wasi_export.errors import WasiExportError

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Returns the page with what is generated in it."""
    return re.sub(r"^<!-- generated: (\w+) -->$", lambda match: GENERATED[match[1]](), markdown, flags=re.M)


def commands() -> str:
    """Returns every command with its arguments and options, as typer writes them."""
    words = [sys.executable, "-m", "typer", "wasi_export.cli", "utils", "docs", "--name", "wasi-export"]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return text[text.index("\n## ") :].replace("][", "]\\[")  # [:port][/folder] is no link


def configuration() -> str:
    """Returns a table of keys for each section of a configuration."""
    return "\n".join(_sections(Config))


def documents() -> str:
    """Returns a table of all JSON documents with their schemas."""
    rows = [f"| [`{name}`](../schemas/{name}.json) | {known.origin} |" for name, known in DOCUMENTS.items()]
    return "\n".join(["| schema | printed or written by |", "| :-- | :-- |", *rows])


def errors() -> str:
    """Returns a table of all errors with their exit codes."""
    rows = [f"| {int(e.exit_code)} | `{e.__name__}` | {e.__doc__} |" for e in _below(WasiExportError)]
    return "\n".join(["| exit code | error | what it means |", "| --: | :-- | :-- |", *rows])


def _below(error: type[WasiExportError]) -> Iterator[type[WasiExportError]]:
    for child in error.__subclasses__():
        yield child
        yield from _below(child)


def _sections(root: type[BaseModel]) -> Iterator[str]:
    """Yields a heading and a table for each section, once for one that is at several places."""
    places: dict[type[BaseModel], list[str]] = {}
    waiting: list[tuple[str, type[BaseModel]]] = [("", root)]
    while waiting:
        place, model = waiting.pop(0)
        places.setdefault(model, []).append(place)
        for name, field in model.model_fields.items():
            if _is_section(field.annotation):
                waiting.append((f"{place}.{name}".strip("."), field.annotation))
    for model, where in places.items():
        if rows := list(_rows(model)):
            heading = ", ".join(f"`[{place}]`" for place in where if place) or "Without a section"
            yield f"## {heading}\n\n{' '.join((model.__doc__ or '').split())}\n"
            yield "\n".join(["| key | values | default | meaning |", "| :-- | :-- | :-- | :-- |", *rows, ""])


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _rows(model: type[BaseModel]) -> Iterator[str]:
    """Yields a row for each key that is a value and no section."""
    for name, schema in model.model_json_schema()["properties"].items():
        if _is_section(model.model_fields[name].annotation):
            continue
        cells = (f"`{name}`", _values(schema), f"`{_toml(schema['default'])}`", schema["description"])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(schema: dict[str, Any]) -> str:
    """Returns what a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{_toml(choice)}`" for choice in choices)
    if items := schema.get("prefixItems"):
        return f"{len(items)} × {_values(items[0])}"
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}"
    bounds = [f"{sign} {schema[bound]}" for bound, sign in BOUNDS.items() if bound in schema]
    return f"{schema.get('format', schema['type'])} {', '.join(bounds)}".strip()


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


GENERATED: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "documents": documents,
    "errors": errors,
}
