"""How settings are read: TOML and `section.key=value` into frozen pydantic models.

What they refuse is told in a line a fault: the key, what was got, and what to do, with the nearest key that
there is.
"""

import difflib
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from wasi_export._extras import require
from wasi_export.errors import ConfigError

OFF = "off"


class Frozen(BaseModel):
    """Base of every configuration and artefact model: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


M = TypeVar("M", bound=Frozen)
_Limit = Annotated[float, Field(gt=0)]
OrOff = Annotated[
    _Limit | None,
    BeforeValidator(
        lambda value: None if value == OFF else value, json_schema_input_type=_Limit | Literal["off"] | None
    ),
]
"""A number above 0, or `off`, which is None: TOML has no null."""


def to_toml(settings: Frozen) -> str:
    """Returns all settings as TOML, from which they can be read again.

    Those that are None are left out, or `off` where that is not what a reader would take without them.

    Raises:
        MissingExtraError: tomli-w is not installed.
    """
    dumps: Callable[[Mapping[str, Any]], str] = require("tomli_w", extra="train").dumps
    return dumps(_said(settings, settings.model_dump(mode="json")))


def _said(settings: Frozen, values: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Frozen):
            said[name] = _said(value, values[name])
        elif value is not None:
            said[name] = values[name]
        elif field.default is not None:
            said[name] = OFF
    return said


def read_toml(path: Path) -> dict[str, Any]:
    """Returns what a TOML file holds.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # not TOML, a number of too many digits, too deep
        raise ConfigError(f"{path} is not TOML: {error}") from error


def parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    """Returns the keys and the value of a `section.key=value`, of TOML; what is not TOML is a string.

    Raises:
        ConfigError: it does not read so.
    """
    dotted, found, text = override.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not found or not all(keys):
        raise ConfigError(f"an override reads section.key=value, got {override!r}")
    try:
        return keys, tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return keys, text


def set_value(values: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Sets a value of nested mappings in place.

    Raises:
        ConfigError: one of the keys but the last is a value.
    """
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} is a value, not a section")
    values[keys[-1]] = value


def deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested mappings as dicts that can be changed without changing them."""
    return {k: deep_copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def validated(model: type[M], values: Mapping[str, Any], *, origin: str) -> M:
    """Returns the settings that the values are; `origin` is where they come from.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    if problem := next(_unusable(values), None):
        raise ConfigError(f"{origin}: {problem}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, details) for details in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def _unusable(value: Any, key: str = "") -> Iterator[str]:
    """Yields a line for each value that TOML has and no setting is: NaN, infinities, dates and times."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key} must be a finite number"
    elif isinstance(value, (date, time)):
        yield f"{key} must not be a date or a time, got {value}: text goes in quotes, as '{key}=\"{value}\"'"
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _unusable(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _unusable(part, key)


def _explain(model: type[Frozen], details: ErrorDetails) -> str:
    """Returns one line for one pydantic error: the key, what was got, what to do."""
    where = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        known = _keys_at(model, details["loc"][:-1])
        near = difflib.get_close_matches(str(details["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}, {hint}"
    message = details["msg"].removeprefix("Value error, ")
    if isinstance(details["input"], Mapping):  # of a section: the message says which of its keys it is about
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {details['input']!r}" if where else message


def _keys_at(model: type[Frozen], location: tuple[int | str, ...]) -> list[str]:
    """Returns the keys of the nested model at a location."""
    for part in location:
        field = model.model_fields.get(str(part))
        candidates = (field.annotation, *get_args(field.annotation)) if field else ()
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, Frozen)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
