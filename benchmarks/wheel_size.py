"""How much a board downloads: the aarch64 wheels of the base install, with all they need.

    python benchmarks/wheel_size.py                  a table
    python benchmarks/wheel_size.py --max-mb 55      exit code 1 where the total is above
    python benchmarks/wheel_size.py --json FILE      the figures as JSON; `-` is stdout

The dependencies are read from pyproject.toml and resolved by pip for CPython 3.11 on 64-bit ARM Linux with
glibc 2.28 or newer (Raspberry Pi OS of 2021 on), on any machine. Sizes are in 10^6 bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

# pip takes a platform literally, so every older glibc that such a board can use is named too (PEP 600).
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 29)))
PYTHON_VERSION = "3.11"


@dataclass(frozen=True)
class Wheel:
    """One downloaded file."""

    file: str
    size_bytes: int

    @property
    def size_mb(self) -> float:
        """Size in 10^6 bytes."""
        return self.size_bytes / 1e6


def download_wheels(requirements: list[str], folder: Path) -> list[Wheel]:
    """Downloads the wheels of the requirements and of all they need; returns them, largest first."""
    options = [f"--platform={platform}" for platform in PLATFORMS]
    options += [f"--python-version={PYTHON_VERSION}", "--implementation=cp", "--only-binary=:all:"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, "--dest", str(folder), *requirements], check=True, stdout=sys.stderr)
    wheels = [Wheel(path.name, path.stat().st_size) for path in folder.glob("*.whl")]
    return sorted(wheels, key=lambda wheel: wheel.size_bytes, reverse=True)


def main() -> int:
    """Prints the sizes; returns 1 where their sum is above `--max-mb`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-mb", type=float, help="fail above this total, in 10^6 bytes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there; - is stdout")
    arguments = parser.parse_args()

    requirements = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        wheels = download_wheels(requirements, Path(folder))
    total_bytes = sum(wheel.size_bytes for wheel in wheels)
    figures = {
        "python": PYTHON_VERSION,
        "platform": PLATFORMS[-1],
        "total_bytes": total_bytes,
        "wheels": [asdict(wheel) for wheel in wheels],
    }
    if arguments.json == Path("-"):
        print(json.dumps(figures, indent=2))
    else:
        for wheel in wheels:
            print(f"{wheel.size_mb:8.2f} MB  {wheel.file}")
        print(f"{total_bytes / 1e6:8.2f} MB  total of {len(wheels)} wheels")
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if arguments.max_mb is not None and total_bytes > arguments.max_mb * 1e6:
        print(f"total {total_bytes / 1e6:.2f} MB is above --max-mb {arguments.max_mb:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
