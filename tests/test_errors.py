"""The error tree: complete, drawn in the docstring as it is, and with an exit code for every branch."""

import inspect
import re

import pytest

from wasi_export import errors
from wasi_export._extras import require
from wasi_export.errors import ExitCode, MissingExtraError, WasiExportError, worst

CLASSES = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, WasiExportError) and member is not WasiExportError
]


def drawn_tree() -> dict[str, tuple[str, int | None]]:
    """Returns class → (parent, exit code where one is drawn), read from the module's docstring."""
    tree: dict[str, tuple[str, int | None]] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([\s│├└─]*)(\w+Error)\b\s*(\d+)?", line)
        if not found:
            continue
        column, name = found.start(2), found[2]
        path = [(c, n) for c, n in path if c < column]
        if path:
            tree[name] = (path[-1][1], int(found[3]) if found[3] else None)
        path.append((column, name))
    return tree


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = {name: parent for name, (parent, _) in drawn_tree().items()}
    assert drawn == {c.__name__: c.__bases__[0].__name__ for c in CLASSES}


def test_the_drawn_exit_codes_are_the_exit_codes() -> None:
    by_name = {c.__name__: c for c in CLASSES}
    drawn = {name: code for name, (_, code) in drawn_tree().items() if code is not None}
    assert len(drawn) == 6
    assert drawn == {name: int(by_name[name].exit_code) for name in drawn}


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_every_error_ends_a_command_with_a_code_of_its_own_branch(error: type[WasiExportError]) -> None:
    assert error.exit_code in ExitCode
    assert error.exit_code not in {ExitCode.PASSED, ExitCode.INTERNAL, ExitCode.INTERRUPTED}
    assert error.__doc__


def test_an_unplanned_error_counts_as_a_bug() -> None:
    assert WasiExportError.exit_code == 70


def test_the_exit_codes_are_those_of_the_design() -> None:
    assert [int(code) for code in ExitCode] == [0, 1, 2, 3, 4, 5, 6, 70, 130]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 5], 5),
        ([5, 1, 0], 1),  # what failed is not made better by what is undecided
        ([1, 3, 2], 1),  # nor by a machine that was not reached
        ([5, 130], 130),
        ([1, 4], 4),
        ([6, 4, 1], 6),
        ([6, 70], 70),
        ([6, 137], 137),  # killed by signal 9
    ],
)
def test_several_exit_codes_become_the_worst_of_them(codes: list[int], code: int) -> None:
    assert worst(codes) == worst(reversed(codes)) == code


def test_a_missing_module_names_the_command_that_installs_it() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'wasi-export\[train\]'") as caught:
        require("no_such_module_at_all", extra="train")
    assert isinstance(caught.value, ImportError)


def test_an_installed_module_is_returned() -> None:
    assert require("json", extra="train").dumps([1]) == "[1]"
