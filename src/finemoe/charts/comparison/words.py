"""What a comparison found, in plain sentences: shared by the page and the terminal.

`results` is the dict that `finemoe compare` writes as results.json. A verdict is a's, relative to b; lower is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finemoe.charts.numbers import Results, finite, fixed, plus_minus
from finemoe.charts.words import listed

LONGEST_NAME = 20
_ALIKE = 1.05  # FLOPs of two arms that were meant to cost the same, after whole steps
Pair = Mapping[str, Any]


def arm_names(results: Results) -> dict[str, str]:
    """Arm -> the name shown for it: its label, shortened, and told apart where two labels are equal."""
    names: dict[str, str] = {}
    for arm, record in results["arms"].items():
        wanted = _shorten(str(record.get("label") or arm))
        if wanted in names.values():
            wanted = _shorten(str(arm))
        number = 2
        while wanted in names.values():
            wanted = f"{wanted[: LONGEST_NAME - 4]} ({number})"
            number += 1
        names[arm] = wanted
    return names


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1].rstrip() + "…"


def stat(arm: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The `mean`, `low`, `high` and `seeds` of one measure; empty where the arm has none (yet)."""
    return arm.get(name) or {}


def loss(arm: Mapping[str, Any]) -> float | None:
    """Mean final validation loss in nats per token; None while there is none, or when it is not finite."""
    return finite(stat(arm, "validation_loss").get("mean"))


def samples_of(arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the arm made of each prompt; results of earlier versions have one."""
    return list(arm.get("samples") or ([arm["sample"]] if arm.get("sample") else []))


def on_processor(results: Results) -> bool:
    """Whether every arm recorded processor seconds: wall-clock time depends on which runs shared the machine."""
    return bool(results["arms"]) and all(
        finite(arm.get("tokens_per_processor_second")) is not None for arm in results["arms"].values()
    )


def speed_of(results: Results) -> tuple[str, str, str]:
    """The key of an arm's speed that can be compared here, its name, and a short one."""
    if on_processor(results):
        return "tokens_per_processor_second", "Tokens per processor second", "Tok/CPU s"
    return "tokens_per_second", "Tokens per second", "Tokens/s"


def by_loss(results: Results) -> list[str]:
    """Arms that have a loss, best first."""
    measured = {arm: loss(record) for arm, record in results["arms"].items()}
    return sorted((arm for arm in measured if measured[arm] is not None), key=lambda arm: measured[arm] or 0.0)


def seed_count(results: Results) -> int:
    """The largest number of seeds with which any arm was trained."""
    return max((len(stat(arm, "validation_loss").get("seeds") or []) for arm in results["arms"].values()), default=0)


def interval_name(results: Results) -> str:
    """'95 % confidence interval' where results name the level under `confidence`, else 'confidence interval'."""
    level = finite(results.get("confidence"))
    return f"{100 * level:g} % confidence interval" if level else "confidence interval"


def known_pairs(results: Results) -> list[Pair]:
    """The pairs whose two arms are both in the results."""
    return [pair for pair in results.get("pairs") or [] if {pair["a"], pair["b"]} <= set(results["arms"])]


def pair_sentence(pair: Pair, names: Mapping[str, str]) -> str:
    """'A is better than B by 0.059 (0.051 to 0.067).' or 'A and B: undecided (why).'"""
    first, second = names[pair["a"]], names[pair["b"]]
    difference, low, high = (finite(pair.get(key)) for key in ("difference", "low", "high"))
    reason = str(pair.get("reason") or "").strip().rstrip(".")
    if pair.get("verdict") not in ("better", "worse"):
        why = f": {reason}" if reason else ""
        return f"{first} and {second} are undecided{why}."
    if pair["verdict"] == "worse":
        first, second = second, first
        difference = None if difference is None else -difference
        low, high = (None if bound is None else -bound for bound in (high, low))
    gain = "" if difference is None else f" by {fixed(-difference)}"
    span = "" if low is None or high is None else f" ({fixed(-high)} to {fixed(-low)})"
    return f"{first} is better than {second}{gain}{span}."


def summary(results: Results) -> list[str]:
    """Who is best, what of that is decided, what is not and why: at most a handful of sentences."""
    names, order = arm_names(results), by_loss(results)
    if not order:
        return ["No arm has a validation loss yet."]
    best = order[0]
    lines = [_best_sentence(results, names[best], best, len(order))]
    pairs = known_pairs(results)
    mine = [pair for pair in pairs if best in (pair["a"], pair["b"])]
    lines.extend(_lead_sentences(mine, best, names))
    lines.extend(unequal_cost(results))
    decided = sum(pair.get("verdict") in ("better", "worse") for pair in pairs)
    if len(pairs) > len(mine):
        lines.append(f"Of all {len(pairs)} pairs: {decided} decided, {len(pairs) - decided} undecided.")
    if len(order) > 1 and not pairs:
        lines.append("No pair was tested, so the order of the arms is an observation and not a finding.")
    missing = [names[arm] for arm in names if arm not in order]
    if missing:
        lines.append(f"Without a usable loss: {listed(missing)}.")
    return lines


def unequal_cost(results: Results) -> list[str]:
    """What a preset or a recipe cost beside the cheapest arm: nothing sized it to the others; it may just be larger."""
    costs = {arm: finite(record.get("training_flops")) for arm, record in results["arms"].items()}
    known = {arm: cost for arm, cost in costs.items() if cost}
    taken = [arm for arm in known if set((results["arms"][arm].get("mismatch") or {}).values()) <= {None}]
    if len(known) < 2 or not taken or (results.get("budget") or {}).get("kind") != "tokens":
        return []
    least = min(known, key=lambda arm: known[arm])
    most = max(known, key=lambda arm: known[arm])
    if known[most] < _ALIKE * known[least] or not {least, most} & set(taken):
        return []
    names = arm_names(results)
    times = f"{known[most] / known[least]:.2f} times what {names[least]} did"
    return [
        f"They did not cost the same: {names[most]} computed {times}. "
        'With `budget.kind = "flops"` every arm computes as much.'
    ]


def _best_sentence(results: Results, name: str, best: str, count: int) -> str:
    value = stat(results["arms"][best], "validation_loss")
    seeds = len(value.get("seeds") or [])
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed, so there is no interval"
    lead = "has the lowest validation loss of the" if count > 1 else "is the only arm with a validation loss;"
    arms = f" {count} arms," if count > 1 else ""
    return f"{name} {lead}{arms} {plus_minus(value)} nats per token ({over})."


def _lead_sentences(mine: Sequence[Pair], best: str, names: Mapping[str, str]) -> list[str]:
    ahead, behind, open_pairs = [], [], []
    for pair in mine:
        other = names[pair["b"] if pair["a"] == best else pair["a"]]
        verdict = pair.get("verdict")
        if verdict not in ("better", "worse"):
            open_pairs.append((other, str(pair.get("reason") or "no reason recorded").strip().rstrip(".")))
        elif (verdict == "better") == (pair["a"] == best):
            ahead.append(other)
        else:
            behind.append(other)
    lines = [f"It is better than {listed(ahead)}: these pairs are decided."] if ahead else []
    if behind:
        lines.append(f"Pair by pair, however, {listed(behind)} came out better.")
    for reason in dict.fromkeys(reason for _, reason in open_pairs):
        against = listed([other for other, why in open_pairs if why == reason])
        lines.append(f"Undecided against {against}: {reason}.")
    return lines
