"""Every save, killed before every change that it makes, and cut off by a loss of power: the old or the new.

The cases: save_cases.py; the harnesses: kill_points.py and power_cut.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from power_cut import Recording, recorded, write_out
from save_cases import CASES, UNSYNCED, WRITES, WRONG, found

KILL_POINTS = Path(__file__).with_name("kill_points.py")
KILLED = [name for name in WRITES if not name.endswith("run")]
"""Saves of runs are only cut off: a process with torch takes ten times as long to fork."""


@pytest.fixture(scope="module")
def killed():
    """Returns of every case what is found after a kill before each change."""
    names = sorted({*KILLED, *WRONG} - {"checkpoint"})
    command = [sys.executable, str(KILL_POINTS), *names, "checkpoint"]  # which imports torch
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("name", KILLED)
def test_a_save_that_is_killed_leaves_the_old_or_the_new(killed, name):
    states = [state for _, state, *_ in killed[name]]
    old, new = states[0], states[-1]
    assert states == [old] * states.count(old) + [new] * states.count(new)
    assert old != new
    for call, _, again, left in killed[name][1:]:
        assert (again, left) == (new, []), call  # what was left behind is in nobody's way, and is gone


@pytest.mark.parametrize(("name", "renames"), [("file", 1), ("state", 2), ("damaged state", 1), ("plan", 1)])
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_end(killed, name, renames):
    calls = [call for call, *_ in killed[name] if call in ("open", "write", "fsync", "replace")]
    assert calls == ["open", "write", "fsync", *["replace"] * renames, "open", "fsync"]


@pytest.mark.parametrize("name", WRONG)
def test_kills_find_a_save_that_is_done_in_place(killed, name):
    old, *states, new = [state for _, state, *_ in killed[name]]
    assert any(state not in (old, new) for state in states)


def cut_off(recording: Recording, name: str, folders: pytest.TempPathFactory) -> None:
    """Cuts the power at any moment, with any loss; what is there then must be the old or the new."""
    whole = [found(CASES[name], disk(recording, moment, lambda n: 0, folders)) for moment in (1, None)]

    @settings(max_examples=80, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one_cut(data: st.DataObject) -> None:
        moment = data.draw(st.integers(1, len(recording.events)))
        left = disk(recording, moment, lambda n: data.draw(st.integers(0, n - 1)), folders)
        ended = moment == len(recording.events)
        assert found(CASES[name], left) in (whole[1:] if ended else whole)

    one_cut()


def disk(recording, moment, choose, folders) -> Path:
    folder = folders.mktemp("disk") / "disk"
    events = len(recording.events) if moment is None else moment
    write_out(recording.after_cut(events, choose), recording.root, folder)
    return folder


def record(name: str, folder: Path) -> Recording:
    CASES[name].before(folder)
    return recorded(lambda: CASES[name].write(folder), folder)


@pytest.mark.parametrize("name", WRITES)
def test_a_cut_of_the_power_leaves_the_old_or_the_new_and_nothing_else(name, tmp_path, tmp_path_factory):
    cut_off(record(name, tmp_path), name, tmp_path_factory)


@pytest.mark.parametrize("name", WRONG | UNSYNCED)
def test_a_cut_of_the_power_finds_a_save_that_is_not_synced(name, tmp_path, tmp_path_factory):
    recording = record(name, tmp_path)
    with pytest.raises(AssertionError):
        cut_off(recording, name, tmp_path_factory)
