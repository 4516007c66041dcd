"""What a board tells of itself, in the words of a Raspberry Pi's firmware."""

import pytest

from wasi_export.report import BoardRun, BoardSample
from wasi_export.runtimes.targets.board import Watch
from wasi_export.runtimes.vcgencmd import rail_watts
from wasi_export.views import describe_board

ANSWER = """\
   3V7_WL_SW_A current(0)=0.10000000A
   VDD_CORE_A current(7)=2.00000000A
   3V7_WL_SW_V volt(8)=3.70000000V
   VDD_CORE_V volt(15)=0.75000000V
     EXT5V_V volt(24)=5.10000000V
"""


def run(*samples, seconds=10.0, max_clock_mhz=2400.0):
    rest = {"throttled": 0, "celsius": 50.0, "clock_mhz": 2400.0, "available_mb": 4000, "watts": None}
    return BoardRun(
        governor="ondemand",
        max_clock_mhz=max_clock_mhz,
        seconds=seconds,
        samples=tuple(BoardSample(**(rest | sample)) for sample in samples),
    )


def test_power_is_that_of_the_rails_with_current_and_voltage():
    assert rail_watts(ANSWER) == pytest.approx(0.1 * 3.7 + 2.0 * 0.75)
    assert rail_watts("") is None
    assert rail_watts("error=1 error_msg='Command not registered'") is None


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        ([{"seconds": 1.0, "throttled": 0b1}], "under-voltage"),
        ([{"seconds": 1.0}, {"seconds": 2.0, "throttled": 0x50005}], "throttling"),
        ([{"seconds": 1.0, "clock_mhz": 1500.0}], "the clock was 1500 of 2400 MHz at most"),
    ],
)
def test_a_run_that_was_slowed_down_is_not_valid(samples, problem):
    assert problem in run(*samples).problems
    assert "not valid for latency" in describe_board(run(*samples))


@pytest.mark.parametrize(
    "samples",
    [
        [{"seconds": 1.0}],
        [{"seconds": 1.0, "throttled": 0x50000}],  # since the board was started, not now
        [{"seconds": -1.0, "throttled": 0b1}, {"seconds": 11.0, "throttled": 0b100}, {"seconds": 5.0}],
        [{"seconds": 1.0, "clock_mhz": 1500.0}, {"seconds": 2.0}],  # on its way up
        [{"seconds": 1.0, "clock_mhz": None, "throttled": None}],
    ],
)
def test_a_run_at_full_speed_is_valid(samples):
    assert run(*samples).problems == ()


def test_energy_is_above_idle():
    samples = [{"seconds": s, "watts": w} for s, w in ((-1.0, 3.0), (1.0, 7.0), (2.0, 9.0), (12.0, 3.0))]
    assert run(*samples).joules == pytest.approx((8.0 - 3.0) * 10)
    assert run({"seconds": 1.0, "watts": 7.0}).joules is None


def test_a_machine_is_watched_before_during_and_after():
    board = Watch(seconds=0.05).end()
    assert [sample.seconds < 0 for sample in board.samples[:2]] == [True, True]
    assert board.samples[-1].seconds >= board.seconds
    assert all(sample.available_mb for sample in board.samples)
