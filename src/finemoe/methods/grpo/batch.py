"""Answers as a batch: one row without padding, with a column for everything that is known of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.data.batch import TokenBatch
from finemoe.methods.grpo.rollout import Answer, Routes, Scored


@dataclass(frozen=True)
class RolloutBatch:
    """Answers of a rollout. Columns are `[places]`, one for each token that was answered and counts."""

    rows: TokenBatch
    """`[1, tokens]`; each answer is a document, which begins with its prompt. Weights are 1 at `places`, else 0."""
    num_sequences: int
    """Positions of the data: answers."""
    places: Tensor
    """[places] int64 into the row."""
    answers: Tensor
    """[places] int64: the answer of each."""
    num_counting: int
    """Answers with a place."""
    advantages: Tensor
    behaviour: Tensor
    old: Tensor | None
    reference: Tensor | None
    routes: Mapping[int, Tensor]
    """By layer [tokens, k] int64: the experts when it was written."""
    replay: Mapping[int, Tensor]
    """By layer [tokens, k] int64: the experts that are taken; empty where the router chooses."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return self.rows.num_tokens

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same batch on `device`."""

        def moved(one: Tensor) -> Tensor:
            return one.to(device, non_blocking=True)

        return RolloutBatch(
            rows=self.rows.to(device),
            num_sequences=self.num_sequences,
            places=moved(self.places),
            answers=moved(self.answers),
            num_counting=self.num_counting,
            advantages=moved(self.advantages),
            behaviour=moved(self.behaviour),
            old=None if self.old is None else moved(self.old),
            reference=None if self.reference is None else moved(self.reference),
            routes={layer: moved(one) for layer, one in self.routes.items()},
            replay={layer: moved(one) for layer, one in self.replay.items()},
        )


def packed(answers: Sequence[Answer], scored: Sequence[Scored], replay: Sequence[Routes] | None = None) -> RolloutBatch:
    """Answers one behind the other; `replay`: of each, the experts that are taken."""
    tokens: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    positions: list[int] = []
    documents: list[int] = []
    for number, one in enumerate(answers):
        ids, prompt = (*one.drawn.prompt, *one.drawn.completion), len(one.drawn.prompt)
        length = len(ids) - 1
        tokens += ids[:-1]
        targets += ids[1:]
        weights += [0.0] * (prompt - 1) + [float(one.counts)] * (length - prompt + 1)
        positions += range(length)
        documents += [number] * length
    rows = TokenBatch(
        tokens=torch.tensor([tokens]),
        targets=torch.tensor([targets]),
        weights=torch.tensor([weights]),
        positions=torch.tensor([positions]),
        documents=torch.tensor([documents]),
    )
    places = rows.weights[0].nonzero()[:, 0]
    counting = [number for number, one in enumerate(answers) if one.counts]

    def column(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([one for number in counting for one in values[number]], dtype=torch.float32)

    def known(values: Sequence[Tensor | None]) -> Tensor | None:
        found = [one for number in counting if (one := values[number]) is not None]
        return torch.cat(found) if found else None

    return RolloutBatch(
        rows=rows,
        num_sequences=len(answers),
        places=places,
        answers=rows.documents[0, places],
        num_counting=len(counting),
        advantages=column([one.advantages for one in answers]),
        behaviour=column([one.drawn.logprobs for one in answers]),
        old=known([one.old for one in scored]),
        reference=known([one.reference for one in scored]),
        routes=_joined([one.drawn.routes for one in answers]),
        replay=_joined(replay or ()),
    )


def _joined(routes: Sequence[Routes]) -> dict[int, Tensor]:
    if not routes:
        return {}
    return {layer: torch.cat([one[layer] for one in routes]).long() for layer in routes[0]}
