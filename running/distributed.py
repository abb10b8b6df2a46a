"""The processes of one run: which of them this is, and what they tell each other.

`torchrun` starts them; a script that was started without it is a run of one, and here nothing happens: every function then
returns what it was given. Device tensors travel by NCCL, host tensors and objects by Gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import sys
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")

# How long a process waits for one that lives but does not come: a picture, a checkpoint or a slow disk may keep it.
# One that dies is noticed at once, by its closed connection or by torchrun.
TIMEOUT = datetime.timedelta(minutes=30)

_store: dist.Store | None = None  # torchrun's, which outlives the processes


def rank() -> int:
    """Number of this process in the run, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def local_size() -> int:
    """Number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if size() > 1 else 1


# --- the life of a run -----------------------------------------------------------------------------------------------


def start() -> None:
    """Join the run that torchrun started this process for. All but the main process fall silent on stdout."""
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    _store, number, processes = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.PrefixStore("collectives", _store)
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=TIMEOUT)
    if number > 0:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: PTH123, SIM115  for as long as the process lives


def end() -> None:
    """Leave the run, when all is done. Of several processes each then ends: raises SystemExit."""
    if size() > 1:
        dist.destroy_process_group()
        sys.exit()


def leave(status: int | str | None) -> NoReturn:
    """End this process. One of several goes at once: its connections, and so the others, must not wait for a tidy end, in
    which a thread of Gloo's that still wants the interpreter would abort."""
    if _store is None:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def is_first_to_fail() -> bool:
    """Whether no process of the run has asked this before: the one that fails first says why, the others follow it."""
    if _store is None or size() == 1:
        return True
    try:
        return dist.PrefixStore("failures", _store).add("count", 1) == 1
    except RuntimeError:  # the machine that holds the store is gone: then nobody has said anything here
        return True


def is_lost_connection(error: Exception) -> bool:
    """Whether an error says that another process is gone."""
    if size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


# --- tensors and objects ---------------------------------------------------------------------------------------------


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place; the same bits on all of them."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite a tensor by the main process's."""
    if size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def stack(tensor: Tensor) -> Tensor:
    """Tensors (...) of equal shape of all processes, by number: (size, ...)."""
    if size() == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def gather(value: Value) -> list[Value]:
    """The values of all processes, by number; anything that pickles. Waits for the last of them."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def join(values: list[Value]) -> list[Value]:
    """The lists of all processes, one after the other."""
    return [value for part in gather(values) for value in part]


def largest(value: int) -> int:
    """The largest of the processes' numbers. Waits for the last of them."""
    if size() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def sum_scalars(values: dict[str, Tensor]) -> dict[str, float]:
    """Named scalars summed over the processes, on the host."""
    if size() == 1:
        return {name: float(value) for name, value in values.items()}
    return dict(zip(values, all_reduce(torch.stack([v.double() for v in values.values()])).tolist(), strict=True))


# --- modules ---------------------------------------------------------------------------------------------------------


def parallel(module: nn.Module) -> nn.Module:
    """A module whose gradients are averaged over the processes in the backward pass; its state is the main process's."""
    if size() == 1:
        return module
    for buffer in module.buffers():
        broadcast(buffer)
    # what changes buffers in training keeps them equal itself; torch has renamed the option
    options = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    return DistributedDataParallel(module, **{option: False})


def synchronised(module: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """A block around forward and backward pass in which gradients are averaged, or, unless `now`, only accumulated."""
    return contextlib.nullcontext() if now or size() == 1 else module.no_sync()


def worker_count(wanted: int) -> int:
    """Of `wanted` worker processes, as many as there are cores for; the run's processes on a machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, max(1, cores // local_size()))
