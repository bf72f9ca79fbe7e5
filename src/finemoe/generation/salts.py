"""Salts: texts read under different ones never share blocks of the cache."""

from __future__ import annotations

import hashlib

import torch

from finemoe.generation.sequence import Constraint

SALT = 16
"""[bytes] Of what stands for a constraint."""


def salt_of(constraint: Constraint | None) -> bytes:
    """The same for equal constraints alone: texts read under one may share blocks, and with no other."""
    if constraint is None:
        return b""
    found = hashlib.blake2b(digest_size=SALT)
    for layer, held in sorted(constraint.items()):
        for name, value in vars(held).items():
            said = value.tolist() if isinstance(value, torch.Tensor) else value
            found.update(f"{layer} {name} {said};".encode())
    return found.digest()
