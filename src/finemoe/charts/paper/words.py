"""The verdicts of `finemoe paper` in words: shared by the page, the terminal and a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finemoe.charts.numbers import NOTHING, Results, clean, fixed, plus_minus
from finemoe.charts.words import listed

_ORDER = ("contradicted", "reproduced", "undecided", "not run")


def counted(results: Results) -> str:
    """One sentence: how many claims came out how."""
    claims = every_claim(results)
    twins = [claim["on_training_text"] for claim in claims if claim["on_training_text"]]
    if not twins:  # nothing of it is about losses
        return f"Of {len(claims)} claims: {_tally(claims)}."
    first = f"By held-out text, of {len(claims)} claims: {_tally(claims)}."
    return f"{first} By the text they train on, of the {len(twins)} that compare two arms' losses: {_tally(twins)}."


def _tally(outcomes: Sequence[Mapping[str, Any]]) -> str:
    counts = {verdict: sum(outcome["verdict"] == verdict for outcome in outcomes) for verdict in _ORDER}
    return listed([f"{number} {verdict}" for verdict, number in counts.items() if number])


def claim_row(claim: Mapping[str, Any]) -> list[str]:
    """The cells of a claim, under `COLUMNS`."""
    decimals = 2 if claim["unit"] == "MaxVio" else 3
    ours = f"{plus_minus(claim['a'], decimals)} against {plus_minus(claim['b'], decimals)}"
    span = _span(claim, decimals)
    twin = claim.get("on_training_text")
    training = f"{_span(twin, decimals)}: {twin['verdict']}" if twin else NOTHING
    seeds = str(len(claim["seeds"])) if claim["seeds"] else NOTHING
    verdict = f"{claim['verdict']}, no room" if claim.get("no_room") else claim["verdict"]
    return [claim["statement"], verdict, claim["printed"], ours, span, training, claim["source"], seeds]


COLUMNS = ("Claim", "Verdict", "Printed", "Ours", "Difference, 95 %", "On training text", "Source", "Seeds")


def _span(outcome: Mapping[str, Any], decimals: int) -> str:
    """`-0.059 (-0.071 to -0.047)`, as far as there is one."""
    found = outcome.get("difference") or {}
    if found.get("mean") is None:
        return NOTHING
    if found.get("low") is None:
        return fixed(found["mean"], decimals)
    return f"{fixed(found['mean'], decimals)} ({fixed(found['low'], decimals)} to {fixed(found['high'], decimals)})"


def summary_markdown(results: Results) -> str:
    """The table of claims for a document."""
    results = clean(results)
    lines = [
        counted(results),
        "",
        f"| {' | '.join(COLUMNS[:7])} |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in every_claim(results):
        row = claim_row(claim)
        if row[1] == "contradicted":
            row[1] = "**contradicted**"
        lines.append(f"| {' | '.join(_escaped(row[:7]))} |")
    return "\n".join(lines) + "\n"


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def every_claim(results: Results) -> list[Mapping[str, Any]]:
    """The claims of all experiments, in order, with the name of their experiment."""
    return [{**claim, "experiment": name} for name, one in results["experiments"].items() for claim in one["claims"]]
