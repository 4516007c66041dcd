import pytest

from wasi_export.errors import HostError, UsageError
from wasi_export.runtimes.targets.address import open_target
from wasi_export.runtimes.targets.connection import CLIENT, Address
from wasi_export.runtimes.targets.ssh import SshTarget


@pytest.mark.parametrize(
    ("text", "words", "port", "folder"),
    [
        ("ssh://pi", "pi", None, ".cache/wasi-export"),
        ("ssh://user@pi.local:2222/data/my dir", "user@pi.local", 2222, "/data/my dir"),
        ("ssh://[fe80::1]", "fe80::1", None, ".cache/wasi-export"),
        ("ssh://pi/", "pi", None, ".cache/wasi-export"),
    ],
)
def test_an_address_has_its_parts(text, words, port, folder):
    address = Address.parse(text)
    assert (str(address), address.port, address.folder) == (words, port, folder)


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "ssh://-oProxyCommand=touch pwned",
        "ssh://-l@pi",
        "ssh://pi;reboot",
        "ssh://$(reboot)",
        "ssh://pi`id`",
        "ssh://user:secret@pi",
        "ssh://pi:port",
        "ssh://pi:99999",
        "ssh://pi?x=1",
        "ssh://pi/a\nb",
        "ssh://pi/a:b",
        "ssh://user name@pi",
        "ssh://'pi'",
        "http://pi",
    ],
)
def test_a_hostile_address_is_refused_before_anything_runs(text):
    with pytest.raises(UsageError, match="no address of a board"):
        Address.parse(text)


@pytest.mark.parametrize(("text", "message"), [("pi", "no target 'pi'"), ("arm64:pi9", "no board 'pi9'")])
def test_an_unknown_target_is_told_with_those_that_there_are(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        open_target(text)
    assert "pi5" in str(caught.value)


def test_a_client_that_is_no_command_is_told(monkeypatch):
    monkeypatch.setenv(CLIENT, "ssh -F 'no end")
    with pytest.raises(UsageError, match="WASI_EXPORT_SSH is no command"):
        SshTarget(Address.parse("ssh://pi"))


def test_a_machine_without_ssh_is_told(monkeypatch):
    monkeypatch.setenv(CLIENT, "no-such-client -v")
    with pytest.raises(HostError, match="no ssh client 'no-such-client -v': install openssh-client"):
        SshTarget(Address.parse("ssh://pi"))
