"""A board behind ssh.

Below one folder on the board (`~/.cache/wasi-export`, or what the address names) lie the packages, our code
and what was sent, each under a hash of its content, so that it is sent once. A folder there appears whole or
not at all. The board needs sh, tar, gzip and a Python; nothing is installed and nothing outside the folder
is written.
"""

import gzip
import io
import json
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import ValidationError

from wasi_export.errors import HostError
from wasi_export.report import Evidence
from wasi_export.runtimes.targets.connection import Address, Connection
from wasi_export.runtimes.targets.packages import base_packages, content_key, own_code
from wasi_export.runtimes.targets.supervise import Supervised
from wasi_export.runtimes.targets.target import Finished, Target, took_too_long

MIN_PYTHON = (3, 11)
SEND_SECONDS, GRACE_SECONDS = 1800, 60
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
mv -T "$part" "$1" 2> /dev/null || [ -e "$1" ]  # another one may have been faster
"""


class SshTarget(Target):
    """A board, for as long as the context lasts."""

    def __init__(self, address: Address) -> None:
        """Connects, and brings what is needed.

        Raises:
            HostError: the board cannot be reached, or cannot run our programs.
        """
        self.name = address.text
        self.evidence: Evidence = "device"
        self._connection = Connection(address)
        try:
            self._folder = self._connection.ask(
                'mkdir -p -- "$1" && cd -- "$1" && pwd', address.folder
            ).strip()
            python, machine = self._probe()
            self._paths = [self._bring(base_packages(python, machine)), self._bring(own_code())]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

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
        self._connection.ask('mkdir -p -- "$1"', folder)
        return folder

    def remove(self, there: str) -> None:
        """Removes a folder of the board."""
        self._connection.ask('rm -rf -- "$1"', there)

    def fetch(self, there: str, here: Path) -> None:
        """Copies the files of a folder of the board into one of this machine, which is made.

        Raises:
            HostError: the connection is lost.
        """
        archive = self._connection.script('tar -czf - -C "$1" .', there, seconds=SEND_SECONDS)
        here.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
            for member in files:  # no extraction: what a board sends decides nothing but the bytes of files
                if content := files.extractfile(member) if member.isfile() else None:
                    (here / PurePosixPath(member.name).name).write_bytes(content.read())

    def run(self, arguments: Sequence[str], *, seconds: float) -> Finished:
        """Runs Python on the board, alone and watched.

        Raises:
            HostError: the connection is lost, another program of ours runs there, or it took longer.
        """
        module = ("-m", "wasi_export.runtimes.targets.supervise", f"{seconds:g}", f"{self._folder}/lock")
        environment = (f"PYTHONPATH={':'.join(self._paths)}", "PYTHONNOUSERSITE=1", "PYTHONSAFEPATH=1")
        ended = self._connection.call(
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
            version, machine, bits, libc = json.loads(self._connection.ask('exec python3 -c "$1"', _PROBE))
        except (ValueError, TypeError) as error:
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
        if self._connection.ask('if [ -e "$1" ]; then echo there; fi', there):
            return

        def write(stdin: IO[bytes]) -> None:
            with (
                gzip.GzipFile(fileobj=stdin, mode="wb", compresslevel=1) as packed,
                tarfile.open(fileobj=packed, mode="w|") as archive,
            ):
                archive.add(path, arcname=name)

        self._connection.script(_RECEIVE, there, seconds=SEND_SECONDS, write=write)
