"""Where packages come from: what the host says, or debian.org; no package is downloaded here."""

import pytest

from wasi_export.errors import HostError
from wasi_export.runtimes.targets import debian


def sources_of(tmp_path, monkeypatch, *, host: str | None):
    """Returns what apt would be told on a host with these sources."""
    own = tmp_path / "debian.sources"
    if host is not None:
        own.write_text(host, encoding="utf-8")
    monkeypatch.setattr(debian, "HOST_SOURCES", (own,))
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "keys.gpg")
    (tmp_path / "keys.gpg").write_bytes(b"")
    (tmp_path / "apt" / "etc" / "sources.list.d").mkdir(parents=True)
    debian._write_sources(tmp_path / "apt")
    return {path.name: path.read_text() for path in (tmp_path / "apt" / "etc").rglob("*") if path.is_file()}


def test_a_debian_12_uses_its_own_mirror(tmp_path, monkeypatch):
    host = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n"
    assert sources_of(tmp_path, monkeypatch, host=host) == {"debian.sources": host}


@pytest.mark.parametrize(
    "host", [None, "Types: deb\nURIs: http://archive.ubuntu.com/ubuntu\nSuites: noble\n"]
)
def test_another_system_uses_debian_org_with_its_keys(tmp_path, monkeypatch, host):
    (text,) = sources_of(tmp_path, monkeypatch, host=host).values()
    assert f"deb [signed-by={tmp_path}/keys.gpg] http://deb.debian.org/debian bookworm main" in text


def test_a_system_without_apt_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="give a board with --target ssh://"):
        debian.Archive(tmp_path / "apt", "arm64")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_cannot_be_had_says_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(debian, "HOST_SOURCES", ())
    monkeypatch.setattr(debian, "ELSEWHERE", ("http://127.0.0.1:1/debian {release} main",))
    with pytest.raises(HostError, match=r"apt-get --quiet=2 \w+… failed: .*check the network"):
        debian.Archive(tmp_path / "apt", "arm64").download(["libc6"])
