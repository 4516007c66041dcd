"""Many runs from one file: a configuration with a table `[sweep]`, whose product of settings are the jobs.

    [sweep]
    model = [{ name = "vit_small_patch16_224" }, { name = "deit_tiny_patch16_224", img_size = 128 }]
    "subspace.fraction" = [0.2, 0.4]
    seed = [0, 1, 2]                  # 2 × 2 × 3 = 12 jobs, the last key changes fastest

A key is a section or a key of the configuration, with a list of values; a table sets several keys together.
The rest of the file is the configuration of all jobs, or `base = "my.toml"` names a file that is. A job has a
folder named after its settings, so a list can grow without anything being done again.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from wasi_export.config import Config
from wasi_export.durable import fingerprint
from wasi_export.errors import ConfigError, UsageError
from wasi_export.settings import read_toml

T = TypeVar("T")
NAME_LENGTH = 120  # of 255 bytes that file systems allow, to leave room for what is put before and after


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    settings: tuple[tuple[str, str], ...]
    """Keys and values, as TOML, on top of the configuration of all jobs."""
    config: Config

    @property
    def name(self) -> str:
        """What the job's folder is called: the settings, as far as a file name can hold them."""
        text = ",".join(f"{key}={value.strip(chr(34))}" for key, value in self.settings)
        name = re.sub(r"[^\w.=,+-]+", "-", text, flags=re.ASCII)[:NAME_LENGTH]
        return name if name == text else f"{name}-{fingerprint(text)[:8]}"


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`, counted from 1, as the tasks of a scheduler's array."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the part that `I/N` means.

        Raises:
            UsageError: it is not of that form, or there is no such part.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--array reads I/N with I from 1 to N, as 1/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[T]) -> tuple[T, ...]:
        """Returns every N-th item, from the I-th on; each item is in one part."""
        return tuple(items[self.index - 1 :: self.count])


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> tuple[Job, ...] | None:
    """Returns the jobs of a sweep, in order; None where the file has no table `[sweep]`.

    Args:
        path: the job file.
        overrides: `section.key=value`, for all jobs, under what the sweep sets.

    Raises:
        ConfigError: the file cannot be read, or the configuration of a job is wrong.
    """
    values = read_toml(path)
    axes = values.pop("sweep", None)
    if axes is None:
        return None
    if not isinstance(axes, Mapping) or not axes:
        raise ConfigError(f"{path}: [sweep] must list values for some keys, got {axes!r}")
    if (base := values.pop("base", None)) is not None:
        if values:
            raise ConfigError(
                f"{path}: with base = {base!r} the configuration is in that file, but [{next(iter(values))}] "
                "is here: give it there, or leave base out"
            )
        values = read_toml(path.parent / str(base))
    jobs: list[Job] = []
    for settings in itertools.product(*(_choices(key, listed, path) for key, listed in axes.items())):
        flat = tuple(setting for choice in settings for setting in choice)
        lines = [*overrides, *(f"{key}={value}" for key, value in flat)]
        job = Job(flat, Config.from_mapping(values, lines, origin=f"{path}, {' '.join(lines)}"))
        if any(job.name == other.name for other in jobs):
            raise ConfigError(f"{path}: [sweep] lists {job.name} twice")
        jobs.append(job)
    return tuple(jobs)


def _choices(key: str, listed: Any, path: Path) -> list[tuple[tuple[str, str], ...]]:
    """Returns the settings of each value of a key."""
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{path}: sweep.{key} must be a list of values, got {listed!r}")
    return [tuple(_settings(key, value)) for value in listed]


def _settings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields dotted keys and values as TOML; a table gives one of each of its keys."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _settings(f"{key}.{name}", inner)
        return
    try:
        yield key, json.dumps(value, ensure_ascii=False)  # of numbers, strings and lists TOML is the same
    except TypeError as error:
        raise ConfigError(f"sweep.{key}: {value!r} is no value of a configuration") from error
