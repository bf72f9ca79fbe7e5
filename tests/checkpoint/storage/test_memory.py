"""Memory for weights."""

from __future__ import annotations

import torch

from finemoe.checkpoint.storage.memory import empty_tensors


def test_tensors_lie_side_by_side_and_none_on_another() -> None:
    wanted = {
        "a": ((3, 5), torch.float32),
        "none": ((0, 4), torch.float32),
        "b": ((7,), torch.bfloat16),
        "c": ((2, 2), torch.int64),
        "d": ((), torch.float32),
    }
    made = empty_tensors(wanted)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()} == wanted
    for number, tensor in enumerate(made.values()):
        tensor.fill_(number)
    for number, tensor in enumerate(made.values()):
        assert bool((tensor == number).all())
        assert tensor.data_ptr() % 64 == made["a"].data_ptr() % 64
        assert tensor.is_contiguous()
