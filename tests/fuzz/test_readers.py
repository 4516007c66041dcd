"""A little of what `make fuzz` does at length, on every Python; and that it finds what is to be found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from fuzz.forms import changed_bytes, mutate
from fuzz.planted import CARELESS, FORBIDDEN, prepare
from fuzz.readers import READERS, Reader
from fuzz.trial import Finding, try_input
from fuzzing import read_result, unpacked

pytestmark = pytest.mark.filterwarnings("ignore")
ENGINE = Path(__file__).with_name("engine.py")
INPUTS = {"weights": 20, "metrics": 50, "manifest": 100, "config": 100}
"""For readers that take some milliseconds; the others get 200."""


def findings(reader: Reader, folder: Path, count: int) -> list[Finding]:
    """Gives a reader inputs made of its valid ones, the same on every run."""
    seeds = reader.prepare(folder)
    for seed in seeds:
        reader.read(seed, folder)  # nothing is refused that is right
    found = []
    for index in range(count):
        random = Random(index)
        data = mutate(random.choice(seeds), reader.form, random, lambda old, r=random: changed_bytes(old, r))
        if (finding := try_input(reader, data, folder)) is not None:
            found.append(finding)
    return found


@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_or_refuses_odd_input(name, tmp_path):
    assert findings(READERS[name], tmp_path.resolve(), INPUTS.get(name, 200)) == []


@pytest.mark.parametrize("name", read_result()["readers"])
def test_what_was_found_once_is_read_or_refused(name, tmp_path):
    reader = READERS[name]
    reader.prepare(tmp_path)
    inputs = [unpacked(finding["input"]) for finding in read_result()["readers"][name]["findings"]]
    assert [found for data in inputs if (found := try_input(reader, data, tmp_path.resolve()))] == []


def test_a_planted_bug_is_found(tmp_path):
    found = findings(CARELESS, tmp_path, 1000)
    assert {finding.error for finding in found} == {"ValueError in tests/fuzz/planted.py read_carelessly"}


@pytest.mark.parametrize("event", FORBIDDEN)
def test_what_a_reader_must_not_do_is_found_and_does_not_happen(event, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    found = try_input(Reader("planted", None, prepare, FORBIDDEN[event]), b"", folder)
    assert found is not None
    assert found.error.startswith("ForbiddenError")
    assert found.message.startswith(event.partition(" ")[0])
    assert list(tmp_path.iterdir()) == [folder]
    assert not (folder / "link").is_symlink()


@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris has no wheels for this Python")
def test_a_planted_bug_is_found_by_libfuzzer(tmp_path):
    path = tmp_path / "findings"
    command = [sys.executable, ENGINE, CARELESS.name, path, "-runs=3000", "-seed=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "stat::number_of_executed_units: 3000" in ended.stderr, ended.stderr[-2000:]
    (finding,) = map(json.loads, path.read_text().splitlines())
    assert finding["error"] == "ValueError in tests/fuzz/planted.py read_carelessly"
