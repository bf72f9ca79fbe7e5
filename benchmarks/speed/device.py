"""What a device asks of whoever measures on it. Needs nothing but torch, as every peer has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.speed.timing import calling


def settle(device: str | torch.device) -> None:
    """Wait until the device has done all that it was given: it works on while Python goes on."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_on(device: str | torch.device, function: Callable[[], Any], calls: int = 1) -> float:
    """Seconds of one of `calls` calls: on CUDA between two events of the stream, which the host's clock cannot blur."""
    if torch.device(device).type != "cuda":
        return calling(function, calls)()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    settle(device)
    first.record()
    for _ in range(calls):
        function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def device_memory(device: str | torch.device) -> dict[str, int]:
    """Bytes that torch holds tensors in, now and at most since `forget_peak`; nothing where that is not counted."""
    if torch.device(device).type != "cuda":
        return {}
    return {"allocated": torch.cuda.memory_allocated(device), "most": torch.cuda.max_memory_allocated(device)}


def forget_peak(device: str | torch.device) -> None:
    """Count the most memory from here on."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
