"""Signals that ask a script to stop. A script obeys at once; a training finishes its step and writes a checkpoint first."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

# SLURM sends SIGTERM and, if `--signal` says so, SIGUSR1 some time before.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal asks the script to stop. No `except Exception` catches it."""

    def __init__(self, number: int, sentence: str = ""):
        super().__init__(number, sentence)
        self.number = number
        name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        self.line = f"{name}{sentence}"
        self.status = 128 + number  # exit status of the script: SIGINT 130, SIGTERM 143, SIGUSR1 138


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` answer the signals inside the block; only the main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


_obeyed: list[int] = []  # signals that raised `Stopped`, which an import of C code may have swallowed


@contextlib.contextmanager
def obeyed() -> Iterator[None]:
    """A block in which a signal raises `Stopped`, so that half-written files are removed."""

    def obey(number: int, frame: FrameType | None) -> None:
        _obeyed.append(number)
        raise Stopped(number)

    try:
        with _handled(obey):
            yield
    finally:
        _obeyed.clear()


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """A block in which a signal is added to the yielded list; a second signal ends the process at once.

    The list begins with signals that were to be obeyed before it, and were not.
    """
    received = [*_obeyed]

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    with _handled(note):
        yield received


def left_to_the_main_process(worker: int) -> None:
    """Make a loader's worker ignore signals: the main process still needs its samples to finish the step.

    The worker stops if its main process ends, or sends it SIGTERM.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _ignore_lost_connections
    main, parent = multiprocessing.parent_process(), os.getppid()  # not the same if a server forks workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if main is None or not hasattr(signal, "sigtimedwait"):
        return

    def wait_for_main() -> None:
        # not at the end of Python: what still waits to be sent to a main process that was killed would block it
        while os.getppid() == parent:
            received = signal.sigtimedwait({signal.SIGTERM}, 1)  # seconds
            if received is not None and received.si_pid == main.pid:
                break
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait_for_main, daemon=True).start()


def _ignore_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker's threads lose their connections when the main process ends: that is not worth a traceback."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
