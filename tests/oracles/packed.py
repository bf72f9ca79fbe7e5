"""Batches of conversations without padding, drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from finemoe.data.batch import PackedBatch, TokenBatch


def packed(lengths: tuple[int, ...], vocab: int, seed: int = 0, share: float = 0.5, pairs: bool = False) -> PackedBatch:
    """Documents of so many input tokens, of which about `share` are to be learnt, and always the last."""
    drawn = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("tokens", "targets", "weights", "positions", "documents")}
    for number, length in enumerate(lengths):
        ids = torch.randint(vocab, (length + 1,), generator=drawn)
        weights = (torch.rand(length, generator=drawn) < share).float()
        weights[-1] = 1.0
        values = (ids[:-1], ids[1:], weights, torch.arange(length), torch.full((length,), number))
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    count = len(lengths) // 2 if pairs else len(lengths)
    flat = {name: torch.cat(parts)[None] for name, parts in rows.items()}
    return PackedBatch(TokenBatch(**flat), count, len(lengths), torch.arange(count))


def alone(batch: PackedBatch) -> list[PackedBatch]:
    """Every document of `batch` as a batch of its own."""
    found = []
    for number in range(batch.num_documents):
        here = batch.rows.documents[0] == number
        columns = (batch.rows.tokens, batch.rows.targets, batch.rows.weights, batch.rows.positions)
        rows = TokenBatch(*(one[:, here] for one in columns), torch.zeros_like(batch.rows.tokens[:, here]))
        found.append(PackedBatch(rows, 1, 1, torch.tensor([number])))
    return found
