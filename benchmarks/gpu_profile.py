"""Where a step's time on a CUDA device goes, by kind of operator: read from the trace of `torch.profiler`."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Looked for in the name of a kernel, then in those of the operators around its launch, from the innermost outwards.
KINDS = {
    "compiled": re.compile(r"^triton_"),  # what torch.compile has fused
    "convolution": re.compile(r"convolution|conv\dd", re.I),
    "attention": re.compile(r"attention|flash|fmha", re.I),
    "matrix product": re.compile(r"^aten::(mm|addmm|bmm|baddbmm)$"),
    "norm, activation": re.compile(r"group_?norm|::norm_|normalised|silu|relu|threshold_backward", re.I),
    "copies": re.compile(r"^aten::copy_$|^memcpy", re.I),
}
REST = "rest"
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of the trace
LAUNCHES = {"cuda_runtime", "cuda_driver"}


def kind_of(names: Iterable[str]) -> str:
    """The kind of a kernel, from its name and those of the operators around its launch, innermost first."""
    found = (kind for name in names for kind, pattern in KINDS.items() if pattern.search(name))
    return next(found, REST)


def operators_around(events: Iterable[Mapping[str, Any]]) -> dict[int, list[str]]:
    """For every launch, by its correlation: the names of the operators around it in its thread, innermost first."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") in LAUNCHES | {"cpu_op"}:
            threads[event["pid"], event["tid"]].append(event)
    around = {}
    for thread in threads.values():
        stack: list[Mapping[str, Any]] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e.get("dur", 0))):
            while stack and stack[-1]["ts"] + stack[-1].get("dur", 0) <= event["ts"]:
                stack.pop()
            if event["cat"] == "cpu_op":
                stack.append(event)
            elif "correlation" in event.get("args", {}):
                around[event["args"]["correlation"]] = [outer["name"] for outer in reversed(stack)]
    return around


def digest(events: Iterable[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Launches and seconds of kernels a step, and the share of those seconds by kind; {} if nothing ran on a device.

    Kernels of one CUDA graph share a launch.
    """
    events = list(events)
    around, seconds, launches = operators_around(events), Counter(), set()
    for event in events:
        if event.get("cat") in ON_DEVICE:
            correlation = event["args"].get("correlation")
            if event["cat"] == "kernel":
                launches.add(correlation)
            seconds[kind_of([event["name"], *around.get(correlation, [])])] += event["dur"] / 1e6
    total = seconds.total()
    if not total:
        return {}
    shares = {kind: seconds[kind] / total for kind in (*KINDS, REST)}
    return {"launches": len(launches) / steps, "kernel_seconds": total / steps, "profile": shares}


def profiled(function: Callable[[], object], device: torch.device, steps: int) -> dict[str, Any]:
    """The `digest` of a function that takes so many steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_text(encoding="utf-8", errors="replace")
    return digest(json.loads(text, strict=False)["traceEvents"], steps)
