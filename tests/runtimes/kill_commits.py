"""What test_state_folder.py runs: a write is killed at every point, and the folder is read after each.

    python kill_commits.py CASE FOLDER

prints a JSON list of [function, what is found after a kill before it]: the step that is read, null where
there is none, or the error. The process that writes is killed before its first call of the system or of a
file, then before its second one, and so on until it ends by itself. It is a fork, so that a hundred take a
second or two.
"""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from wasi_export.config import Frozen
from wasi_export.errors import WasiExportError
from wasi_export.runtimes.state_folder import PREVIOUS, STATE, StateFolder

OWNER = "this one"


class Step(Frozen):
    step: int


def tensors(value):
    return {"blocks.0.left": np.full((2, 3), value, np.float32)}


def prepare(case, path):
    """Writes steps 1 and 2 as the case has them."""
    folder = StateFolder(path, Step, OWNER)
    if case == "first":
        return
    for step in (1, 2):
        folder.commit(Step(step=step), tensors(step))
        folder.keep_best(tensors(step))
    if case == "damaged":
        (path / STATE).write_bytes((path / STATE).read_bytes()[:-1])
    elif case == "missing":
        (path / STATE).unlink()


def write(case, path):
    if case == "in place":  # how not to do it
        (path / STATE).write_bytes((path / STATE).read_bytes())
        return
    folder = StateFolder(path, Step, OWNER)
    if case == "best":
        folder.keep_best(tensors(3))
    else:
        folder.commit(Step(step=3), tensors(3))


def killed_at(call, case, path):
    """Writes in a child that is killed before its call of this number; returns its name, "" at the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame, event, function):
            nonlocal calls
            is_file = isinstance(getattr(function, "__self__", None), io.IOBase)
            if event == "c_call" and (is_file or function.__module__ == "posix"):
                calls += 1
                if calls == call:
                    os.write(writer, function.__name__.encode())
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        write(case, path)
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reader, "rb") as pipe:
        name = pipe.read().decode()
    assert status == (signal.SIGKILL if name else 0)
    return name


def found(case, path):
    """Returns what a new process would go on with."""
    folder = StateFolder(path, Step, OWNER)
    try:
        if case == "best":
            return float(folder.best()["blocks.0.left"][0, 0])
        state = folder.read()
        if state is None:
            return None
        progress, tensor = state[0], state[1]["blocks.0.left"]
        assert (tensor == progress.step).all()
        folder.clean()
        assert {file.name for file in path.iterdir()} <= {STATE, PREVIOUS, "best.safetensors"}
        folder.commit(Step(step=4), tensors(4))  # what was left behind is in nobody's way
        assert folder.read()[0].step == 4
        return progress.step
    except WasiExportError as error:
        return str(error)


def main():
    case, work = sys.argv[1], Path(sys.argv[2])
    prepare(case, work / "before")
    results, call, name = [], 0, None
    while name != "":
        call += 1
        path = work / str(call)
        if (work / "before").exists():
            shutil.copytree(work / "before", path)
        name = killed_at(call, case, path)
        results.append((name, found(case, path)))
        shutil.rmtree(path, ignore_errors=True)
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
