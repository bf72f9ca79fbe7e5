"""Rollouts are data: what was asked and answered, by which experts, how probable it was, and what it was worth.

A rollout is part of every checkpoint, so that a run which is killed in the middle of one goes on with its very tokens.
Nothing in it is ever tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finemoe.generation.sequence import FinishReason
from finemoe.training.method import Saved

Routes = Mapping[int, Tensor]
"""By layer: [tokens, k] int16, the experts of every token that was read: all but the last."""


@dataclass(frozen=True)
class Drawn:
    """An answer as it was written."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """Ids, the one that ended it among them."""
    logprobs: tuple[float, ...]
    """Of each of them when it was drawn, in nats, at the temperature at which it was drawn."""
    finish_reason: FinishReason
    routes: Routes = field(default_factory=dict)
    """Empty where the model has no experts."""


@dataclass(frozen=True)
class Answer:
    """An answer, judged and compared with its group."""

    drawn: Drawn
    group: int
    """Answers to the same prompt have the same."""
    item: int
    """The prompt's number among those of training."""
    value: float | None
    """Of all its rewards; None where one of them failed: it has left its group, and teaches nothing."""
    advantages: tuple[float, ...]
    """Of each token of the completion."""
    rewards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """JSON-able, by name: verdict, value, note."""

    @property
    def counts(self) -> bool:
        """Whether it is compared and learnt."""
        return self.value is not None


@dataclass(frozen=True)
class Scored:
    """What models say of an answer's tokens before the first step on its rollout."""

    old: Tensor | None = None
    """[completion] log-probabilities of the model itself, none of an answer that does not count; None: those of the
    step are the same."""
    reference: Tensor | None = None
    """[completion] log-probabilities of the reference."""
    routes: Routes = field(default_factory=dict)
    """The experts that the model itself chooses, where they are kept for the steps."""


@dataclass(frozen=True)
class Rollout:
    """Answers that are learnt together, group after group."""

    number: int
    answers: tuple[Answer, ...]
    scored: tuple[Scored, ...]
    figures: Mapping[str, float]
    """What it came to; for every step that learns from it."""


def saved(rollout: Rollout | None, prompts_used: int) -> Saved:
    """For a checkpoint, all of it, and how many prompts were asked so far."""
    if rollout is None:
        return Saved(values={"prompts_used": prompts_used})
    answers, scored = rollout.answers, rollout.scored
    drawn = [one.drawn for one in answers]
    ids = [token for one in drawn for token in (*one.prompt, *one.completion)]
    tensors = {
        "ids": torch.tensor(ids),
        "lengths": torch.tensor([(len(one.prompt), len(one.completion)) for one in drawn]),
        "behaviour": torch.tensor([number for one in drawn for number in one.logprobs], dtype=torch.float64),
        "advantages": torch.tensor([number for one in answers for number in one.advantages], dtype=torch.float64),
    }
    for name in ("old", "reference"):
        column = [getattr(one, name) for one in scored]
        if column[0] is not None:
            tensors[name] = torch.cat(column)
    for name, routes in (("drawn", [one.routes for one in drawn]), ("chosen", [one.routes for one in scored])):
        tensors |= {f"{name}.{layer}": torch.cat([one[layer] for one in routes]) for layer in routes[0]}
    said = [
        {"finish_reason": one.drawn.finish_reason, "group": one.group, "item": one.item, "value": one.value,
         "rewards": one.rewards}
        for one in answers
    ]  # fmt: skip
    values = {"prompts_used": prompts_used, "number": rollout.number, "figures": rollout.figures, "answers": said}
    return Saved(tensors, values)


def restored(state: Saved) -> tuple[Rollout | None, int]:
    """What `saved` kept."""
    values, tensors = state.values, {name: one.cpu() for name, one in state.tensors.items()}
    if "number" not in values:
        return None, values["prompts_used"]
    lengths = tensors["lengths"].tolist()
    completions = [completion for _, completion in lengths]
    read = [prompt + completion - 1 for prompt, completion in lengths]
    columns: dict[str, Sequence[Any]] = {
        "ids": [one.tolist() for one in tensors["ids"].split([prompt + completion for prompt, completion in lengths])]
    }
    for name in ("behaviour", "advantages"):
        columns[name] = [tuple(one.tolist()) for one in tensors[name].split(completions)]
    scored_of = [0 if said["value"] is None else own for said, own in zip(values["answers"], completions, strict=True)]
    for name in ("old", "reference"):
        columns[name] = tensors[name].split(scored_of) if name in tensors else [None] * len(lengths)
    routes = {name: _routes(tensors, name, read) for name in ("drawn", "chosen")}
    answers, scored = [], []
    for number, (said, (prompt, _)) in enumerate(zip(values["answers"], lengths, strict=True)):
        ids = columns["ids"][number]
        drawn = Drawn(
            tuple(ids[:prompt]), tuple(ids[prompt:]), columns["behaviour"][number], said["finish_reason"],
            routes["drawn"][number],
        )  # fmt: skip
        answers.append(
            Answer(drawn, said["group"], said["item"], said["value"], columns["advantages"][number], said["rewards"])
        )
        scored.append(Scored(columns["old"][number], columns["reference"][number], routes["chosen"][number]))
    return Rollout(values["number"], tuple(answers), tuple(scored), values["figures"]), values["prompts_used"]


def _routes(tensors: Mapping[str, Tensor], name: str, read: Sequence[int]) -> list[dict[int, Tensor]]:
    found: list[dict[int, Tensor]] = [{} for _ in read]
    for key, tensor in tensors.items():
        kind, _, layer = key.partition(".")
        if kind == name:
            for one, piece in zip(found, tensor.split(list(read)), strict=True):
                one[int(layer)] = piece
    return found


def lines(rollout: Rollout, step: int, texts: Sequence[tuple[str, str, str]], whole: bool) -> Iterator[dict[str, Any]]:
    """For rollouts.jsonl: what it came to, and every answer where it is written `whole`.

    Args:
        rollout: at its first step.
        step: which that is.
        texts: of each answer the prompt, the same as it was asked, and the completion without the token that ended it.
        whole: with all ids, log-probabilities and routes.
    """
    yield {"kind": "rollout", "step": step, "rollout": rollout.number, **rollout.figures}
    if not whole:
        return
    for one, (prompt, asked, completion) in zip(rollout.answers, texts, strict=True):
        drawn = one.drawn
        yield {
            "kind": "answer",
            "step": step,
            "rollout": rollout.number,
            "group": one.group,
            "prompt": prompt,
            **({"asked": asked} if asked != prompt else {}),
            "completion": completion,
            "value": one.value,
            "rewards": one.rewards,
            "finish_reason": drawn.finish_reason,
            "prompt_ids": list(drawn.prompt),
            "completion_ids": list(drawn.completion),
            "logprobs": [round(number, 6) for number in drawn.logprobs],
            "advantages": [round(number, 6) for number in one.advantages],
            "routes": {str(layer): chosen.tolist() for layer, chosen in drawn.routes.items()},
        }
