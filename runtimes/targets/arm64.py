"""A Raspberry Pi emulated on an x86-64 Debian or Ubuntu: the real aarch64 wheels, without root.

qemu's user mode runs an aarch64 Python of Debian 12 as a process of this machine, which sees its files. A
folder that is laid over the root shows it the processor of a Pi: onnxruntime picks its kernels by
/proc/cpuinfo, which must agree with the processor that qemu emulates.

The script `python` calls qemu so that `sys.executable` is the script: a program over there can start
another. What is measured with a clock here says nothing of a board; instructions can be counted
(`instructions.py`). On an ARM machine nothing is emulated.
"""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from wasi_export.errors import HostError, UsageError
from wasi_export.runtimes.cache import cache_folder, made_once
from wasi_export.runtimes.targets.debian import RELEASE, Archive, unpack, unpack_file
from wasi_export.runtimes.targets.packages import base_packages, own_code
from wasi_export.runtimes.targets.target import LocalTarget

PYTHON = (3, 11)
LAYOUT = "1"
"""Counts the changes of what is in the folder."""
QEMU = "usr/bin/qemu-aarch64"
HOST_PACKAGES = (
    *("qemu-user", "libcapstone4", "liburing2", "libglib2.0-0", "libgnutls30", "libnuma1", "zlib1g"),
    *("libpcre2-8-0", "libp11-kit0", "libidn2-0", "libunistring2", "libtasn1-6", "libnettle8", "libhogweed6"),
    *("libgmp10", "libffi8"),
)
"""qemu-user and its libraries, but for those that every Debian has."""
GUEST_PACKAGES = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0"),
    *("liblzma5", "libuuid1", "libpython3.11-minimal", "libpython3.11-stdlib", "python3.11-minimal"),
)
COUNTER = "WASI_EXPORT_COUNTER"
"""Names the plugin that counts instructions, with its arguments."""


@dataclass(frozen=True)
class Board:
    """A board as far as programs can tell."""

    name: str
    processor: str
    part: int
    features: str


# Flags as Linux on the board shows them. pointer authentication, SVE and i8mm are in neither: with qemu's
# processor `max`, which has them, int8 results of qemu 7.2 are wrong.
BOARDS = {
    "pi5": Board(
        "Raspberry Pi 5, emulated",
        "cortex-a76",
        0xD0B,
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
    "pi4": Board("Raspberry Pi 4, emulated", "cortex-a72", 0xD08, "fp asimd evtstrm crc32 cpuid"),
}

_PYTHON = """\
#!/bin/sh
here=$(dirname "$0")
exec env LD_LIBRARY_PATH="$here/../qemu/lib" "$here/../qemu/qemu-aarch64" \\
    ${COUNTER:+-plugin "$COUNTER"} -L "$here" -cpu PROCESSOR -0 "$0" \\
    -U LD_LIBRARY_PATH -U LD_PRELOAD -U OPENBLAS_CORETYPE -E PYTHONHOME="$here/usr" \\
    "$here/usr/bin/python3.11" "$@"
"""


def open_arm64(board: str = "pi5") -> LocalTarget:
    """Returns an ARM Python: this one on an ARM machine, else an emulated one, which is set up once.

    Raises:
        UsageError: the board is not known.
        HostError: it cannot be emulated here, or not be downloaded.
    """
    if board not in BOARDS:
        raise UsageError(f"no board {board!r} to emulate: choose from {', '.join(BOARDS)}")
    scratch = cache_folder() / "scratch"
    if platform.machine() in ("aarch64", "arm64"):
        return LocalTarget("arm64", "device", Path(sys.executable), os.environ, scratch)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise HostError(
            f"ARM is emulated on x86-64 Linux only, this is {platform.machine()} {sys.platform}: run it on "
            "an ARM machine, or give a board with --target ssh://user@host"
        )
    emulator = made_once(cache_folder() / f"arm64-{RELEASE}-{LAYOUT}", _set_up)
    paths = (base_packages(PYTHON, "aarch64"), own_code())
    environment = {
        "PATH": os.defpath,
        "HOME": os.environ.get("HOME", "/"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",  # nothing from the folder that the command was started in
    }
    return LocalTarget(
        f"arm64:{board}", "emulated", emulator / board / "python", environment, scratch / board
    )


def _set_up(folder: Path) -> None:
    """Fills a folder: qemu/, root/ with Python, and for each board a root of links with its own /proc."""
    temporary = folder / "tmp"
    (folder / "qemu" / "lib").mkdir(parents=True)
    host, guest = Archive(temporary / "amd64", "amd64"), Archive(temporary / "arm64", "arm64")
    qemu, *libraries = host.download(HOST_PACKAGES)
    unpack_file(qemu, f"./{QEMU}", folder / "qemu" / "qemu-aarch64")
    for package in libraries:
        unpack(package, temporary / "libraries")
    for inside in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"):
        for library in (temporary / "libraries" / inside).glob("*.so.*"):
            shutil.copyfile(library, folder / "qemu" / "lib" / library.name)
    for package in guest.download(GUEST_PACKAGES):
        unpack(package, folder / "root")
    for unused in ("usr/share", "usr/lib/aarch64-linux-gnu/gconv"):
        shutil.rmtree(folder / "root" / unused, ignore_errors=True)
    shutil.rmtree(temporary)
    for name, board in BOARDS.items():
        _write_board(folder / name, board)


def _write_board(root: Path, board: Board) -> None:
    """Writes the root that a program on a board sees; what is not in it is looked up on this machine."""
    cpu = root / "sys" / "devices" / "system" / "cpu"
    for made in (root / "proc" / "device-tree", cpu):
        made.mkdir(parents=True)
    for name in ("usr", "lib"):
        (root / name).symlink_to(Path("..") / "root" / name)
    cores = "".join(
        f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: {board.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {board.part:#05x}\nCPU revision\t: 1\n\n"
        for core in range(4)
    )
    (root / "proc" / "cpuinfo").write_text(cores, encoding="ascii")
    (root / "proc" / "device-tree" / "model").write_text(board.name, encoding="ascii")
    for name in ("possible", "present", "online"):
        (cpu / name).write_text("0-3\n", encoding="ascii")
    script = root / "python"
    script.write_text(
        _PYTHON.replace("PROCESSOR", board.processor).replace("COUNTER", COUNTER), encoding="ascii"
    )
    script.chmod(0o755)
