"""The page of `finemoe paper RECIPE`: each claim with its verdict, and what the model of every stage can do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import NOTHING, Results, clean, fixed, plus_minus, scientific
from finemoe.charts.page import Bullets, Code, Figure, Section, Table, Text, render_page
from finemoe.charts.paper.words import COLUMNS, claim_row, counted, every_claim
from finemoe.charts.words import footer

_SHARES = {"right": "Pass@1", "greedy": "Greedy", "majority": "Maj@{k}", "any": "Pass@{k}"}
_CLAIM_COLUMNS = tuple(column for column in COLUMNS if column != "On training text")


def stages_page(results: Results) -> str:
    """The whole report as one self-contained HTML document."""
    results = clean(results)
    sections = [_verdicts(results), *_abilities(results), _stages(results), *_tuning(results), _how(results)]
    seeds = len(results["seeds"])
    subtitle = f"{results['date'][:10]} · {seeds} seed{'s' * (seeds != 1)}"
    waiting = sum(claim["verdict"] == "not run" for claim in every_claim(results))
    banner = f"{waiting} claims are not judged: their stages have not finished." if waiting else ""
    return render_page(
        results["title"], sections, subtitle=subtitle, banner=banner, footer=footer(results["finemoe_version"])
    )


def figures(results: Results) -> dict[str, Any]:
    """Every figure that `results` can fill, by file name."""
    chart = abilities(results)
    return {} if chart is None else {"right": chart}


def _verdicts(results: Results) -> Section:
    claims = every_claim(results)
    rows = [[cell for column, cell in zip(COLUMNS, claim_row(claim), strict=True) if column in _CLAIM_COLUMNS]
            for claim in claims]  # fmt: skip
    strong = [number for number, claim in enumerate(claims) if claim["verdict"] == "contradicted"]
    note = results["experiments"]["claims"]["note"]
    return Section("Verdicts", [
        Text([counted(results)]),
        Table("Claim by claim", _CLAIM_COLUMNS, rows, numeric=(6,), note=note, strong=strong, wrap=True),
        Text(["A verdict is about these models and this task alone. Each claim is tested on its own at 95 %, so of "
              "twenty that are not so about one would still look decided by chance."]),
    ])  # fmt: skip


def _abilities(results: Results) -> Iterator[Section]:
    chart = abilities(results)
    if chart is not None:
        caption = (
            "Right answers of every stage's model at the temperature of the examination: mean, 95 % interval, seeds."
        )
        yield Section("What they can do", [Figure([chart], caption)])


def abilities(results: Results) -> Any:
    """A row for each stage that trains: share of right answers, with its interval and the single seeds."""
    rows, seeds = [], []
    for stage in clean(results)["stages"]:
        if found := stage["figures"].get("right"):
            rows.append({"stage": stage["name"], "share": found["mean"], "low": found["low"], "high": found["high"],
                         "text": f"{found['mean']:.0%}"})  # fmt: skip
            seeds += [{"stage": stage["name"], "share": value} for value in found["seeds"].values()]
    if not rows:
        return None
    scale, title = alt.Scale(domain=[0, 1], nice=False, clamp=True), "share of right answers"
    y = alt.Y("stage:N", title=None, scale=alt.Scale(type="band", domain=[row["stage"] for row in rows]),
              axis=alt.Axis(grid=True, ticks=False, domain=False, labelLimit=200))  # fmt: skip
    x = alt.X("share:Q", title=title, scale=scale, axis=alt.Axis(format="%", tickCount=5))
    marks = theme.base(rows)
    bar = marks.mark_rule(strokeWidth=2.4).encode(alt.X("low:Q", title=title, scale=scale), y, alt.X2("high:Q"))
    bar = bar.transform_filter("datum.low !== null")
    each = theme.base(seeds).mark_tick(thickness=1.5, size=13, opacity=0.65).encode(x, y)
    tooltip = [alt.Tooltip("stage:N"), *(alt.Tooltip(f"{key}:Q", format=".3f") for key in ("share", "low", "high"))]
    dot = marks.mark_point(size=80, filled=True, opacity=1).encode(x, y, tooltip=tooltip)
    text = marks.mark_text(dy=-12).encode(x, y, text="text:N")
    told = ", ".join(f"{row['stage']} {row['text']}" for row in rows)
    return alt.layer(bar, each, dot, text).properties(
        width=theme.WIDTH - 140, height=alt.Step(36), description=f"{title} by stage: {told}."
    )


def _stages(results: Results) -> Section:
    others = list(dict.fromkeys(name for one in results["stages"] for name in one["figures"]))
    others = [name for name in others if name not in (*_SHARES, "flops", "all_flops", "length")]
    shares = (words.format(k=results["samples"]) for words in _SHARES.values())
    columns = ("Stage, and what it came from", *shares, "Tokens", *others, "FLOPs", "With all before")
    rows = []
    for one in results["stages"]:
        found = one["figures"]
        told = [plus_minus(found.get(name), 2) for name in (*_SHARES, "length", *others)]
        if one["kind"] == "sampled":
            told = [f"{one['kept'] / max(1, one['drawn']):.0%} kept", *[NOTHING] * (len(told) - 1)]
        name = " ← ".join([one["name"], *([", ".join(one["from"])] if one["from"] else [])])
        rows.append([name, *told, scientific(one["flops"]), scientific(one["all_flops"])])
    note = (
        f"At most {results['questions']} held-out questions, {results['samples']} answers to each at temperature "
        f"{results['temperature']:g}, and one greedily. Shares that are right: Pass@1 of one answer, Maj@K of the most "
        "frequent of K, Pass@K of any of them. FLOPs of training, with those of the answers that GRPO writes "
        "and reads; where a stage only answers, of its answers. What the reference or the teacher of another method "
        "reads is not counted. With all before: of every stage that it came from too."
    )
    caption = "Means over seeds ± half the 95 % interval"
    return Section(
        "Stages", [Table(caption, columns, rows, numeric=tuple(range(1, len(columns))), note=note, wrap=True)]
    )


def _tuning(results: Results) -> Iterator[Section]:
    items = []
    for one in results["tuning"]:
        tried = ", ".join(f"{value}: {fixed(got, 3)}" for value, got in one["came_to"].items())
        items.append(f"{one['stage']}, {one['key']}, by {one['figure']}: {tried}")
    if items:
        said = (
            "Tried on a seed of its own, by the questions that claims are judged by; the best is what every seed got."
        )
        yield Section("What was tried before", [Text([said]), Bullets(items)])


def _how(results: Results) -> Section:
    machine = results["machine"]
    text = [
        f"{machine.get('processor')}, {machine.get('cores')} cores, torch {machine.get('torch')}; "
        f"{machine['parallel_runs']} seeds at once.",
        "A claim sets two figures of stages with the same seed against each other; the interval is Student's t over "
        "seeds. reproduced: the interval allows nothing else; contradicted: it excludes the claim; undecided: it "
        "allows both.",
        *results["notes"],
    ]
    return Section("How it was done", [Text(text), Code(results["command"], "Command for everything")])
