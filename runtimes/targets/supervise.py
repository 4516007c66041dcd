"""Runs a program on a board: alone, for a limited time, watched, and not longer than anybody waits for it.

    python -m wasi_export.runtimes.targets.supervise SECONDS LOCK ARGUMENTS...

starts this Python with the arguments. Only one such program runs at a time for a lock file. It is ended, with
all that it started, when its time is over and when stdin ends: the connection is lost, or the other side has
given up; it is told first, so that it can save. On stdout comes one JSON document; stderr is its own.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from wasi_export.errors import ExitCode
from wasi_export.report import BoardRun
from wasi_export.runtimes.targets.board import Watch
from wasi_export.settings import Frozen

SAVE_SECONDS = 15


class Supervised(Frozen):
    """How the program ended."""

    code: int
    stdout: str
    ended_by: str
    """Empty: itself."""
    board: BoardRun


def supervise(seconds: float, lock: Path, arguments: list[str]) -> Supervised | None:
    """Returns how a program ended; None where another one has the lock."""
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        watch, reasons = Watch(), []
        # Its output goes into a file: a pipe that nobody reads would stop it.
        with tempfile.TemporaryFile() as output:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                start_new_session=True,
                close_fds=True,
            )

            def stop_when_alone() -> None:
                while os.read(0, 4096):
                    pass
                reasons.append("nobody waited for it")
                end(child)

            threading.Thread(target=stop_when_alone, daemon=True).start()
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                reasons.append("its time was over")
            end(child)
            code = child.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
        return Supervised(code=code, stdout=text, ended_by=(reasons or [""])[0], board=watch.end())


def end(child: "subprocess.Popen[bytes]") -> None:
    """Ends a program that leads a session, with all that it started; `adapt` saves at the first signal."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(SAVE_SECONDS)


if __name__ == "__main__":
    supervised = supervise(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    if supervised is None:
        sys.stderr.write("error: the board runs another program of wasi-export: wait for it\n")
        sys.exit(int(ExitCode.HOST))
    sys.stdout.write(supervised.model_dump_json())
