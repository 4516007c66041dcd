import subprocess
import sys

from wasi_export.runtimes.targets.packages import content_key, own_code


def test_our_code_for_a_target_is_what_runs_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = own_code()
    package = code / "wasi_export"
    assert (package / "runtimes" / "targets" / "supervise.py").is_file()
    assert not any((package / name).exists() for name in ("training", "subspace", "converters"))
    program = "import sys, wasi_export.cli as cli; print(cli.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(code))


def test_the_key_of_a_folder_follows_names_and_bytes(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    keys = [content_key(folder)]
    (folder / "a").write_text("2")
    keys.append(content_key(folder))
    (folder / "a").rename(folder / "b")
    keys.append(content_key(folder))
    assert len(set(keys)) == 3
    assert content_key(folder / "b") not in keys
