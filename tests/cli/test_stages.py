"""When a stage of `run` is done again: its key covers what it follows from."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from helpers import make_images

from wasi_export.cli._stages import StageKeys
from wasi_export.config import Config


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("model.checkpoint", {"dense", "subspace", "baseline", "bundle", "memory", "report"}),
        ("subspace.plan", {"subspace", "bundle", "memory", "report"}),
    ],
)
def test_another_content_of_the_same_file_is_another_run(tmp_path: Path, key: str, stages: set[str]) -> None:
    make_images(tmp_path / "images")
    config = Config.from_mapping({}, [f"data.source={tmp_path / 'images'}", f"{key}={tmp_path / 'file'}"])
    keys = []
    for content in ("old", "new"):
        (tmp_path / "file").write_text(content)
        keys.append(vars(StageKeys.of(config)))
    assert {stage for stage in keys[0] if keys[0][stage] != keys[1][stage]} == stages


def test_the_base_install_is_told_what_a_run_needs(
    base_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    make_images(tmp_path / "images")
    (tmp_path / "my.toml").write_text(f'[data]\nsource = "{tmp_path / "images"}"\n')
    done = base_python("-m", "wasi_export", "run", "my.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        3, "error: torch is not installed: pip install 'wasi-export[train]'\n"
    )  # fmt: skip
