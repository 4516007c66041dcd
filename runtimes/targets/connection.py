"""A connection to a board: by the ssh client of the user, with the keys, jump hosts and known hosts it knows.

Words for the board are quoted for its shell, and stdin over there stays open until a command has ended: it
ends early only where this side is gone.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Self
from urllib.parse import urlsplit

from wasi_export.errors import HostError, UsageError

CLIENT = "WASI_EXPORT_SSH"
"""Names another ssh, with its options, as GIT_SSH_COMMAND does for git."""
FOLDER = ".cache/wasi-export"
OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
    *("-o", "ControlMaster=auto", "-o", "ControlPersist=60"),
)
ASK_SECONDS = 60
_LOST = 255  # what ssh itself ends with

Write = Callable[[IO[bytes]], None]


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
        if re.search(r"[\x00-\x1f:]", parts.path) or re.search(r"[\x00-\x1f]", text):
            raise wrong
        return cls(text, host, user, port, parts.path if len(parts.path) > 1 else FOLDER)

    def __str__(self) -> str:
        """Returns it as ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host


class Connection:
    """Runs commands on a board, over one connection that is kept."""

    def __init__(self, address: Address) -> None:
        """Prepares it; the first command connects.

        Raises:
            UsageError: WASI_EXPORT_SSH is no command.
            HostError: there is no ssh client.
        """
        self.name, self._host = address.text, str(address)
        client, port = _client(), ("-p", str(address.port)) if address.port else ()
        # /tmp: the path of a socket has 108 characters, and TMPDIR may be long.
        self._sockets = tempfile.TemporaryDirectory(prefix="wx-", dir="/tmp")
        self._short = shlex.join([*client, *port, self._host])
        self._ssh = (*client, *OPTIONS, "-o", f"ControlPath={self._sockets.name}/%C", *port)

    def close(self) -> None:
        """Ends the connection."""
        subprocess.run([*self._ssh, "-O", "exit", "--", self._host], capture_output=True, check=False)
        self._sockets.cleanup()

    def ask(self, script: str, *arguments: str) -> str:
        """Returns what a script of sh says on the board, at once.

        Raises:
            HostError: it failed, or the connection is lost.
        """
        return self.script(script, *arguments, seconds=ASK_SECONDS).decode(errors="replace")

    def script(
        self,
        script: str,
        *arguments: str,
        seconds: float,
        write: Write | None = None,
    ) -> bytes:
        """Returns what a script of sh says on the board.

        Raises:
            HostError: it failed, or the connection is lost.
        """
        command = shlex.join(["sh", "-c", script, "sh", *arguments])
        ended = self.call(command, seconds=seconds, write=write)
        if ended.returncode != 0:
            lines = ended.stderr.decode(errors="replace").strip().splitlines()
            line = next(
                (line for line in reversed(lines) if "Exiting with failure" not in line), "no message"
            )
            raise HostError(f"{self.name}: {line}: {_remedy(ended.returncode, line)}")
        return ended.stdout

    def call(
        self, command: str, *, seconds: float, write: Write | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        """Returns how a command ended on the board, whose stdin stays open until then.

        Raises:
            HostError: it took longer, or the connection is lost.
        """
        words = [*self._ssh, "--", self._host, command]
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
            raise HostError(f"no connection to {self.name}: {last}: does `{self._short}` work by itself?")
        return subprocess.CompletedProcess(words, child.returncode, stdout, stderr)


def _client() -> list[str]:
    """Returns the words that call ssh."""
    given = os.environ.get(CLIENT, "ssh")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise UsageError(f"{CLIENT} is no command: {given!r}: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise HostError(f"no ssh client {given!r}: install openssh-client, or name one with {CLIENT}")
    return words


def _write(write: Write | None, stdin: IO[bytes]) -> None:
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
