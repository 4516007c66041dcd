"""An emulated Raspberry Pi, and a board behind ssh that is one; skipped where they cannot be had."""

import os
from collections.abc import Iterator

import pytest
from loopback_board import TestBoard, running_board

from wasi_export.errors import HostError
from wasi_export.runtimes.targets.arm64 import open_arm64
from wasi_export.runtimes.targets.connection import CLIENT
from wasi_export.runtimes.targets.target import LocalTarget


@pytest.fixture(scope="session")
def pi5() -> LocalTarget:
    try:
        return open_arm64()
    except HostError as error:
        pytest.skip(f"no ARM here: {error}")


@pytest.fixture(scope="session")
def ssh_board(pi5: LocalTarget, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestBoard]:
    """A board below a path that a shell would take apart."""
    try:
        with running_board(tmp_path_factory.mktemp("it's $HOME")) as board:
            os.environ[CLIENT] = board.client
            yield board
    except (HostError, OSError) as error:
        pytest.skip(f"no sshd here: {error}")
    finally:
        os.environ.pop(CLIENT, None)
