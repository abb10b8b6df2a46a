"""The processes of one run: which of them this is, and what they send each other.

`torchrun` starts them. Without it a run has one process, and the functions return what they are given. Device tensors
travel by NCCL, host tensors and objects by Gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor, nn

Value = TypeVar("Value")

# How long a process waits for a slow one, which may be writing a picture or a checkpoint. A dead one is noticed at once.
TIMEOUT = datetime.timedelta(minutes=30)

_store: dist.Store | None = None  # torchrun's, which outlives the processes


def _group() -> ModuleType | None:
    """torch.distributed, once this run has several processes; who asks before torch is imported does not import it."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    """Number of this process in the run, from 0."""
    return group.get_rank() if (group := _group()) else 0


def size() -> int:
    """Number of processes in the run."""
    return group.get_world_size() if (group := _group()) else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def local_size() -> int:
    """Number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if size() > 1 else 1


# --- the life of a run -----------------------------------------------------------------------------------------------


def start() -> None:
    """Join the run, if torchrun started this process. Only the main process prints to stdout from now on."""
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    import torch
    import torch.distributed as dist

    _store, number, processes = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.PrefixStore("collectives", _store)
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=TIMEOUT)
    if number > 0:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: PTH123, SIM115  never closed


def end() -> None:
    """Leave the run when all is done; raises SystemExit if it has several processes."""
    if group := _group():
        group.destroy_process_group()
        sys.exit()


def leave(status: int | str | None) -> NoReturn:
    """End this process. One of several ends at once, so that the others notice; in a tidy end a thread of Gloo would abort."""
    if _store is None:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def is_first_to_fail() -> bool:
    """Whether no process of the run has asked this before: only the first to fail says why."""
    if _store is None or not (group := _group()):
        return True
    try:
        return group.PrefixStore("failures", _store).add("count", 1) == 1
    except RuntimeError:  # the machine that holds the store is gone, so nobody has said anything here
        return True


def is_lost_connection(error: Exception) -> bool:
    """Whether an error means that another process is gone."""
    if not (group := _group()) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, group.DistError) or "gloo" in str(error) or "NCCL" in str(error)


# --- tensors and objects ---------------------------------------------------------------------------------------------


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place; all get the same bits."""
    if group := _group():
        group.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite a tensor by the main process's."""
    if group := _group():
        group.broadcast(tensor, 0)
    return tensor


def stack(tensor: Tensor) -> Tensor:
    """Tensors (...) of equal shape of all processes, by rank: (size, ...)."""
    if not (group := _group()):
        return tensor[None]
    import torch

    parts = [torch.empty_like(tensor) for _ in range(size())]
    group.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def gather(value: Value) -> list[Value]:
    """The values of all processes, by rank, of any type that pickles. Waits for the last process."""
    values = [value] * size()
    if group := _group():
        group.all_gather_object(values, value)
    return values


def join(values: list[Value]) -> list[Value]:
    """The lists of all processes, one after the other."""
    return [value for part in gather(values) for value in part]


def largest(value: int) -> int:
    """The largest of the processes' numbers. Waits for the last process."""
    if not (group := _group()):
        return value
    import torch

    tensor = torch.tensor(value)
    group.all_reduce(tensor, group.ReduceOp.MAX)
    return int(tensor)


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Named means over the processes, on the host, each of a weighted sum and its weight (2,); without weight there is none."""
    import torch

    totals = all_reduce(torch.stack([pair.double() for pair in sums.values()])).tolist()
    return {name: total / weight for name, (total, weight) in zip(sums, totals, strict=True) if weight}


# --- modules ---------------------------------------------------------------------------------------------------------


def parallel(module: nn.Module) -> nn.Module:
    """A module whose gradients are averaged over the processes in the backward pass, with the main process's state."""
    if size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    for buffer in module.buffers():
        broadcast(buffer)
    # layers that change buffers keep them equal themselves; torch has renamed the option
    options = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    return DistributedDataParallel(module, **{option: False})


def synchronised(module: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """A block around forward and backward pass: gradients are averaged over the processes if `now`, else accumulated."""
    return contextlib.nullcontext() if now or size() == 1 else module.no_sync()


def worker_count(wanted: int) -> int:
    """At most `wanted` worker processes, one a core; the run's processes on a machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, max(1, cores // local_size()))
