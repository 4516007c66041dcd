"""What may be on the disk after the power was cut during a save: a model of it, in memory.

A save is recorded as states of a folder, one before each call that changes something, and the syncs between
them. From these follow the operations: the contents of a file changed, or names of folders did, those that
one call changed together being one operation, as a rename is on every journalling file system. Then, where
the power is cut at any moment,

    contents    of a file are those of its last sync, or any later ones, or the first half of them, or nothing
    names       changed since the last sync of their folder may be as they were, in any subset in which an
                operation is kept only with the earlier ones on the same names

which is more than any file system of today may lose: ext4 and xfs keep names in order.

A folder is a mapping of names to inodes here, a file its bytes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from kill_points import on_changes

Node = bytes | dict[str, int]
State = dict[int, Node]
Choose = Callable[[int], int]
"""Returns a number below the one that is given; 0 for what loses nothing."""


class Sync(NamedTuple):
    """A file or folder was synced."""

    inode: int


class Recording(NamedTuple):
    """Of a save: the folder, and what happened."""

    root: int
    events: list[State | Sync]

    def after_cut(self, moment: int, choose: Choose) -> State:
        """Returns what is on the disk where the power was cut after so many events, by what is chosen."""
        disk: State = {}
        seen: State = {}
        names: list[dict[tuple[int, str], int | None]] = []
        contents: dict[int, list[bytes]] = {}
        for event in self.events[:moment]:
            if isinstance(event, Sync):
                if event.inode in contents:
                    contents[event.inode] = contents[event.inode][-1:]
                kept, names = names, []
                for operation in kept:  # on the disk, with the earlier ones on the same names
                    on_disk = any(folder == event.inode for folder, _ in operation)
                    _apply(disk, operation) if on_disk else names.append(operation)
                continue
            for inode, node in event.items():
                if isinstance(node, bytes) and seen.get(inode) != node:
                    contents.setdefault(inode, [b""]).append(node)
            changed = _changed_names(seen, event)
            if not seen:  # what was there before has been there for long
                contents = {inode: versions[-1:] for inode, versions in contents.items()}
                _apply(disk, changed)
            elif changed:
                names.append(changed)
            seen = event
        lost: set[tuple[int, str]] = set()
        for operation in names:
            if lost & operation.keys() or choose(2):
                lost |= operation.keys()
            else:
                _apply(disk, operation)
        for inode, versions in contents.items():
            if len(versions) == 1:
                disk[inode] = versions[0]
            else:
                torn = [version[: len(version) // 2] for version in versions]
                disk[inode] = [*reversed(versions), *torn][choose(2 * len(versions))]
        return disk


def recorded(save: Callable[[], None], root: Path) -> Recording:
    """Saves below a folder, and returns what happened there."""
    events: list[State | Sync] = []
    held: dict[int, int] = {}  # open files, so that no inode is used again

    def look() -> None:
        state: State = {}
        _read(root, state, held)
        if not events or events[-1] != state:
            events.append(state)

    def sync(handle: int) -> None:
        look()
        events.append(Sync(os.fstat(handle).st_ino))

    try:
        with patch("os.fsync", sync):
            on_changes(lambda name: look())
            try:
                save()
            finally:
                on_changes(None)
        look()
    finally:
        for handle in held.values():
            os.close(handle)
    return Recording(root.stat().st_ino, events)


def write_out(disk: State, inode: int, folder: Path) -> None:
    """Makes a folder as it is on the disk."""
    folder.mkdir()
    entries = disk.get(inode, {})
    assert isinstance(entries, dict)
    for name, child in entries.items():
        node = disk.get(child, {})
        if isinstance(node, bytes):
            (folder / name).write_bytes(node)
        else:
            write_out(disk, child, folder / name)


def _read(path: Path, state: State, held: dict[int, int]) -> int:
    inode = path.stat().st_ino
    if inode not in held:
        held[inode] = os.open(path, os.O_RDONLY)
    if path.is_dir():
        state[inode] = {child.name: _read(child, state, held) for child in path.iterdir()}
    else:
        state[inode] = path.read_bytes()
    return inode


def _changed_names(before: State, after: State) -> dict[tuple[int, str], int | None]:
    """Returns what names of which folders stand for now, where that has changed."""
    changed: dict[tuple[int, str], int | None] = {}
    for inode in before.keys() | after.keys():
        old, new = before.get(inode, {}), after.get(inode, {})
        if isinstance(old, dict) and isinstance(new, dict):
            for name in old.keys() | new.keys():
                if old.get(name) != new.get(name):
                    changed[inode, name] = new.get(name)
    return changed


def _apply(disk: State, operation: dict[tuple[int, str], int | None]) -> None:
    for (folder, name), inode in operation.items():
        entries = disk.setdefault(folder, {})
        assert isinstance(entries, dict)
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode
