"""TokenBatch, and what the trainer asks of any batch: a pair, a rollout or a teacher's scores are batches too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch


class Batch(Protocol):
    """What the trainer asks. A batch of another shape has TokenBatches, and whatever tensors its objective wants."""

    @property
    def num_sequences(self) -> int:
        """What a position counts: rows, pairs, rollouts."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, in all rows: what a run counts as trained on."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        ...


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens with what to predict; every tensor is `[batch, seq]`.

    `targets[b, s]` is the token that should follow `tokens[b, s]`: already shifted. A weight of 0 means no
    loss there.
    """

    tokens: torch.Tensor
    """int64 input ids."""
    targets: torch.Tensor
    """int64 ids to predict; always valid ids, even where the weight is 0."""
    weights: torch.Tensor
    """float32 weight of each target in the loss."""
    positions: torch.Tensor
    """int64 position of each token, from 0; restarts with each document when documents are isolated."""
    documents: torch.Tensor
    """int64 number of each token's document within its row, from 0; attention stays within a document."""

    def __post_init__(self) -> None:
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.tokens.dim() != 2:
            raise ValueError(f"every tensor of a TokenBatch must be [batch, seq], got {shapes}")

    @property
    def num_sequences(self) -> int:
        """Rows in the batch."""
        return self.tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return self.tokens.numel()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        return TokenBatch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.targets, self.weights, self.positions, self.documents


def columns(batch: Batch, piece: int, pieces: int) -> TokenBatch:
    """Piece `piece` of `pieces` of every row.

    Raises:
        TypeError: only rows of tokens can be cut.
    """
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"{type(batch).__name__} has no rows that could be cut into pieces")
    length = batch.tokens.shape[1] // pieces
    part = slice(piece * length, (piece + 1) * length)
    return TokenBatch(*(tensor[:, part] for tensor in batch._tensors()))


@dataclass(frozen=True)
class PackedBatch:
    """Conversations one after the other in a single row, with no padding between them: what padding would do to
    routers, loads and balance losses, it cannot do here.
    """

    rows: TokenBatch
    """`[1, tokens]`; documents are numbered from 0 in order, and each is a sequence by itself."""
    num_sequences: int
    """Positions of the data that the batch holds."""
    num_documents: int
    items: torch.Tensor
    """[items] int64: the numbers of the stored items, in order; of pairs each is two documents."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return self.rows.num_tokens

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`."""
        moved = self.rows.to(device), self.items.to(device)
        return PackedBatch(moved[0], self.num_sequences, self.num_documents, moved[1])
