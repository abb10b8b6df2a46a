"""A loader whose processes end when it is told to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from running.stopping import left_to_the_main_process


class Loader(DataLoader):
    """A DataLoader whose workers leave signals to the main process, and end when it is closed or after a pass of `once`.

    If the garbage collector is left to find them, it waits 5 seconds for each loader: their queues are closed by then.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, worker_init_fn=left_to_the_main_process, **kwargs)
        self.running: Iterator[Any] | None = None  # the last pass

    def __iter__(self) -> Iterator[Any]:
        self.running = super().__iter__()
        return self.running

    def once(self) -> Iterator[Any]:
        """One pass: the workers end after it, and after an error in it."""
        with contextlib.closing(self):
            yield from self

    def close(self) -> None:
        """End the workers; the next pass starts others."""
        if isinstance(self.running, _MultiProcessingDataLoaderIter):
            self.running._shutdown_workers()
        self.running = self._iterator = None
