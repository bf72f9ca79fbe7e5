"""Results of an evaluation as plain values: scores with intervals, counts of what was left out, paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from finemoe.core.environment import environment
from finemoe.evaluation.metrics import LOWER_IS_BETTER, Estimate, estimate, macro, paired_difference
from finemoe.evaluation.runner import Asked, Settings
from finemoe.evaluation.task import Judged

SCHEMA = 1
"""Of results.json; raised when a field changes its meaning."""


@dataclass(frozen=True)
class Evaluated:
    """A model and what it answered, by task."""

    name: str
    about: Mapping[str, Any]
    """As `describe_model` gives it."""
    asked: Mapping[str, Asked]


def results(
    models: Sequence[Evaluated],
    settings: Settings,
    *,
    command: str = "",
    sandbox: Mapping[str, str] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything there is to report, ready for JSON.

    Args:
        models: in the order to show them.
        settings: how they were asked.
        command: what was typed.
        sandbox: its layers and which are active, where code was run.
        sampling: samples and temperature, where they were set.
    """
    tasks = {name: asked for model in models for name, asked in model.asked.items()}
    made = environment()
    return {
        "schema": SCHEMA,
        "kind": "evaluation",
        "version": made["packages"]["finemoe"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "settings": {
            **asdict(settings),
            "sampling": dict(sampling or {}),
            "sandbox": None if sandbox is None else dict(sandbox),
        },
        "machine": made,
        "models": {model.name: dict(model.about) for model in models},
        "tasks": {name: _about_task(asked) for name, asked in tasks.items()},
        "scores": {
            model.name: {name: _scores(a, settings.seed) for name, a in model.asked.items()} for model in models
        },
        "differences": list(differences(models, settings.seed)),
    }


def differences(models: Sequence[Evaluated], seed: int) -> Sequence[dict[str, Any]]:
    """The headline metric of every pair of models on every task that both did, by the items that both answered."""
    found = []
    for number, first in enumerate(models):
        for second in models[number + 1 :]:
            for name in first.asked:
                if name in second.asked and (made := _difference(first, second, name, seed)) is not None:
                    found.append(made)
    return found


def scores_of(asked: Asked, metric: str) -> dict[str, Judged]:
    """Judged items by id that have this metric. A checker's own error is no answer, and counts nowhere."""
    pairs = zip(asked.items, asked.judged, strict=True)
    return {item.id: judged for item, judged in pairs if judged.outcome != "error" and metric in judged.scores}


def _about_task(asked: Asked) -> dict[str, Any]:
    task = asked.task
    shots = [item.facts.get("shots", 0) for item in asked.items] or [0]
    return {
        "title": task.title,
        "metric": task.metric,
        "chance": task.chance,
        "lower_is_better": task.metric in LOWER_IS_BETTER,
        "shots": min(shots),
        "shots_most": max(shots),
        "shots_wanted": asked.shots,
        "prompts": asked.prompts,
        "items": len(asked.items),
    }


def _scores(asked: Asked, seed: int) -> dict[str, Any]:
    task = asked.task
    metrics = dict.fromkeys([task.metric, *(name for judged in asked.judged for name in judged.scores)])
    found = {name: made for name in metrics if (made := _estimate(scores_of(asked, name), name, task.name, seed))}
    groups = _groups(asked, seed)
    headline = found.get(task.metric)
    return {
        "metric": task.metric,
        "value": None if headline is None else headline.value,
        "metrics": {name: asdict(made) for name, made in found.items()},
        "groups": {name: asdict(made) for name, made in groups.items()},
        "macro": asdict(macro(list(groups.values()))) if len(groups) > 1 else None,
        "n": 0 if headline is None else headline.n,
        "asked": len(asked.items),
        "skipped": asked.skipped,
        "truncated": asked.truncated,
        "unfinished": asked.unfinished,
        "outcomes": asked.outcomes,
        "notes": _notes(asked),
        "tokens": asked.tokens,
        "seconds": round(asked.seconds, 3),
        "answering_seconds": round(asked.answering, 3),
        "tokens_per_second": round(asked.tokens / asked.answering, 1) if asked.tokens and asked.answering else None,
        "reused_answers": asked.reused,
    }


def _estimate(judged: Mapping[str, Judged], metric: str, of: str, seed: int) -> Estimate | None:
    """The metric over `judged`; `of` names the task and group. None without items that count."""
    if not judged or not math.fsum(j.weight for j in judged.values()) > 0:
        return None
    return estimate(
        [j.scores[metric] for j in judged.values()], [j.weight for j in judged.values()], f"{of}/{metric}", seed
    )


def _groups(asked: Asked, seed: int) -> dict[str, Estimate]:
    """The headline metric by group; none where the items have no group."""
    metric, name = asked.task.metric, asked.task.name
    judged = scores_of(asked, metric)
    members: dict[str, dict[str, Judged]] = {}
    for item in asked.items:
        if item.group is not None and item.id in judged:
            members.setdefault(item.group, {})[item.id] = judged[item.id]
    made = {group: _estimate(own, metric, f"{name}/{group}", seed) for group, own in sorted(members.items())}
    return {group: found for group, found in made.items() if found is not None}


def _notes(asked: Asked) -> list[str]:
    """Why items came to a bad end: the first of each."""
    found: dict[str, str] = {}
    for item, judged in zip(asked.items, asked.judged, strict=True):
        if judged.outcome not in ("answered", "no_answer"):
            found.setdefault(judged.outcome, f"{item.id}: {judged.outcome}: {judged.note}")
    return list(found.values())


def _difference(first: Evaluated, second: Evaluated, name: str, seed: int) -> dict[str, Any] | None:
    one, two = first.asked[name], second.asked[name]
    metric = one.task.metric
    left, right = scores_of(one, metric), scores_of(two, metric)
    shared = [id for id in left if id in right]
    if not shared:
        return None
    made = paired_difference(
        [left[id].scores[metric] for id in shared],
        [right[id].scores[metric] for id in shared],
        [left[id].weight for id in shared],
        lower_is_better=metric in LOWER_IS_BETTER,
        stream=f"{name}/{metric}/{first.name}/{second.name}",
        seed=seed,
    )
    return {"task": name, "metric": metric, "a": first.name, "b": second.name, **asdict(made)}
