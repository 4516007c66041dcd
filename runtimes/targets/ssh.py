"""A board behind ssh: the user's own client, with the keys, jump hosts and known hosts that it knows.

Below one folder on the board (`~/.cache/wasi-export`, or what the address names) lie the packages, our code
and what was sent, each under a hash of its content, so that it is sent once. A folder there appears whole or
not at all. The board needs sh, tar, gzip and a Python; nothing is installed and nothing outside the folder
is written.
"""

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self
from urllib.parse import urlsplit

from pydantic import ValidationError

from wasi_export.errors import HostError, UsageError
from wasi_export.report import Evidence
from wasi_export.runtimes.targets.packages import base_packages, content_key, own_code
from wasi_export.runtimes.targets.supervise import Supervised
from wasi_export.runtimes.targets.target import Finished, Target, took_too_long

CLIENT = "WASI_EXPORT_SSH"
"""Names another ssh, with its options, as GIT_SSH_COMMAND does for git."""
FOLDER = ".cache/wasi-export"
OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
    *("-o", "ControlMaster=auto", "-o", "ControlPersist=60"),
)
MIN_PYTHON = (3, 11)
SEND_SECONDS, ASK_SECONDS, GRACE_SECONDS = 1800, 60, 60
_LOST = 255  # what ssh itself ends with
_PROBE = (
    "import json,platform,struct,sys;"
    "print(json.dumps([sys.version_info[:2],platform.machine(),8*struct.calcsize('P'),platform.libc_ver()[0]]))"
)
# $1: the folder to make. One that is there was sent before; what comes is read, or this side would fail.
_RECEIVE = """\
set -eu; umask 077
if [ -e "$1" ]; then cat > /dev/null; exit 0; fi
mkdir -p "$(dirname "$1")"
part=$(mktemp -d "$(dirname "$1")/.part-XXXXXX")
trap 'rm -rf "$part"' EXIT; trap 'exit 1' HUP INT TERM
tar -xzf - -C "$part"
mv "$part" "$1"
"""


@dataclass(frozen=True)
class Address:
    """Where a board is: ssh://[user@]host[:port][/folder]."""

    text: str
    host: str
    user: str | None
    port: int | None
    folder: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the parts of an address.

        Raises:
            UsageError: it is none, or has what a shell or ssh could take for something else.
        """
        wrong = UsageError(f"{text!r} is no address of a board: write ssh://[user@]host[:port][/folder]")
        try:
            parts = urlsplit(text)
            host, user, port = parts.hostname, parts.username, parts.port
        except ValueError as error:
            raise wrong from error
        if parts.scheme != "ssh" or parts.password is not None or parts.query or parts.fragment:
            raise wrong
        if not host or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.:_-]*", host):
            raise wrong
        if user is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", user):
            raise wrong
        if re.search(r"[\x00-\x1f]", text):
            raise wrong
        return cls(text, host, user, port, parts.path if len(parts.path) > 1 else FOLDER)

    def __str__(self) -> str:
        """Returns it as ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host


