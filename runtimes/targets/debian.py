"""Packages of Debian 12, downloaded and unpacked into a folder: without root, and without touching the host.

apt gets a state of its own for each architecture. On a Debian 12 it uses the sources of the host, so that a
mirror is used; elsewhere those of debian.org.
"""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from wasi_export.errors import HostError
from wasi_export.runtimes.processor import told

RELEASE = "bookworm"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
HOST_SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
ELSEWHERE = (
    "http://deb.debian.org/debian {release} main",
    "http://deb.debian.org/debian-security {release}-security main",
)
_CONFIG = """\
Dir "{state}"; Dir::State "{state}/state"; Dir::State::status "{state}/status"; Dir::Cache "{state}/cache";
Dir::Etc "{state}/etc"; Dir::Etc::parts "/etc/apt/apt.conf.d";
APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; }};
Acquire::Languages "none"; APT::Sandbox::User "";
"""


class Archive:
    """The packages of one architecture."""

    def __init__(self, folder: Path, architecture: str) -> None:
        """Gets the index of the packages, with a state of apt in a folder.

        Raises:
            HostError: this is no Debian or Ubuntu, or the index cannot be had.
        """
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise HostError(
                "emulating ARM needs apt-get and dpkg, of an x86-64 Debian or Ubuntu: run it there, on an "
                "ARM machine, or give a board with --target ssh://user@host"
            )
        self.folder = folder
        for inside in ("state/lists/partial", "cache/archives/partial", "etc/sources.list.d", "packages"):
            (folder / inside).mkdir(parents=True)
        (folder / "status").touch()
        _write_sources(folder)
        config = folder / "apt.conf"
        config.write_text(_CONFIG.format(state=folder, architecture=architecture), encoding="utf-8")
        self._apt("update")

    def download(self, names: Sequence[str]) -> list[Path]:
        """Returns the downloaded packages, in the order of their names here.

        Raises:
            HostError: one cannot be had.
        """
        self._apt("download", *names)
        packages = self.folder / "packages"
        return [next(packages.glob(f"{name}_*.deb")) for name in names]

    def _apt(self, *arguments: str) -> None:
        _run(
            ["apt-get", "--quiet=2", *arguments],
            self.folder / "packages",
            {"APT_CONFIG": str(self.folder / "apt.conf")},
        )


def unpack(package: Path, folder: Path) -> None:
    """Writes the files of a package into a folder."""
    _run(["dpkg", "-x", str(package), str(folder)], folder.parent, {})


def unpack_file(package: Path, name: str, destination: Path) -> None:
    """Writes one file of a package, and makes it executable."""
    with subprocess.Popen(["dpkg", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as dpkg:
        assert dpkg.stdout
        with tarfile.open(fileobj=dpkg.stdout, mode="r|") as archive:
            for member in archive:
                if member.name == name and (source := archive.extractfile(member)):
                    destination.write_bytes(source.read())
                    destination.chmod(0o755)
        dpkg.stdout.read()  # to the end, or dpkg complains
    if not destination.exists():
        raise HostError(f"{package.name} has no {name}: this release of Debian is not known")


def _write_sources(folder: Path) -> None:
    """Writes where packages come from."""
    own = next((path for path in HOST_SOURCES if RELEASE in told(path)), None)
    if own is not None:
        inside = "sources.list.d/debian.sources" if own.suffix == ".sources" else "sources.list"
        shutil.copyfile(own, folder / "etc" / inside)
        return
    keyring = KEYRING if KEYRING.exists() else _downloaded_keyring(folder)
    lines = [f"deb [signed-by={keyring}] {line.format(release=RELEASE)}\n" for line in ELSEWHERE]
    (folder / "etc" / "sources.list").write_text("".join(lines), encoding="utf-8")


def _downloaded_keyring(folder: Path) -> Path:
    """Returns the keys of Debian, from a package that Ubuntu has too."""
    _run(["apt-get", "--quiet=2", "download", "debian-archive-keyring"], folder, {})
    unpack(next(folder.glob("debian-archive-keyring_*.deb")), folder / "keys")
    return folder / "keys" / KEYRING.relative_to("/")


def _run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        raise HostError(f"{' '.join(command[:3])}… failed: {lines[-1]}: check the network and the disk")
