"""What tells a model from any other: its configuration and weights, in whatever files they lie."""

from __future__ import annotations

import hashlib

import torch

from finemoe.model.transformer import Transformer


def fingerprint(model: Transformer) -> str:
    """sha256 of what it computes."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_fingerprint(model: Transformer) -> str:
    """sha256 of its weights without prediction modules, which not every format has; rounded to bfloat16, as a copy of
    the model may be stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("mtp."):
            continue
        values = tensor.detach().cpu()
        values = values.bfloat16() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
