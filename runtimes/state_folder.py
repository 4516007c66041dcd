"""The state of a training on the board, on disk: no committed step is lost, whatever happens.

    state.safetensors       parameters and optimiser state; how far training is, in the header
    previous.safetensors    the commit before
    best.safetensors        after the epoch that did best on held-out images

Each says in its header which training step it is a state of. A commit is written beside, synced, and renamed,
after the old one was renamed to `previous`. So at any moment one of the two is whole, and the folder is read
from the newer one that is. A state that is not whole never takes the place of `previous`, which is all there
is then.

A commit also names the kind of what stands in its header. One of another kind, as `Adapter.save` and `adapt`
write, is not damage: it is neither written over nor passed by, but refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wasi_export.durable import made_folder, sync_folder, write_bytes, writing, written_beside
from wasi_export.errors import ConfigError, IntegrityError, MalformedError
from wasi_export.settings import Frozen
from wasi_export.untrusted.document import parse_document
from wasi_export.untrusted.tensors import read_tensors

STATE, PREVIOUS, BEST = "state.safetensors", "previous.safetensors", "best.safetensors"
_HEADER, _OWNER, _KIND = "progress", "training step", "kind"
P = TypeVar("P", bound=Frozen)
T = TypeVar("T")


class StateFolder(Generic[P]):
    """Reads and writes the folder; `progress` is the type of what stands in the header."""

    def __init__(self, path: Path, progress: type[P], owner: str) -> None:
        """Makes nothing yet; `owner` is the hash of the training step."""
        self.path, self._progress, self._owner = path, progress, owner
        self._kind = progress.__name__

    def commit(self, progress: P, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Writes a state that will be there after a power cut.

        Raises:
            UsageError: the folder cannot be written.
            ConfigError: it has a state of another kind.
        """
        header = {_HEADER: progress.model_dump_json(), _KIND: self._kind, _OWNER: self._owner}
        data = save(dict(tensors), metadata=header)
        state = self.path / STATE
        found = _header(state)
        _require_kind(state, found, self._kind)
        with writing(state), made_folder(self.path), written_beside(state, data) as file:
            if _KIND in found:
                state.replace(self.path / PREVIOUS)
            file.replace(state)
            sync_folder(self.path)

    def keep_best(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Writes the best state so far.

        Raises:
            UsageError: the folder cannot be written.
        """
        write_bytes(self.path / BEST, save(dict(tensors), metadata={_OWNER: self._owner}))

    def read(self) -> tuple[P, dict[str, NDArray[np.float32]]] | None:
        """Returns the newest state that is whole; None where nothing was committed.

        Raises:
            IntegrityError: there are states and none is whole.
            ConfigError: they are of another training step, or the newest is of another kind.
        """
        found = _newest(self.path, self._read)
        if found is not None:
            _require_owner(self.path, found[2], self._owner)
        return None if found is None else found[:2]

    def best(self) -> dict[str, NDArray[np.float32]]:
        """Returns the tensors that `keep_best` wrote last.

        Raises:
            IntegrityError: they are missing or damaged.
        """
        return read_state(self.path / BEST, self._owner)

    def _read(self, path: Path) -> tuple[P, dict[str, NDArray[np.float32]], dict[str, str]]:
        tensors, header = _tensors(path)
        _require_kind(path, header, self._kind)
        try:
            return parse_document(header.get(_HEADER, ""), self._progress), tensors, header
        except MalformedError as error:
            raise IntegrityError(f"{path} is not a state of this program ({error})") from error


def read_state(path: Path, owner: str) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors of a state: of a folder that `adapt` wrote, or of one of its files.

    Raises:
        IntegrityError: there is none, or it is damaged.
        ConfigError: it is of another training step than `owner`.
    """
    found = _tensors(path) if path.is_file() else _newest(path, _tensors) if path.is_dir() else None
    if found is None:
        raise IntegrityError(f"no state at {path}: give the folder that `wasi-export adapt` wrote")
    _require_owner(path, found[1], owner)
    return found[0]


def _newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    """Returns what is read from the newest file that is whole; None where there is no file.

    Raises:
        IntegrityError: there are files and none is whole.
    """
    problems = []
    for path in (folder / STATE, folder / PREVIOUS):
        if path.exists():
            try:
                return read(path)
            except IntegrityError as error:
                problems.append(str(error))
    if problems:
        raise IntegrityError(f"{'; '.join(problems)}: name a new folder")
    return None


def _require_owner(path: Path, header: Mapping[str, str], owner: str) -> None:
    if (got := header.get(_OWNER)) != owner:
        raise ConfigError(
            f"{path} is a state of another bundle (training step {got}, this is {owner}): give the bundle "
            "that it was trained with, or a new folder"
        )


def _require_kind(path: Path, header: Mapping[str, str], kind: str) -> None:
    if (got := header.get(_KIND, kind)) != kind:
        raise ConfigError(
            f"{path} is a state of another kind ({got}, this is {kind}), which is not to be lost: name "
            "another folder"
        )


def _header(path: Path) -> Mapping[str, str]:
    """Returns the header of a file that is as long as it says, else an empty one; no tensor is read."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _tensors(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    try:
        return read_tensors(path)
    except (OSError, MalformedError) as error:
        raise IntegrityError(f"{path} holds no whole state ({error})") from error
