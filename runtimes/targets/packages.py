"""The base install as folders for another machine, so that nothing has to be installed there.

pip gets the wheels of that machine's architecture and Python, in the versions that are installed here: what
is compared between machines must not differ by a version. The package itself is copied without what needs
torch.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import wasi_export
from wasi_export import runtimes
from wasi_export.durable import file_sha256, fingerprint
from wasi_export.errors import HostError
from wasi_export.runtimes.cache import cache_folder, made_once

GLIBC_TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
UNUSED = (
    "numpy/**/tests",
    "onnxruntime/transformers",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "bin",
)


def base_packages(python: tuple[int, int], machine: str) -> Path:
    """Returns a folder to import from, with all that the base install needs, for a Python on Linux.

    Raises:
        HostError: pip cannot get the wheels.
    """
    pinned = tuple(_pinned_requirements())
    tag = f"cp{python[0]}{python[1]}"
    name = f"packages-{tag}-{machine}-{fingerprint(*pinned)}"
    return made_once(cache_folder() / name, lambda folder: _install(folder, pinned, tag, machine))


def own_code() -> Path:
    """Returns a folder to import from, with the part of wasi-export that needs no torch."""
    files = dict(sorted(_own_files()))
    name = f"code-{fingerprint(*files, *map(file_sha256, files.values()))}"

    def copy(folder: Path) -> None:
        for inside, file in files.items():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / inside)

    return made_once(cache_folder() / name, copy)


def content_key(path: Path) -> str:
    """Returns a hash of the names and the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path.parent).as_posix()}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()[:32]


def _own_files() -> Iterator[tuple[str, Path]]:
    """Yields where each file of the package goes, and where it is."""
    (runtime_folder,) = runtimes.__path__
    package = Path(wasi_export.__file__).parent
    roots = [
        (Path("wasi_export"), package, False),
        (Path("wasi_export/runtimes"), Path(runtime_folder), True),
    ]
    roots += [(Path("wasi_export", name), package / name, True) for name in ("cli", "untrusted")]
    for inside, root, deep in roots:
        for file in root.rglob("*") if deep else root.glob("*"):
            if file.is_file() and file.suffix != ".pyc":
                yield (inside / file.relative_to(root)).as_posix(), file


def _pinned_requirements() -> Iterator[str]:
    """Yields what the base install requires, in the version that is here."""
    for line in requires("wasi-export") or ():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name and "extra ==" not in line:
            try:
                yield f"{name[0]}=={version(name[0])}"
            except PackageNotFoundError as error:
                raise HostError(f"{name[0]} is not installed here: pip install wasi-export") from error


def _install(folder: Path, pinned: tuple[str, ...], tag: str, machine: str) -> None:
    platforms = [f"--platform={glibc}_{machine}" for glibc in GLIBC_TAGS]
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--implementation=cp", f"--python-version={tag[2:3]}.{tag[3:]}"),
        *(f"--abi={tag}", "--abi=abi3", "--abi=none", *platforms, f"--target={folder}", *pinned),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if "ERROR" in line] or ended.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else "no message"
        raise HostError(
            f"pip cannot get {', '.join(pinned)} for {tag} on {machine}: {reason}: check the network, or "
            "install versions here that exist there"
        )
    for pattern in UNUSED:
        for unused in folder.glob(pattern):
            shutil.rmtree(unused)
