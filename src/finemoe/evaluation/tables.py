"""Results of an evaluation for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from finemoe.charts.evaluation.words import (
    chance_text,
    difference_text,
    p_text,
    score_text,
    short_duration,
    short_metric,
)
from finemoe.charts.numbers import Results, count
from finemoe.charts.words import listed


def score_table(results: Results) -> Table:
    """A row a task and model."""
    several = len(results["models"]) > 1
    left = ["Task", "Metric", *(["Model"] if several else [])]
    table = _table(left, ["Score ± SE", "n", "Out", "Cut", "Chance", "Time"])
    for task, about in results["tasks"].items():
        told = [task, short_metric(about["metric"])]
        for model, scores in results["scores"].items():
            if task not in scores:
                continue
            own = scores[task]
            table.add_row(
                *(*told, *([Text(model)] if several else [])),
                score_text(own["metrics"].get(about["metric"]), about["metric"]),
                str(own["n"]),
                str(left_out(own)),
                str(own["truncated"] + own["unfinished"]),
                chance_text(about["chance"], about["metric"]),
                short_duration(own["seconds"]),
            )
            told = ["", ""]
    return table


def difference_table(results: Results) -> Table:
    """A row a task and pair of models."""
    table = _table(["Task", "First", "Second"], ["First − second ± SE", "p", "First is"])
    for pair in results["differences"]:
        metric = pair["metric"]
        table.add_row(
            pair["task"],
            Text(pair["a"]),
            Text(pair["b"]),
            difference_text(pair, metric),
            p_text(pair["p_value"]),
            pair["verdict"],
        )
    return table


def left_out(scores: Mapping[str, Any]) -> int:
    """Records that could not be read and items that could not be judged."""
    return int(scores["skipped"]) + int(scores["outcomes"].get("error", 0))


def notes(results: Results) -> Iterator[str]:
    """What the table's numbers need to be read rightly."""
    every = [own for scores in results["scores"].values() for own in scores.values()]
    headline = (own["metrics"].get(own["metric"]) for own in every)
    if any(made and made["standard_error"] == 0 and made["method"] == "binomial" for made in headline):
        yield "≤, ≥: all items were wrong, or all right; in brackets the end of the 95 % interval."
    few = [pair for pair in results["differences"] if "decide nothing" in pair.get("reason", "")]
    for pair in few:
        yield f"{pair['task']}, {pair['a']} and {pair['b']}: undecided, as there are {pair['reason']}."
    if any(left_out(own) for own in every):
        yield "Out: records that could not be read, and items whose judging failed; neither is a wrong answer."
    if any(own["truncated"] + own["unfinished"] for own in every):
        yield "Cut: items whose context was cut from the left to fit the model, and answers cut at their most tokens."
    if any(own["outcomes"].get("undecided") for own in every):
        yield (
            "Undecided answers: it could not be told whether they are right. They score as wrong, so the score "
            "is a lower bound; pip install 'finemoe[eval]' brings math-verify, which decides more."
        )
    for model, scores in results["scores"].items():
        for task, own in scores.items():
            odd = {k: n for k, n in own["outcomes"].items() if k not in ("answered", "no_answer")}
            if odd:
                what = listed([f"{number} {outcome}" for outcome, number in sorted(odd.items())])
                yield f"{model}, {task}: {what} of {own['asked']} items" + (
                    f"; for one, {own['notes'][0]}" if own["notes"] else ""
                )
    speeds = [own["tokens_per_second"] for own in every if own["tokens_per_second"]]
    reused = sum(own["reused_answers"] for own in every)
    if speeds:
        yield (
            f"Speed: {count(min(speeds))} to {count(max(speeds))} tokens/s."
            if len(speeds) > 1
            else (f"Speed: {count(speeds[0])} tokens/s.")
        )
    if reused:
        yield f"{reused} answers were kept from before."


def _table(left: list[str], right: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=heading != "First is")
    return table
