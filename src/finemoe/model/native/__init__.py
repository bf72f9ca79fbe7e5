"""C++ kernels for a CPU, compiled at first use. Everything here has a path in plain torch that always works.

`experts.cpp` whole MoE layers and SwiGLUs, `linear.cpp` linear layers, `cross_entropy.cpp` the loss, on the products of
`gemm.h`, and of `matrix.h` where weights are blocks of bytes; all else is float32. `norm.cpp`, `rope.cpp`,
`attention.cpp` what lies between; `adamw.cpp` the update of a training step. `tile.py` chooses how products are cut.
`pages.cpp` is where large tensors lie.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from finemoe.core import extension, memory
from finemoe.core.logs import logger
from finemoe.model.native.tile import PRODUCTS

LIBRARY = "finemoe_native"
"""Its name in the cache."""


@cache
def available() -> bool:
    """Whether the kernels can be used on this machine; compiles them if that has not been done.

    The environment variable FINEMOE_NATIVE=0 switches them off.
    """
    if extension.switched_off():
        return False
    reason = extension.load_from(__name__, LIBRARY, PRODUCTS)
    if reason is not None:
        logger.warning("the CPU kernels cannot be used, plain torch runs instead, more slowly: %s", reason)
    return reason is None


@cache
def pass_pages_on() -> bool:
    """Have large tensors of this process lie in pages of 2 MiB that go from one to the next, for good.

    What a step frees then always has room for what it makes, which the gaps of a heap have not: a sixth of the memory
    of a training step of AdamW. Whoever asks what memory is left gets what is free among them back to the system first.
    True where that can be done: on Linux, with the kernels.
    """
    if not available() or not torch.ops.finemoe.pass_pages_on():
        return False
    memory.gives_back(torch.ops.finemoe.give_pages_back)
    return True


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: plain float32 on the CPU, outside autocast."""
    return _can_take((torch.float32,), tensors)


def reads(*weights: Tensor) -> bool:
    """Whether the kernels can multiply by these: as `usable`, or blocks of bytes (`model.quantised`)."""
    return _can_take((torch.float32, torch.uint8), weights)


def _can_take(kinds: tuple[torch.dtype, ...], tensors: tuple[Tensor, ...]) -> bool:
    for tensor in tensors:
        if tensor.dtype not in kinds or tensor.device.type != "cpu":
            return False
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:  # such as distributed tensors
            return False
    return not torch.is_autocast_enabled("cpu") and available()
