"""Signals that ask a script to stop: obeyed at once, or by a training after its step and its checkpoint."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

# SLURM asks by SIGTERM, and where `--signal` says so by SIGUSR1 some time before.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal asks the script to stop; no exception of the work, so that nothing goes on past it."""

    def __init__(self, number: int, sentence: str = ""):
        super().__init__(number, sentence)
        self.number = number
        name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        self.line = f"{name}{sentence}"

    @property
    def status(self) -> int:
        """Exit status of the script: 130 of SIGINT, 143 of SIGTERM, 138 of SIGUSR1."""
        return 128 + self.number


@contextlib.contextmanager
def _handled(handler: object) -> Iterator[None]:
    """Inside the block `handler` answers the signals; threads other than the main one have no say in it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def obeyed() -> contextlib.AbstractContextManager[None]:
    """Inside the block a signal raises `Stopped`, so that what is half-written is taken away."""
    return _handled(_obey)


def _obey(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Inside the block a signal is added to the list that this gives; the next one then ends the process at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    with _handled(note):
        yield received


def left_to_the_main_process(worker: int) -> None:
    """In a loader's worker: a signal to all processes of a job must not take the samples of the step that is finished.

    A worker stops when its main process does, or sends it SIGTERM.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _lost_connections_are_silent
    main = multiprocessing.parent_process()
    if main is None or not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return

    def wait_for_main() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
            pass
        os._exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait_for_main, daemon=True).start()


def _lost_connections_are_silent(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a worker's threads say when the main process has just ended is no news."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
