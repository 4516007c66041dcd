"""What the README shows is what comes: its Python as the runtime, its thresholds, exit codes and links.

Its commands and configurations are those of all documents: tests/test_docs.py.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.config import Thresholds
from wasi_export.errors import ExitCode
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session
from wasi_export.runtimes.state_folder import STATE

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Returns the fenced code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def toml_block(name: str) -> str:
    (block,) = (block for block in blocks("toml") if block.startswith(f"# {name}\n"))
    return block


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(9, 7), (7, 9), (4, 4), (40, 31), (2, 3)], ids=str)
def test_the_python_of_the_readme_gives_the_outputs_of_the_runtime(
    base_python: Callable[..., CompletedProcess[str]],
    bundle: Path,
    rng: np.random.Generator,
    size: tuple[int, int],
    interpolation: str,
) -> None:
    (code,) = (block for block in blocks("python") if "wasi_export" not in block)
    manifest = Bundle.open(bundle).manifest
    spec = manifest.input.model_copy(
        update={"crop_pct": 0.875, "interpolation": interpolation, "mean": (0.5, 0.4, 0.3)}
    )
    write_bundle_manifest(bundle, manifest.model_copy(update={"input": spec}))
    # Lossless bytes under the name of the README: Pillow goes by the content.
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    image.save(bundle.parent / "photo.jpg", format="PNG")

    done = base_python("-c", f"{code}\nprint(json.dumps(logits.tolist()))", cwd=bundle.parent)

    assert done.returncode == 0, done.stderr
    name, printed = done.stdout.splitlines()
    expected = Session.open(bundle / "model.onnx").run(Preprocess(spec).batch([image]))
    # Two orders of float32 and float64 arithmetic on inputs of a few units: 1e-6 of them.
    np.testing.assert_allclose(json.loads(printed), expected, rtol=0, atol=1e-5)
    assert name == manifest.classes[expected.argmax()]


def test_the_board_of_the_readme_learns_with_the_base_install(
    base_python: Callable[..., CompletedProcess[str]], learning_bundle: Path, tmp_path: Path
) -> None:
    (code,) = (block for block in blocks("python") if "Adapter" in block)
    shutil.copytree(learning_bundle, tmp_path / "bundle")
    data = (
        "from PIL import Image\n"
        "labels = [0, 1, 0, 1]\n"
        "images = [Image.new('RGB', (9, 7), (200 * label,) * 3) for label in labels]\n"
    )
    done = base_python("-c", f"{data}{code}\nprint(classes.tolist(), loss > 0)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 1, 0, 1] True\n"
    assert (tmp_path / "by-hand" / STATE).exists()


def test_the_thresholds_of_the_readme_are_valid_and_name_every_one(tmp_path: Path) -> None:
    (path := tmp_path / "thresholds.toml").write_text(toml_block("thresholds.toml"), encoding="utf-8")
    assert Thresholds.from_toml(path).model_fields_set == set(Thresholds.model_fields)


def test_the_exit_codes_of_the_readme_are_the_exit_codes() -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)]
    assert codes == [int(code) for code in ExitCode]


def test_the_links_of_the_documents_lead_to_files() -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))
    ]
    assert len(links) > 3
    assert [link for page, link in links if not (page.parent / link).exists()] == []
