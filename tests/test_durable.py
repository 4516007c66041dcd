"""Files and folders that appear whole or not at all; what was left behind; locks. Kills: test_saves.py."""

import ctypes
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from kill_points import on_changes

from wasi_export.durable import (
    fingerprint,
    locked_folder,
    made_folder,
    require_new,
    staged_folder,
    write_bytes,
)
from wasi_export.errors import ArtifactExistsError, UsageError
from wasi_export.locks import LOCK, is_locked


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_written_bytes_replace_a_file_and_leave_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == {"deep", "deep/file.bin"}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UsageError, match=r"cannot write .*: No space left on device: make room; what"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file.bin"}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_exists_is_replaced_only_with_force(tmp_path: Path, exists: bool, force: bool) -> None:
    path = tmp_path / "file"
    if exists:
        path.touch()
    refused = pytest.raises(ArtifactExistsError, match="file exists: choose another name or give --force")
    with refused if exists and not force else nullcontext():
        require_new(path, force=force)


def test_a_disk_that_fails_once_a_file_has_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match=r"cannot write .*file: Input/output error: check the disk"):
        write_bytes(tmp_path / "file", b"new")
    assert names(tmp_path) == {"file"}


def test_others_can_read_what_was_written_whatever_the_mask(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        write_bytes(tmp_path / "file", b"1")
        with staged_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_a_staged_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    destination = tmp_path / "runs" / "out"
    with staged_folder(destination) as folder:
        (folder / "a").write_text("1")
        assert not destination.exists()
    assert names(tmp_path / "runs") == {"out", "out/a"}


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True])
def test_a_staged_folder_is_removed_on_any_error_and_the_old_one_stays(
    tmp_path: Path, stop: type[BaseException], before: bool
) -> None:
    destination = tmp_path / "out"
    if before:
        destination.mkdir()
        (destination / "old").write_text("kept")
    expected = names(tmp_path)

    def fill_and_stop() -> None:
        with staged_folder(destination, force=True) as folder:
            (folder / "half").write_text("1")
            raise stop

    with pytest.raises(stop):
        fill_and_stop()
    assert names(tmp_path) == expected


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_replaced_only_with_force(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "out"
    if kind == "file":
        destination.write_text("old")
    else:
        (destination / "sub").mkdir(parents=True)
    with (
        pytest.raises(ArtifactExistsError, match="exists: choose another name or give --force"),
        staged_folder(destination),
    ):
        raise AssertionError("the body must not run")
    with staged_folder(destination, force=True) as folder:
        (folder / "new").write_text("1")
    assert names(tmp_path) == {"out", "out/new"}


def replace_old_by_new(destination: Path) -> None:
    """Puts a folder with the file `new` over one with the file `old`."""
    destination.mkdir()
    (destination / "old").touch()
    with staged_folder(destination, force=True) as folder:
        (folder / "new").touch()


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_folder_that_is_replaced_is_there_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    destination = tmp_path / "out"
    found = []
    destination.mkdir()
    (destination / "old").touch()
    with staged_folder(Path("out") if is_relative else destination, force=True) as folder:
        (folder / "new").touch()
        on_changes(lambda _: found.append(names(destination)))
    on_changes(None)
    assert found == [{"old"}] * found.count({"old"}) + [{"new"}] * found.count({"new"})
    assert found[0] == {"old"}
    assert found[-1] == {"new"}


WITHOUT_EXCHANGE = [None, SimpleNamespace(renameat2=lambda *_: -1)]  # of the C library, of the file system


@pytest.mark.parametrize("library", WITHOUT_EXCHANGE)
def test_a_folder_is_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    replace_old_by_new(tmp_path / "out")
    assert names(tmp_path) == {"out", "out/new"}


@pytest.mark.parametrize("library", WITHOUT_EXCHANGE)
def test_a_folder_that_cannot_be_replaced_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    rename = os.rename

    def fail(old: Path, new: Path) -> None:
        if Path(old).suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UsageError, match=r"cannot write .*out: Input/output error: check the disk"):
        replace_old_by_new(tmp_path / "out")
    assert names(tmp_path) == {"out", "out/old"}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_that_a_killed_process_took_away_is_brought_back(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / ".out.abcdefgh.old").mkdir()
    (tmp_path / ".out.abcdefgh.old" / "old").touch()
    if is_there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "new").touch()
    with pytest.raises(ArtifactExistsError, match="out exists"), staged_folder(tmp_path / "out"):
        raise AssertionError("the body must not run")
    assert names(tmp_path) == {"out", "out/new" if is_there else "out/old"}


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs").touch()
    (tmp_path / "out").symlink_to("elsewhere", target_is_directory=True)
    with staged_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == {"elsewhere", "elsewhere/theirs", "out", "out/new"}


def test_a_folder_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def record(handle: int) -> None:
        synced.append((Path(f"/proc/self/fd/{handle}").readlink(), (tmp_path / "out").exists()))

    monkeypatch.setattr(os, "fsync", record)
    with staged_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").touch()
        (folder / "b").touch()
    whole = {folder, folder / "sub", folder / "sub" / "a", folder / "b"}
    assert sorted(synced) == sorted([*((path, False) for path in whole), (tmp_path, True)])


