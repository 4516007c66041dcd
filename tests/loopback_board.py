"""A board for tests: sshd on loopback, whose `python3` is the emulated aarch64 one.

sshd is that of the system, or Debian's, unpacked into the cache. As root it wants a user `sshd`, which it
gets in a mount namespace of its own.
"""

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wasi_export.runtimes.cache import cache_folder, made_once
from wasi_export.runtimes.targets.arm64 import open_arm64
from wasi_export.runtimes.targets.debian import Archive, unpack

CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey "{folder}/host_key"
AuthorizedKeysFile "{folder}/authorized_keys"
PidFile none
PasswordAuthentication no
UsePAM no
StrictModes no
SetEnv PATH="{folder}/bin:/usr/bin:/bin" HOME="{folder}/home"
"""
# The user that sshd gives up its rights for; of the namespace alone.
IN_NAMESPACE = """
set -e
cp /etc/passwd "$1/passwd"
grep -q ^sshd: "$1/passwd" || echo sshd:x:990:65534::/run/sshd:/bin/false >> "$1/passwd"
mount --bind "$1/passwd" /etc/passwd
mount -t tmpfs none /run
mkdir -m 755 /run/sshd
mkdir "$1/small"
mount -t tmpfs -o size=1m none "$1/small"
shift
exec "$@"
"""


@dataclass(frozen=True)
class TestBoard:
    """A running sshd."""

    folder: Path
    """Holds `bin`, the programs that the board finds first, and `data`, where ours go."""
    port: int
    client: str
    """What WASI_EXPORT_SSH must be."""

    __test__ = False

    @property
    def small(self) -> bool:
        """Whether the folder `small` is a file system of 1 MiB, for programs of the board."""
        return os.geteuid() == 0

    @property
    def address(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{self.folder}/data"

    def install(self, name: str, script: str) -> None:
        """Gives the board a program."""
        program = self.folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)


@contextmanager
def running_board(folder: Path) -> Iterator[TestBoard]:
    """Starts sshd, with keys of its own, and ends it with all that was started over it."""
    for name in ("bin", "home"):  # a home of its own: a login shell reads nothing of ours
        (folder / name).mkdir(parents=True)
    for key in ("host_key", "key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True)
    shutil.copyfile(folder / "key.pub", folder / "authorized_keys")
    port = _free_port()
    (folder / "sshd_config").write_text(CONFIG.format(folder=folder, port=port), encoding="utf-8")
    client = folder / "ssh_config"
    client.write_text(
        f'IdentityFile "{folder}/key"\nIdentitiesOnly yes\nUserKnownHostsFile "{folder}/known_hosts"\n'
        "StrictHostKeyChecking accept-new\n",
        encoding="utf-8",
    )
    board = TestBoard(folder, port, shlex.join(["ssh", "-F", str(client)]))
    python = open_arm64().python
    board.install("python3", f'exec "{python}" "$@"')
    daemon, libraries = _sshd()
    words = [str(daemon), "-D", "-e", "-f", str(folder / "sshd_config")]
    if os.geteuid() == 0:
        words = ["unshare", "--mount", "sh", "-c", IN_NAMESPACE, "sh", str(folder), *words]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            words, stderr=log, env=os.environ | {"LD_LIBRARY_PATH": libraries}, start_new_session=True
        )
    try:
        _wait_for(port, server, folder / "log")
        yield board
    finally:
        server.terminate()
        server.wait()


def _sshd() -> tuple[Path, str]:
    """Returns the server, and where its libraries are."""
    found = shutil.which("sshd", path=f"/usr/sbin:{os.defpath}")
    if found:
        return Path(found), ""

    def make(made: Path) -> None:
        archive = Archive(made / "apt", "amd64")
        for package in archive.download(("openssh-server", "libwrap0")):
            unpack(package, made)
        shutil.rmtree(made / "apt")

    folder = made_once(cache_folder() / "sshd", make)
    return folder / "usr" / "sbin" / "sshd", str(folder / "usr" / "lib" / "x86_64-linux-gnu")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait_for(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(100):
        if server.poll() is not None:
            raise OSError(f"sshd ended: {log.read_text(encoding='utf-8')}")
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise OSError(f"sshd does not answer: {log.read_text(encoding='utf-8')}")
