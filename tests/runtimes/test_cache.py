"""Our cache: where it is, and that nothing in it is half made."""

import pytest

from wasi_export.errors import HostError
from wasi_export.runtimes.cache import cache_folder, made_once


def test_the_cache_is_in_the_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "wasi-export"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "wasi-export"


def test_a_folder_is_made_once_and_whole(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").write_text("whole")

    for _ in range(2):
        assert (made_once(tmp_path / "cache" / "name", make) / "file").read_text() == "whole"
    assert len(made) == 1


def test_a_folder_that_fails_is_not_there(tmp_path):
    def make(folder):
        (folder / "half").write_text("")
        raise HostError("no network")

    with pytest.raises(HostError, match="no network"):
        made_once(tmp_path / "name", make)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_says_what_helps(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="XDG_CACHE_HOME"):
        made_once(tmp_path / "file" / "name", lambda folder: None)