@pytest.mark.parametrize(
    ("code", "raised", "message"),
    [
        (errno.ENOSPC, UsageError, r"cannot write .*out: No space left on device: make room"),
        (errno.ENOENT, FileNotFoundError, "No such file"),
    ],
)
def test_an_error_while_a_folder_is_filled_is_of_the_folder_where_it_is_of_the_disk(
    tmp_path: Path, code: int, raised: type[Exception], message: str
) -> None:
    with pytest.raises(raised, match=message), staged_folder(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert names(tmp_path) == set()


def test_an_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("1")
    assert names(tmp_path) == {"out", "out/new"}


@pytest.mark.parametrize("place", [".", "..", "../here"])
def test_the_current_folder_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "work").write_text("mine")
    monkeypatch.chdir(here)
    with (
        pytest.raises(UsageError, match="holds the current folder"),
        staged_folder(Path(place), force=True),
    ):
        raise AssertionError("the body must not run")
    assert names(tmp_path) == {"here", "here/work"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match=r"cannot write .*file/out"),
        staged_folder(tmp_path / "file" / "out"),
    ):
        raise AssertionError("the body must not run")


def test_a_fingerprint_depends_on_every_part_and_on_where_it_ends() -> None:
    assert fingerprint("a", 1) == fingerprint("a", 1)
    assert len({fingerprint("a", 1), fingerprint("a", 2), fingerprint("a1"), fingerprint("", "a", 1)}) == 4
    assert fingerprint("a", 1) == "05a9c569a185ac60"  # states that were written before go on


def test_what_is_renamed_and_not_synced_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fail_for_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(UsageError, match="check the disk; the new one is there, and a power cut may bring"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EIO, "check the disk"), (errno.EROFS, "choose another place"), (errno.EDQUOT, "make room")],
)
def test_an_error_of_the_disk_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(UsageError, match=rf"cannot write .*out: {os.strerror(code)}: {remedy}"),
        staged_folder(tmp_path / "out", force=True) as folder,
    ):
        (folder / "new").write_text("1")
    assert names(tmp_path) == {"out", "out/old"}


def test_folders_that_were_made_are_synced_in_the_ones_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()))
    for _ in range(2):  # the second time there is nothing to make
        with made_folder(tmp_path / "a" / "b"):
            assert synced == [tmp_path / "a", tmp_path]


def test_folders_that_were_made_for_nothing_are_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), staged_folder(tmp_path / "runs" / "deep" / "out"):
        raise ValueError("stop")
    with pytest.raises(ValueError, match="stop"), locked_folder(tmp_path / "work"):
        raise ValueError("stop")
    with pytest.raises(UsageError, match="File name too long"):
        write_bytes(tmp_path / "report" / ("name" * 100), b"1")
    assert names(tmp_path) == set()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".out.abcdefgh.tmp").mkdir()
    (tmp_path / ".out.abcdefgh.tmp" / "half").touch()
    (tmp_path / ".file.abcdefgh.tmp").touch()
    others = {".out.v2.abcdefgh.tmp", ".file.v2.abcdefgh.tmp", ".file.swp", "out.tmp"}
    for name in others:
        (tmp_path / name).touch()
    write_bytes(tmp_path / "file", b"1")
    with staged_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == {"file", "out", *others}


def test_a_file_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from wasi_export.durable import written_beside\n"
        "with written_beside(Path(sys.argv[1]), b'theirs') as file: print(flush=True); input()"
    )
    with running(code, tmp_path / "file"):
        write_bytes(tmp_path / "file", b"ours")
        assert len(list(tmp_path.glob(".file.*.tmp"))) == 1
    write_bytes(tmp_path / "file", b"ours")
    assert names(tmp_path) == {"file"}


HOLD = (
    "import sys; from pathlib import Path; from wasi_export.durable import locked_folder, staged_folder\n"
    "with {held}(Path(sys.argv[1])): print(flush=True); input()"
)


@pytest.mark.parametrize("held", [locked_folder, staged_folder])
def test_a_folder_is_held_by_one_process_and_free_when_it_is_killed(tmp_path: Path, held) -> None:
    folder = tmp_path / "out"
    with running(HOLD.format(held=held.__name__), folder):
        with (
            pytest.raises(UsageError, match="out is in use by another process: wait for it, or"),
            held(folder),
        ):
            pass
        assert is_locked(folder) == (held is locked_folder)
    with held(folder):
        pass
    assert names(tmp_path) == {"out"}


def test_a_child_that_outlives_a_killed_process_has_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from wasi_export.durable import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: print(flush=True); time.sleep(3); os._exit(0)\n"
        "    input()"
    )
    with running(code, tmp_path), pytest.raises(UsageError, match="in use"), locked_folder(tmp_path):
        pass
    with locked_folder(tmp_path):
        pass


def test_who_waits_for_a_folder_gets_it(tmp_path: Path) -> None:
    with running(HOLD.format(held="locked_folder"), tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        with locked_folder(tmp_path, wait=True):
            assert names(tmp_path) == {LOCK}
    assert names(tmp_path) == set()


@contextmanager
def running(code: str, path: Path) -> "Iterator[subprocess.Popen[str]]":
    """Gives a process once it has printed a line; killed at the end."""
    command = [sys.executable, "-c", code, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        try:
            yield process
        finally:
            process.kill()