class SshTarget(Target):
    """A board, for as long as the context lasts."""

    def __init__(self, address: Address) -> None:
        """Connects, and brings what is needed.

        Raises:
            HostError: the board cannot be reached, or cannot run our programs.
        """
        self.name, self._address = address.text, address
        self.evidence: Evidence = "device"
        client, port = _client(), ("-p", str(address.port)) if address.port else ()
        # /tmp: the path of a socket has 108 characters, and TMPDIR may be long.
        self._sockets = tempfile.TemporaryDirectory(prefix="wx-", dir="/tmp")
        self._ssh = (*client, *OPTIONS, "-o", f"ControlPath={self._sockets.name}/%C", *port)
        try:
            self._folder = self._ask('mkdir -p -- "$1" && cd -- "$1" && pwd', address.folder).strip()
            python, machine = self._probe()
            self._paths = [self._bring(base_packages(python, machine)), self._bring(own_code())]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection."""
        end = [*self._ssh, "-O", "exit", "--", str(self._address)]
        subprocess.run(end, capture_output=True, check=False)
        self._sockets.cleanup()

    def send(self, path: Path) -> str:
        """Returns where a file or folder is on the board, sent where its content is not there yet.

        Raises:
            HostError: the connection is lost, or the board has no room.
        """
        path = path.resolve()
        folder = f"{self._folder}/sent/{content_key(path)}"
        self._send(folder, path, path.name)
        return f"{folder}/{path.name}"

    def folder(self, name: str) -> str:
        """Returns a folder on the board, which is made, for what is written there under a name."""
        folder = f"{self._folder}/folders/{name}"
        self._ask('mkdir -p -- "$1"', folder)
        return folder

    def remove(self, there: str) -> None:
        """Removes a folder of the board."""
        self._ask('rm -rf -- "$1"', there)

    def fetch(self, there: str, here: Path) -> None:
        """Copies what is in a folder of the board into one of this machine, which is made.

        Raises:
            HostError: the connection is lost.
        """
        archive = self._remote('tar -czf - -C "$1" .', there, seconds=SEND_SECONDS)
        here.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
            files.extractall(here, filter="data")

    def run(self, arguments: Sequence[str], *, seconds: float) -> Finished:
        """Runs Python on the board, alone and watched.

        Raises:
            HostError: the connection is lost, another program of ours runs there, or it took longer.
        """
        module = ("-m", "wasi_export.runtimes.targets.supervise", f"{seconds:g}", f"{self._folder}/lock")
        environment = (f"PYTHONPATH={':'.join(self._paths)}", "PYTHONNOUSERSITE=1", "PYTHONSAFEPATH=1")
        ended = self._call(
            shlex.join(["exec", "env", *environment, "python3", *module, *arguments]),
            seconds=seconds + GRACE_SECONDS,
        )
        try:
            found = Supervised.model_validate_json(ended.stdout)
        except ValidationError:
            return Finished(ended.returncode, "", ended.stderr.decode(errors="replace"))
        if found.ended_by:
            raise HostError(f"{took_too_long(self.name, arguments, seconds)}: {found.ended_by}")
        return Finished(found.code, found.stdout, ended.stderr.decode(errors="replace"), found.board)

    def _probe(self) -> tuple[tuple[int, int], str]:
        """Returns version and architecture of the board's Python.

        Raises:
            HostError: there is none, or none that our wheels are for.
        """
        try:
            version, machine, bits, libc = json.loads(self._ask('exec python3 -c "$1"', _PROBE))
        except ValueError as error:
            raise HostError(f"python3 on {self.name} does not tell what it is: {error}") from error
        if bits != 64:
            raise HostError(
                f"{self.name} has a {bits}-bit Python on {machine}, and onnxruntime has no wheels for that: "
                "install a 64-bit system (Raspberry Pi OS 64-bit)"
            )
        if libc != "glibc" or machine not in ("aarch64", "x86_64"):
            raise HostError(f"{self.name} is {machine} with {libc or 'another libc than glibc'}: no wheels")
        if tuple(version) < MIN_PYTHON:
            raise HostError(f"{self.name} has Python {version[0]}.{version[1]}: 3.11 or newer is needed")
        return (version[0], version[1]), machine

    def _bring(self, folder: Path) -> str:
        """Returns where a folder is on the board that has its content in its name."""
        there = f"{self._folder}/{folder.name}"
        self._send(there, folder, ".")
        return there

    def _send(self, there: str, path: Path, name: str) -> None:
        """Makes a folder on the board, with a file or folder in it under a name."""
        if self._ask('if [ -e "$1" ]; then echo there; fi', there):
            return

        def write(stdin: IO[bytes]) -> None:
            with (
                gzip.GzipFile(fileobj=stdin, mode="wb", compresslevel=1) as packed,
                tarfile.open(fileobj=packed, mode="w|") as archive,
            ):
                archive.add(path, arcname=name)

        self._remote(_RECEIVE, there, seconds=SEND_SECONDS, write=write)

    def _ask(self, script: str, *arguments: str) -> str:
        return self._remote(script, *arguments, seconds=ASK_SECONDS).decode(errors="replace")

    def _remote(
        self,
        script: str,
        *arguments: str,
        seconds: float,
        write: Callable[[IO[bytes]], None] | None = None,
    ) -> bytes:
        """Returns what a script of sh says on the board.

        Raises:
            HostError: it failed, or the connection is lost.
        """
        command = shlex.join(["sh", "-c", script, "sh", *arguments])
        ended = self._call(command, seconds=seconds, write=write)
        if ended.returncode != 0:
            lines = ended.stderr.decode(errors="replace").strip().splitlines()
            line = next(
                (line for line in reversed(lines) if "Exiting with failure" not in line), "no message"
            )
            raise HostError(f"{self.name}: {line}: {_remedy(ended.returncode, line)}")
        return ended.stdout

    def _call(
        self, command: str, *, seconds: float, write: Callable[[IO[bytes]], None] | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        """Returns how a command ended on the board, whose stdin stays open until then.

        Raises:
            HostError: it took longer, or the connection is lost.
        """
        words = [*self._ssh, "--", str(self._address), command]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe) as child:
            assert child.stdin
            stdin, child.stdin = child.stdin, None  # communicate() would close it, and the board would stop
            writer = threading.Thread(target=_write, args=(write, stdin), daemon=True)
            writer.start()
            try:
                stdout, stderr = child.communicate(timeout=seconds)
            except BaseException as error:
                child.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise HostError(f"{self.name} did not answer within {seconds:g} s: is it busy?") from None
                raise
            finally:
                with contextlib.suppress(OSError):
                    stdin.close()
        if child.returncode == _LOST:
            last = (stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise HostError(
                f"no connection to {self.name}: {last}: does `{shlex.join(words[:-1])}` work by itself?"
            )
        return subprocess.CompletedProcess(words, child.returncode, stdout, stderr)


def _client() -> list[str]:
    """Returns the words that call ssh."""
    given = os.environ.get(CLIENT, "ssh")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise UsageError(f"{CLIENT} is no command: {given!r}: {error}") from error


def _write(write: Callable[[IO[bytes]], None] | None, stdin: IO[bytes]) -> None:
    """Sends what is to be sent; where the other side has given up, its own message tells why."""
    if write is not None:
        with contextlib.suppress(OSError, ValueError):
            write(stdin)
            stdin.close()


def _remedy(code: int, message: str) -> str:
    """Returns what helps against how a script ended."""
    if "No space left" in message or "quota" in message.lower():
        return "make room on the board, or name another folder: ssh://host/folder"
    if code == 127:
        return "install it on the board"
    return "look at the board"
