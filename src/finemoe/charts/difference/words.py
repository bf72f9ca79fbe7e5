"""What changed between two checkpoints, in plain sentences: shared by the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.charts.numbers import Results, fixed

_VERDICTS = ("gained", "lost", "undecided", "removed")


def summary(results: Results) -> list[str]:
    """What changed, in a few plain sentences."""
    layers = [(each["layer"], each["domains"]["all"]) for each in results["layers"]]
    rates = [found["flip_rate"]["mean"] for _, found in layers]
    mean = sum(rates) / len(rates)
    most = max(layers, key=lambda found: found[1]["flip_rate"]["mean"])
    lines = [
        f"{percent(mean)} of the choices of experts changed (mean of {len(layers)} layers), most in layer {most[0]}: "
        f"{percent(most[1]['flip_rate']['mean'])}. There, {percent(most[1]['any_change'])} of the tokens have some "
        f"other expert and {percent(most[1]['top1_flip_rate'])} another first one."
    ]
    router, states = (
        sum(found[key] for _, found in layers) / len(layers) for key in ("flip_rate_router", "flip_rate_states")
    )
    lines.append(
        f"With only the routers of the second model {percent(router)} would have changed, and "
        f"{percent(states)} with only the states that they read."
    )
    words = [each["verdict"] for each in results["experts"]]
    tally = ", ".join(f"{words.count(word)} {word}" for word in _VERDICTS if word in words)
    lines.append(f"Load of the {len(words)} experts: {tally}.")
    whole = results["domains"][0]
    moved = plus_interval(whole["difference"])
    lines.append(f"Loss {fixed(whole['loss_a'])} → {fixed(whole['loss_b'])} nats per token: {moved}.")
    return [*lines, *map(str, results["notes"])]


def percent(value: float) -> str:
    """`12.5 %`."""
    return f"{100 * value:.1f} %"


def plus_interval(stat: Mapping[str, Any]) -> str:
    """`−0.192 (−0.205 to −0.178)`."""
    if stat["low"] is None:
        return f"{fixed(stat['mean'])} (too few windows for an interval)"
    return f"{fixed(stat['mean'])} ({fixed(stat['low'])} to {fixed(stat['high'])})"
