"""What is installed: the packages, their data, the two links, and a base install without torch."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
LINKS = ("converters", "runtimes")
NOT_ON_A_BOARD = {
    "torch", "torchvision", "timm", "accelerate", "onnx", "onnx-ir", "onnxscript", "scikit-learn", "scipy",
    "matplotlib", "jaxtyping",
}  # fmt: skip


def distribution_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def test_declared_packages_match_the_tree() -> None:
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def test_every_folder_with_code_is_a_package() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} has no __init__.py"


def test_the_declared_data_files_exist() -> None:
    for package, files in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"][package]
        assert [name for name in files if not (folder / name).is_file()] == []


def test_the_base_dependencies_hold_neither_torch_nor_onnx() -> None:
    base = distribution_names(PYPROJECT["project"]["dependencies"])
    assert {"numpy", "onnxruntime", "typer"} <= base
    assert base.isdisjoint(NOT_ON_A_BOARD)
    extras = {
        name: distribution_names(needed)
        for name, needed in PYPROJECT["project"]["optional-dependencies"].items()
    }
    assert {"torch", "wasi-export"} <= extras["train"]  # with the extra `merge`
    assert "onnx" in extras["merge"]
    assert "torch" not in extras["merge"]


@pytest.mark.parametrize("name", LINKS)
def test_the_links_lead_to_the_packages_at_the_top(name: str) -> None:
    link = ROOT / "wasi_export" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKS)
def test_a_linked_package_imported_by_its_folder_name_says_how_to_import_it(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"ImportError: import this package as wasi_export.{name}, not '{name}'" in done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist, and of the wheel made from it, built from a copy of the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("wasi_export", "converters", "runtimes", "tests", "benchmarks"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    built = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return built


def package_files() -> set[str]:
    """Returns every file that the installed package must have, as paths from site-packages."""
    files = {
        "/".join((*package.split("."), name))
        for package, names in SETUPTOOLS["package-data"].items()
        for name in names
    }
    for package, folder in SETUPTOOLS["package-dir"].items():
        for module in (ROOT / folder).rglob("*.py"):
            files.add("/".join((*package.split("."), *module.relative_to(ROOT / folder).parts)))
    return files


@pytest.mark.slow
def test_a_wheel_made_from_the_sdist_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if not name.startswith("wasi_export-")} == package_files()


@pytest.mark.slow
def test_the_sdist_holds_both_folders_the_licence_and_the_readme(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "wasi_export/demo.toml",
        "wasi_export/py.typed",
    } <= names
    assert {f"{name}/__init__.py" for name in LINKS} <= names
