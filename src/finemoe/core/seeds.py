"""Named random streams: one run seed, split by purpose, so that changing one draw never moves another."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of run `seed`; equal inputs give equal seeds on every machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the stream `names` (data, init, sampling, masks ...) of run `seed`."""
    return torch.Generator().manual_seed(derive(seed, *names))
