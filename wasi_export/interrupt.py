"""Ctrl-C and SIGTERM: the same to every command; in the middle of training noted, and obeyed after a step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a whole step, and can be resumed; the message says where."""


class StopSignals:
    """Whether SIGINT or SIGTERM came, to this process or to another that trains with it."""

    def __init__(self, agree: Callable[[bool], bool]) -> None:
        """Notes nothing yet; `agree` returns on every process whether a signal came to any."""
        self.received = False
        self._agree = agree

    def guard(self, items: Iterable[T], rounds: int = 0) -> Iterator[T]:
        """Yields the items until a signal came; all processes stop before the same round.

        Args:
            items: of this process.
            rounds: items of the process that has most; one that has fewer asks on, as all must ask together.

        Raises:
            TrainingInterrupted: a signal came before the next item.
        """
        for item in items:
            self._stop_if_received()
            rounds -= 1
            yield item
        for _ in range(rounds):
            self._stop_if_received()

    def _stop_if_received(self) -> None:
        if self._agree(self.received):
            raise TrainingInterrupted


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, as Ctrl-C does, where nothing handles it already."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _alone(received: bool) -> bool:
    return received


@contextlib.contextmanager
def stop_signals(agree: Callable[[bool], bool] = _alone) -> Iterator[StopSignals]:
    """Notes the first SIGINT and SIGTERM instead of obeying it; a second one acts at once.

    `agree` is what `StopSignals` takes. Outside the main thread, where Python allows no handlers, signals do
    what they did before.
    """
    signals = StopSignals(agree)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        signals.received = True
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
