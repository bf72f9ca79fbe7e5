"""The figures of a run that learns from its own answers: rewards, lengths, how far the model has gone, its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import Results, finite, fixed
from finemoe.charts.run.figures import along_steps, line_chart

_FLAT = 1e-6
"""What stays below it is rounding, and a chart of it would draw noise."""
_FLOORS = {"kl": 1e-3, "off_policy_kl": 1e-3, "length": 1.0, "length_correlation": 1.0}
"""What an axis reaches at least, so that a trifle looks like one; of a share it is a hundredth."""
_NAMES = {
    "length": "tokens of an answer", "length_correlation": "correlation of length and reward",
    "kl": "divergence from the reference", "entropy": "entropy",
    "dead_groups": "groups without spread", "cut_share": "answers cut at their length",
    "clip_share": "tokens that are clipped", "expert_mismatch": "experts that differ", "off_policy_kl": "off-policy KL",
    "failed_share": "answers not judged",
}  # fmt: skip
_SHARES = {"dead_groups", "expert_mismatch"}
_TIME = {"time_rollout": "rollout", "time_reward": "reward", "time_update": "update"}


def charts(results: Results) -> tuple[list[Any], list[str]]:
    """A small chart for each figure that its steps have, and the names of those that were 0 all the time."""
    steps = [{**point, **point.get("figures", {})} for point in results["steps"]]
    laid = {**results, "steps": steps}
    drawn, flat = [], []
    for name, title in _shown(results, steps).items():
        values = [value for one in steps if (value := finite(one.get(name))) is not None]
        if not values:
            continue
        if max(map(abs, values)) < _FLAT:
            flat.append(title)
            continue
        share = is_share(name)
        floor = 0.01 if share else _FLOORS.get(name)
        drawn.append(line_chart(laid, name, title, "~%" if share else "~g", floor=floor))
    if (time := time_chart(results)) is not None:
        drawn.append(time)
    return drawn, flat


def is_share(name: str) -> bool:
    """Whether a figure is a share, which people read as percents."""
    return name in _SHARES or name.endswith("_share") or name.startswith("unreadable_")


def title_of(results: Results, name: str) -> str:
    """What people call a figure of a step, or one that was measured on held-out questions."""
    name = name.removeprefix("validation_")
    greedy = name.startswith("greedy_")
    name = name.removeprefix("greedy_")
    if name in _NAMES:
        return _NAMES[name]
    kind, _, of = name.partition("_")
    if not of or kind not in ("reward", "unreadable"):
        return name.replace("_", " ")
    if greedy:
        return f"greedily: {of}"
    if kind == "unreadable":
        return f"nothing to judge: {of}"
    return f"only watched: {of}" if of in _watched(results) else f"{of}, before its weight"


def _shown(results: Results, steps: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Figures in the order of the page; of a single reward there is no more to say than the reward itself."""
    known = dict.fromkeys(name for one in steps for name in one)
    rewards = [name for name in known if name.startswith("reward_") and not repeats(steps, name, "reward")]
    length, related, *others = _NAMES
    unreadable = [name for name in known if name.startswith("unreadable_")]
    return {name: title_of(results, name) for name in (length, related, *rewards, *others, *unreadable)}


def repeats(points: Sequence[Mapping[str, Any]], name: str, other: str) -> bool:
    """Whether two figures are the same wherever there is one of them."""
    pairs = [(finite(one.get(name)), finite(one.get(other))) for one in points]
    return all(a == b or (a is not None and b is not None and abs(a - b) < _FLAT) for a, b in pairs)


def _watched(results: Results) -> set[str]:
    rewards = results["config"]["method"].get("rewards") or ()
    return {one.get("name") or one["kind"] for one in rewards if one.get("weight") == 0}


def time_chart(results: Results) -> Any | None:
    """Where the time of each step went."""
    x = along_steps(results)
    rows = [
        {"x": point["step"], "step": point["step"], "value": value, "arm": title}
        for point in results["steps"]
        for name, title in _TIME.items()
        if (value := finite(point.get("figures", {}).get(name))) is not None
    ]
    titles = [title for title in _TIME.values() if any(row["arm"] == title for row in rows)]
    if len(titles) < len(_TIME):  # runs of earlier versions did not say what else there was
        return None
    legend = alt.Legend(orient="top", title=None, columns=3)
    color = alt.Color("arm:N", scale=alt.Scale(domain=titles), legend=legend)
    dash = alt.StrokeDash("arm:N", scale=alt.Scale(domain=titles, range=theme.arm_dashes(len(titles))), legend=legend)
    y = alt.Y("value:Q", title="share of a step's time", scale=alt.Scale(domain=[0, 1]),
              axis=alt.Axis(tickCount=5, format="~%"))  # fmt: skip
    tips = [alt.Tooltip("arm:N", title="for"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".0%")]
    last = {row["arm"]: row for row in rows}
    said = ", ".join(f"{name} {fixed(row['value'], 2)}" for name, row in last.items())
    chart = theme.base(rows).mark_line(strokeWidth=1.6).encode(x, y, color, dash, tooltip=tips)
    return chart.properties(width=260, height=170, description=f"Shares of a step's time. At the end: {said}.")
