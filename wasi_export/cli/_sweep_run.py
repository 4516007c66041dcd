"""Runs jobs of a sweep, each in a process of its own: what ends one does not end the others.

    out/ SETTINGS/          all of one job, as `wasi-export run` leaves it
         dense-KEY/         a dense run; jobs whose dense stage is the same share it, the first one trains it
         sweep.json, .md    the merged table

Several parts may work in one folder at the same time, from several machines that share it.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import typer

from wasi_export.cli._console import VERBOSITY, note, one_line
from wasi_export.cli._pipeline import Pipeline
from wasi_export.cli._summary import RunSummary
from wasi_export.cli._sweep import Job
from wasi_export.durable import write_bytes
from wasi_export.errors import ExitCode, WasiExportError, worst
from wasi_export.locks import is_locked

JOB_CONFIG = "config.toml"
VERBOSITY_FLAGS = {"quiet": ("--quiet",), "normal": (), "verbose": ("--verbose",)}


def finished_job(job: Job, folder: Path) -> RunSummary | None:
    """Returns the summary of a job of the sweep in a folder; None where it is not finished.

    Raises:
        DataError: its images cannot be read.
        IntegrityError: its folder does not hold what was written.
    """
    return Pipeline(job.config, folder / job.name).finished()


def run_jobs(jobs: Sequence[Job], folder: Path) -> int:
    """Runs the jobs that are not finished, one after the other; returns the worst of their exit codes.

    A job that another process is working on is left to it. One that fails, or cannot even begin, does not
    stop the others.

    Raises:
        KeyboardInterrupt: a signal came; it was passed on to the job, which can be resumed.
    """
    codes = []
    for number, job in enumerate(jobs, start=1):
        title = f"[{number}/{len(jobs)}] {job.name}"
        try:
            codes.append(_run_job(job, folder, title))
        except WasiExportError as error:
            typer.echo(f"{title}: error: {one_line(error)}", err=True)
            codes.append(int(error.exit_code))
    return worst(codes)


def _run_job(job: Job, folder: Path, title: str) -> int:
    """Runs a job that is not finished, in a process of its own; returns its exit code.

    Raises:
        WasiExportError: it cannot begin, as its images cannot be read or its folder is damaged.
        KeyboardInterrupt: a signal came.
    """
    job_folder = folder / job.name
    pipeline = Pipeline(job.config, job_folder)
    if (summary := pipeline.finished()) is not None:
        note(f"{title}: finished already, {summary.verdict}")
        return summary.exit_code
    if is_locked(job_folder):
        note(f"{title}: another process is running it")
        return int(ExitCode.PASSED)
    note(title)
    config = job_folder / JOB_CONFIG
    write_bytes(config, job.config.to_toml().encode())
    dense = folder / f"dense-{pipeline.keys.dense}"
    flags = VERBOSITY_FLAGS[VERBOSITY.get()]
    code = _run_command((*flags, "run", str(config), "--out", str(job_folder), "--dense", str(dense)))
    if code != ExitCode.PASSED:
        note(f"{title}: ended with exit code {code}")
    return code


def _run_command(arguments: Sequence[str]) -> int:
    """Returns the exit code of one of our commands; of one that a signal killed, 128 and the signal's number.

    SIGINT and SIGTERM are passed on. The command is a session of its own, so that Ctrl-C in a terminal
    reaches it once and not twice: twice means at once.

    Raises:
        KeyboardInterrupt: a signal came, and the command has ended.
    """
    process: subprocess.Popen[bytes] | None = None
    received = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "wasi_export", *arguments],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        for number in received:  # between the handlers and the process
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt("interrupted: the same command goes on")
    return code if code >= 0 else 128 - code
