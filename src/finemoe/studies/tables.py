"""The result of a comparison for a terminal of 80 columns, and as CSV for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from finemoe.charts.comparison.words import (
    Pair,
    arm_names,
    by_loss,
    known_pairs,
    pair_sentence,
    speed_of,
    stat,
    unequal_cost,
)
from finemoe.charts.numbers import Results, clean, count, decimals_for, finite, plus_minus, scientific

NAME_WIDTH = 18  # with every other column at its widest, the line ends at column 80
MOST_PAIRS = 12  # more of them scroll the table away; the page and the CSV have all


def comparison_table(results: Results) -> Group:
    """Arms, best first, then one plain sentence for each pair; fits 80 columns.

    Loss in nats per token, ± half its interval. Untrusted labels are `Text`, so that rich reads no markup in them.
    """
    results = clean(results)
    names, arms = arm_names(results), results["arms"]
    digits = decimals_for(stat(record, "validation_loss") for record in arms.values())
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("Arm", no_wrap=True)
    speed, _, spoken = speed_of(results)
    for title in ("Loss", "Total/active", "FLOPs", spoken, "MaxVio"):
        table.add_column(title, justify="right", no_wrap=True)
    ranked = by_loss(results)
    for arm in [*ranked, *(arm for arm in arms if arm not in ranked)]:
        record = arms[arm]
        sizes = "/".join(count(record.get(key)) for key in ("total_parameters", "active_parameters"))
        cells = [
            plus_minus(stat(record, "validation_loss"), digits), sizes,
            scientific(record.get("training_flops")), count(record.get(speed)),
            plus_minus({"mean": stat(record, "max_vio").get("mean")}, 2),
        ]  # fmt: skip
        name = Text(names[arm])
        name.truncate(NAME_WIDTH, overflow="ellipsis")
        table.add_row(name, *(Text(cell) for cell in cells), style="bold" if ranked and arm == ranked[0] else "")
    parts: list[Any] = [table]
    if not results.get("complete", True):
        parts.insert(0, Text("Incomplete: some runs have not finished.", style="yellow"))
    if lines := _pair_lines(known_pairs(results), ranked, names):
        parts += [Text(""), lines]
    parts += [Text(line) for line in unequal_cost(results)]
    return Group(*parts)


def _pair_lines(pairs: Sequence[Pair], ranked: Sequence[str], names: Mapping[str, str]) -> Table | None:
    """A sentence for each decided pair, one for all that are undecided for one reason; of many, the best arm's."""
    shown = list(pairs)
    if len(shown) > MOST_PAIRS:
        shown = [pair for pair in shown if ranked and ranked[0] in (pair["a"], pair["b"])]
    if not pairs:
        return None
    lines = Table.grid(padding=(0, 1))
    undecided: dict[str, list[str]] = {}
    for pair in shown:
        if pair.get("verdict") in ("better", "worse"):
            lines.add_row("-", Text(pair_sentence(pair, names)))
        else:
            reason = str(pair.get("reason") or "no reason recorded").strip().rstrip(".")
            undecided.setdefault(reason, []).append(f"{names[pair['a']]} and {names[pair['b']]}")
    for reason, which in undecided.items():
        text = f"Undecided ({reason}): {'; '.join(which)}."
        lines.add_row(
            "?", Text(f"All {len(which)} pairs are undecided ({reason})." if 1 < len(which) == len(pairs) else text)
        )
    if left := len(pairs) - len(shown):
        lines.add_row("", Text(f"{left} pairs among the other arms are in the report."))
    return lines


_STATS = ("validation_loss", "bits_per_byte", "max_vio")
_NUMBERS = (
    "dead_experts", "total_parameters", "active_parameters", "expert_parameters", "active_expert_parameters",
    "training_flops", "seconds", "tokens", "tokens_per_second", "learning_rate", "processor_seconds",
    "tokens_per_processor_second",
)  # fmt: skip
_MISMATCHES = ("total_percent", "active_percent", "flops_percent")


def comparison_csv(results: Results) -> str:
    """One row for each arm, in the order of `results`: means over seeds with their intervals, and the number of seeds.

    Full precision; an absent or non-finite value is an empty field. RFC 4180 with a header line.
    """
    results = clean(results)
    columns = ["arm", "label", "routing", "seeds"]
    columns += [f"{name}{suffix}" for name in _STATS for suffix in ("", "_low", "_high")]
    columns += [*_NUMBERS, *(f"mismatch_{name}" for name in _MISMATCHES), "paper_pile_loss"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for arm, record in results["arms"].items():
        row: dict[str, Any] = {"arm": arm, "label": record.get("label"), "routing": record.get("routing")}
        row["seeds"] = len(stat(record, "validation_loss").get("seeds") or [])
        for name in _STATS:
            value = stat(record, name)
            row |= {
                name: value.get("mean"),
                f"{name}_low": value.get("low"),
                f"{name}_high": value.get("high"),
            }
        row |= {name: record.get(name) for name in _NUMBERS}
        row |= {f"mismatch_{name}": (record.get("mismatch") or {}).get(name) for name in _MISMATCHES}
        row["paper_pile_loss"] = finite((record.get("paper") or {}).get("pile_loss"))
        writer.writerow(row)
    return text.getvalue()
