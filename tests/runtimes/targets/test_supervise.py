"""Programs that are run alone, for a limited time, and only while somebody waits; on this machine."""

import subprocess
import sys
import time

import psutil
import pytest

from wasi_export.runtimes.targets.supervise import Supervised

SLEEPS_IN_A_CHILD = (
    "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    ".pid, flush=True); import time; time.sleep(600)"
)


@pytest.fixture
def start(tmp_path):
    """Starts the program with a stdin that stays open until it is closed."""
    running = []

    def begin(*arguments, seconds=60):
        words = [sys.executable, "-m", "wasi_export.runtimes.targets.supervise", str(seconds)]
        pipe = subprocess.PIPE
        child = subprocess.Popen(
            [*words, str(tmp_path / "lock"), *arguments], stdin=pipe, stdout=pipe, stderr=pipe
        )
        running.append(child)
        return child

    yield begin
    for child in running:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            stream.close()


def result_of(child) -> Supervised:
    output = child.stdout.read()
    child.wait(30)
    return Supervised.model_validate_json(output)


def ends(pid: int) -> bool:
    """Returns whether a process ends within seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_a_program_that_ends_has_its_output_and_code(start):
    found = result_of(start("-c", "import sys; print('out'); sys.exit(3)"))
    assert (found.code, found.stdout, found.ended_by) == (3, "out\n", "")
    assert found.board.samples


def test_a_program_that_takes_too_long_is_killed_with_its_children(start):
    found = result_of(start("-c", SLEEPS_IN_A_CHILD, seconds=2))
    assert found.ended_by == "its time was over"
    assert ends(int(found.stdout))


def test_a_program_that_nobody_waits_for_is_killed_with_its_children(start):
    child = start("-c", SLEEPS_IN_A_CHILD)
    time.sleep(3)
    child.stdin.close()
    found = result_of(child)
    assert found.ended_by == "nobody waited for it"
    assert ends(int(found.stdout))


def test_only_one_program_runs_at_a_time(start):
    first = start("-c", "import time; print('on', flush=True); time.sleep(600)")
    time.sleep(3)
    second = start("-c", "print('never')")
    assert second.wait(30) == 3
    assert b"runs another program" in second.stderr.read()
    first.stdin.close()
    assert result_of(first).stdout == "on\n"
    assert result_of(start("-c", "print('now')")).stdout == "now\n"
