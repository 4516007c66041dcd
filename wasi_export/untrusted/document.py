"""JSON documents: of the model's shape, not too large, each key once, nothing that a terminal obeys."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from wasi_export.errors import MalformedError

MAX_BYTES = 64 << 20
MAX_NUMBER = 1e300
"""Beyond it no figure of ours is, and sums of it are infinite."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tabs and ends of lines
M = TypeVar("M", bound=BaseModel)


def parse_document(data: bytes | str, kind: type[M], *, any_text: bool = False) -> M:
    """Returns the document, of the given kind.

    What pydantic lets pass is refused as well: a key that stands twice, of which one reader takes the first
    and another the last (RFC 8259, section 4); NaN and Infinity, which are no JSON; and control characters in
    texts, which a terminal obeys, but for `any_text`, of which whoever shows them takes care.

    Raises:
        MalformedError: it is too large, not JSON, or not of that kind.
    """
    if len(data) > MAX_BYTES:
        raise MalformedError(f"it has {len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        document = kind.model_validate_json(data, strict=True)
        found = json.loads(data, **_HOOKS)
        if not any_text:
            _check_texts(found)
    except ValidationError as error:
        raise MalformedError(_first(error)) from None
    except (ValueError, RecursionError) as error:  # of json: bytes that are no text
        raise MalformedError(str(error)) from None
    return document


def read_document(path: Path, kind: type[M], *, any_text: bool = False) -> M:
    """Returns the document in a file, of the given kind, as `parse_document` does.

    Raises:
        MalformedError: it is too large, not JSON, or not of that kind.
        OSError: the file cannot be read.
    """
    return parse_document(read_some(path), kind, any_text=any_text)


def read_some(path: Path) -> bytes:
    """Returns what is in a file, cut off where `parse_document` would refuse it.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise MalformedError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedError(f"{name} is no number")


def _number(text: str) -> float:
    """Returns a number that a float can hold: 1e999 is read as infinity, and an int of 400 digits is none."""
    if not abs(value := float(text)) < MAX_NUMBER:
        _refuse_constant(text[:20])
    return value


_HOOKS: Mapping[str, Any] = {
    "object_pairs_hook": _refuse_twice,
    "parse_constant": _refuse_constant,
    "parse_float": _number,
    "parse_int": _number,
}


def _check_texts(value: Any) -> None:
    """Looks at every text in a document; how deep it is was limited by pydantic."""
    if isinstance(value, str) and _CONTROL.search(value):
        raise MalformedError(f"a text has control characters: {value[:60]!r}")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for part in value if isinstance(value, list) else ():
        _check_texts(part)


def _first(error: ValidationError) -> str:
    """Returns where the first thing is wrong, what it is, and how much more there is."""
    details = error.errors(include_url=False, include_context=False)
    where = ".".join(str(part) for part in details[0]["loc"])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where!r}: {details[0]['msg']}{more}" if where else f"{details[0]['msg']}{more}"
