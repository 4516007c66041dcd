import pytest
import typer

from wasi_export.cli._target import Outcome, end
from wasi_export.errors import HostError


@pytest.mark.parametrize(
    ("codes", "error", "code"),
    [
        ((1, 5), None, 1),  # undecided on one board does not hide what failed on the other
        ((5, 0), None, 5),
        ((1,), HostError("lost"), 1),
        ((0,), HostError("lost"), 3),
    ],
)
def test_the_worst_of_several_machines_is_the_exit_code(codes, error, code):
    outcomes = [Outcome(f"board {number}", None, None) for number, _ in enumerate(codes)]
    if error is not None:
        outcomes.append(Outcome("lost board", None, error))
    with pytest.raises(typer.Exit) as ended:
        end(outcomes, codes, as_json=False)
    assert ended.value.exit_code == code
