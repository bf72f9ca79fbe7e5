"""Rollouts are data: what was asked and answered, by which experts, how probable it was, and what it was worth.

A rollout is part of every checkpoint, so that a run which is killed in the middle of one goes on with its very tokens.
Nothing in it is ever tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from finemoe.generation.sequence import FinishReason
from finemoe.methods.grpo.advantages import outcome
from finemoe.methods.rewards import Answer as Judgeable
from finemoe.methods.rewards import Scored as Judged
from finemoe.training.method import Saved

LENGTH_CORRELATION = "length_correlation"

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

    @property
    def advantage(self) -> float:
        """The mean of its tokens; 0 of an answer without any."""
        return sum(self.advantages) / len(self.advantages) if self.advantages else 0.0


@dataclass(frozen=True)
class Group:
    """All answers to one prompt, judged."""

    item: int
    """The prompt's number among those of training."""
    said: Sequence[Judgeable]
    """Each as rewards read it."""
    drawn: Sequence[Drawn]
    judged: Sequence[Judged]
    advantages: Sequence[Sequence[float]]
    """Of each token of each answer."""

    @property
    def alive(self) -> bool:
        """Whether there is anything to learn."""
        return any(any(one) for one in self.advantages)

    def answers(self, place: int) -> Iterator[Answer]:
        """What of them is learnt and kept, as group `place` of a rollout."""
        for drawn, judged, advantages in zip(self.drawn, self.judged, self.advantages, strict=True):
            rewards = {
                name: {"verdict": one.verdict, "value": one.value, "note": one.note}
                for name, one in judged.by_name.items()
            }
            yield Answer(drawn, place, self.item, judged.value, tuple(advantages), rewards)

    def told(self, place: int) -> Iterator[tuple[Answer, Judgeable]]:
        """The same, each beside its words."""
        return zip(self.answers(place), self.said, strict=True)


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


def figures(groups: Sequence[Group], answers: Sequence[Answer], asked: int) -> dict[str, float]:
    """What a rollout came to: means over answers that count, shares of all, groups that teach nothing."""
    values = [one.value for one in answers if one.value is not None]
    found = {
        **({"reward": sum(values) / len(values)} if values else {}),
        "length": sum(len(one.drawn.completion) for one in answers) / len(answers),
        "cut_share": sum(one.drawn.finish_reason == "length" for one in answers) / len(answers),
        "failed_share": sum(one.value is None for one in answers) / len(answers),
        "dead_groups": sum(not one.alive for one in groups) / len(groups),
        "prompts_asked": float(asked),
    }
    if related := [one for group in groups if (one := _with_length(group)) is not None]:
        found[LENGTH_CORRELATION] = fmean(related)
    for name in answers[0].rewards:
        verdicts = [one.rewards[name]["verdict"] for one in answers]
        known = [one.rewards[name]["value"] for one in answers if one.rewards[name]["verdict"] != "error"]
        if known:
            found[f"reward_{name}"] = sum(known) / len(known)
        found[f"unreadable_{name}"] = verdicts.count("unreadable") / len(verdicts)
    return found


def _with_length(group: Group) -> float | None:
    """The correlation of length and worth of its answers, -1 to 1; None: all are as long, or worth the same."""
    judged = [(one.value, drawn) for one, drawn in zip(group.judged, group.drawn, strict=True) if one.value is not None]
    worths = outcome([value for value, _ in judged], "std")
    lengths = outcome([float(len(drawn.completion)) for _, drawn in judged], "std")
    if not any(worths) or not any(lengths):
        return None
    return fmean(worth * length for worth, length in zip(worths, lengths, strict=True))


def lines(
    rollout: Rollout, step: int, groups: Sequence[Group], discarded: Sequence[Group], *, whole: bool
) -> Iterator[dict[str, Any]]:
    """For rollouts.jsonl: what it came to, and every answer.

    Args:
        rollout: at its first step.
        step: which that is.
        groups: that are learnt, in the order of the rollout's answers.
        discarded: those in whose place others were asked; they are numbered on, and always written in short.
        whole: with all ids, log-probabilities and routes.
    """
    yield {"kind": "rollout", "step": step, "rollout": rollout.number, **rollout.figures}
    of = {"kind": "answer", "step": step, "rollout": rollout.number}
    learnt = [(one, said) for place, group in enumerate(groups) for one, said in group.told(place)]
    for one, said in learnt:
        yield of | _short(one, said) | (_long(one) if whole else {})
    for place, group in enumerate(discarded, len(groups)):
        for one, said in group.told(place):
            yield of | _short(one, said) | {"discarded": True}


def _short(one: Answer, said: Judgeable) -> dict[str, Any]:
    """What people read of an answer."""
    return {
        "group": one.group,
        "item": one.item,
        "prompt": said.prompt,
        **({"asked": said.asked} if said.asked != said.prompt else {}),
        **({"references": list(said.references)} if said.references else {}),
        "completion": said.text,
        "length": len(one.drawn.completion),
        "finish_reason": one.drawn.finish_reason,
        "value": one.value,
        "advantage": round(one.advantage, 6),
        "rewards": one.rewards,
    }


def _long(one: Answer) -> dict[str, Any]:
    """All that it was learnt by."""
    drawn = one.drawn
    return {
        "prompt_ids": list(drawn.prompt),
        "completion_ids": list(drawn.completion),
        "logprobs": [round(number, 6) for number in drawn.logprobs],
        "advantages": [round(number, 6) for number in one.advantages],
        "routes": {str(layer): chosen.tolist() for layer, chosen in drawn.routes.items()},
    }
