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
