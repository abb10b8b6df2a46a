"""A script from its start to its exit status: errors in one line, signals, several processes."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from helper import UserError, one_line, reason_of
from running import distributed, stopping

LOCKS = contextlib.ExitStack()  # kept until the script ends


def run_script(main: Callable[[], None], *, parallel: bool = False) -> None:
    """Run a script's `main`. A user's error becomes one line on stderr and exit status 2, a signal status 128 + its number.

    If several processes fail, only the first says why. Scripts that are not `parallel` refuse to be one of several.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # file names need not be Unicode; lines reach a file or a pipe at once
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        with contextlib.closing(LOCKS), stopping.obeyed():
            _run(main, parallel)
    except SystemExit as stop:
        distributed.leave(stop.code)
    except stopping.Stopped as stop:  # the signal came while an error was dealt with
        distributed.leave(stop.status)


def _run(main: Callable[[], None], parallel: bool) -> None:
    try:
        distributed.start()
        if not parallel:
            refuse_torchrun("this script")
        main()
        distributed.end()
    except UserError as error:
        fail(f"error: {one_line(error)}", 2)
    except BrokenPipeError:
        _discard(sys.stdout)
        fail("error: standard output was closed while the script ran; send it to a file, or to /dev/null", 2)
    except OSError as error:
        sentence = f"{error.filename or 'a file'}: {reason_of(error)}; free space, or check that it can be used"
        fail(f"error: {one_line(sentence)}", 2)
    except stopping.Stopped as stop:
        fail(stop.line, stop.status)
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # the second is torch's, on the CPU
            fail("error: not enough memory; lower the sizes in --hps, the batch size or --num-workers", 2)
        if str(error).startswith("DataLoader worker"):
            # the cause, if there is one, names the signal or the status
            known = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error
            reason = str(known).split("\n")[0].strip().rstrip(".")
            fail(f"error: {reason}; if memory was short, pass a smaller --num-workers", 2)
        if distributed.is_lost_connection(error):
            lost = "a process of this run ended without a reason (killed, or out of memory?)"
            fail(f"error: {lost}; start again, a training with --load-path", 1)
        if distributed.size() == 1:
            raise
        distributed.is_first_to_fail()  # the traceback is the reason
        traceback.print_exc()
        sys.exit(1)


def _discard(stream: TextIO) -> None:
    """Send a closed stream to nowhere, so that flushing it at the end does not change the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(line: str, status: int) -> NoReturn:
    """End the script with one line on stderr, unless another process of the run has said why it ends."""
    if distributed.is_first_to_fail():
        try:
            print(line, file=sys.stderr)
        except BrokenPipeError:
            _discard(sys.stderr)
    sys.exit(status)


def finish_batch(failures: Sequence[str], done: int = 1) -> None:
    """If there are `failures`, print them to stderr and end the script with exit status 1, or 2 if nothing was `done`."""
    if distributed.is_main():
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1 if done else 2)


def refuse_torchrun(what: str) -> None:
    """Raise UserError if this process is one of several."""
    if distributed.size() > 1:
        raise UserError(f"{what} runs in one process; call it with python, not torchrun")
