"""The page of `finemoe analyze difference`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.charts.difference.figures import MOST_MARKERS, cause_chart, flip_chart, load_chart, loss_chart
from finemoe.charts.difference.words import percent, plus_interval, summary
from finemoe.charts.numbers import NOTHING, Results, clean, count, fixed
from finemoe.charts.page import Bullets, Code, Details, Figure, Section, Table, Text, render_page
from finemoe.charts.words import footer

_MOST = 20  # experts in each list

_READING = (
    "Both models read the same tokens. Layers and experts are numbered from 0, as in the model.",
    "Choices that changed: of the experts that the first model chooses for a token, the share that the second does not "
    "choose, 1 − |A ∩ B| ÷ k. Tokens with any change: those for which the two sets differ. First choice: the expert "
    "with the highest score.",
    "Shift of gate weight: ½ Σ |a − b| over a token's gates, each made to sum to one; 0 is no change, 1 that nothing "
    "is left of the old weights.",
    "Where flips come from: the second's router reads what the first's reads (only the router changed), and the "
    "first's router reads what the second's does (only the states changed). The two do not add up to the whole.",
    "Intervals are 95 % t intervals over windows of text, paired, domain by domain (Welch). Windows of one document "
    "are not independent, so that intervals over few documents are somewhat too narrow. An expert has gained or lost "
    "when an interval that holds for all experts at once (Bonferroni) leaves out 0.",
)


def difference_page(results: Results) -> str:
    """The whole page as one self-contained HTML document."""
    results = clean(results)
    sections = [
        Section("Summary", [Bullets(summary(results))]),
        _flips(results),
        _causes(results),
        _loads(results),
        _losses(results),
        Section("How to read this", [Bullets(_READING)]),
        _made(results),
    ]
    names = f"{results['before']} → {results['after']}"
    subtitle = " · ".join((names, f"{count(results['tokens'])} tokens", str(results.get("date") or "")[:10]))
    return render_page(
        "Routing, before and after", sections, subtitle=subtitle, footer=footer(results.get("finemoe_version"))
    )


def _flips(results: Results) -> Section:
    rows = []
    for each in results["layers"]:
        found = each["domains"]["all"]
        flip = found["flip_rate"]
        half = "" if flip["low"] is None else f" ± {100 * (flip['high'] - flip['low']) / 2:.1f}"
        rows.append([
            f"L{each['layer']}", f"{100 * flip['mean']:.1f}{half} %", percent(found["any_change"]),
            percent(found["top1_flip_rate"]),
            *(fixed(found[key]) for key in ("gate_shift", "gate_a", "gate_b")),
        ])  # fmt: skip
    columns = ["Layer", "Choices changed", "Tokens with any change", "First choice changed", "Shift of gate weight",
               "Gates in sum, before", "Gates in sum, after"]  # fmt: skip
    names = [each["domain"] for each in results["domains"][1:]]
    few = len(names) <= MOST_MARKERS
    caption = "Choices that changed, by layer and domain; the upright stroke is all text, with its 95 % interval."
    if not few:
        caption = "Choices that changed, by layer and domain: all the text first, then the domain with the most flips."
    blocks: list[Any] = [
        Figure([flip_chart(results)], caption),
        Table("Each layer, over all text", columns, rows, range(1, 7)),
    ]
    if len(names) > 1:
        each_domain = [
            [f"L{each['layer']}", *(percent(each["domains"][name]["flip_rate"]["mean"]) for name in names)]
            for each in results["layers"]
        ]
        table = Table("Choices changed, by domain", ["Layer", *names], each_domain, range(1, 1 + len(names)))
        blocks.append(table if few else Details(table.caption, [table]))
    return Section("Flips", blocks)


def _causes(results: Results) -> Section:
    caption = "Choices that changed when all of the second model is used, only its routers, or only what they read."
    rows = [
        [f"L{each['layer']}", percent(found["flip_rate"]["mean"]), percent(found["flip_rate_router"]),
         percent(found["flip_rate_states"])]
        for each in results["layers"]
        for found in [each["domains"]["all"]]
    ]  # fmt: skip
    columns = ["Layer", "Everything", "Only the router", "Only the states"]
    table = Table("Choices that changed, over all text", columns, rows, range(1, 4))
    return Section("Where the flips come from", [Figure([cause_chart(results)], caption), table])


def _loads(results: Results) -> Section:
    caption = (
        "Change of each expert's load, as a part of the uniform load: orange took more, blue less; faded: undecided."
    )
    blocks: list[Any] = [Figure([load_chart(results)], caption)]
    for word, title in (("gained", "Experts that gained"), ("lost", "Experts that lost"), ("removed", "Removed")):
        found = sorted(
            (each for each in results["experts"] if each["verdict"] == word), key=lambda each: -abs(each["change"])
        )
        if found:
            cut = f", the largest {_MOST} of {len(found)}" if len(found) > _MOST else ""
            blocks.append(Details(f"{title} ({len(found)})", [_experts(title + cut, found[:_MOST])]))
    if len(blocks) == 1:
        blocks.append(Text(["No expert's load changed by more than chance would change one of so many."]))
    return Section("Experts gained and lost", blocks)


def _experts(caption: str, found: list[Mapping[str, Any]]) -> Table:
    rows = []
    for each in found:
        rate, load = (each["rate_a"], each["load_a"]) if each["rate_a"] else (each["rate_b"], each["load_b"])
        scale = load / rate if rate else 0.0  # an expert that nothing used, and that is gone now
        span = NOTHING
        if each["low"] is not None:
            span = f"{fixed(scale * each['low'], 2)} to {fixed(scale * each['high'], 2)}"
        most = max(each["domains"], key=lambda name, moved=each["domains"]: abs(moved[name]))  # type: ignore[misc]
        rows.append([
            f"L{each['layer']} E{each['expert']}", fixed(each["load_a"], 2), fixed(each["load_b"], 2),
            fixed(each["load_b"] - each["load_a"], 2), span, f"{most} {fixed(scale * each['domains'][most], 2)}",
        ])  # fmt: skip
    columns = ["Expert", "Load before", "After", "Change", "95 % interval", "Most in"]
    return Table(f"{caption}; load ÷ uniform", columns, rows, range(1, 5))


def _losses(results: Results) -> Section:
    rows = [
        [str(each["domain"]), count(each["tokens"]), fixed(each["loss_a"]), fixed(each["loss_b"]),
         plus_interval(each["difference"])]
        for each in results["domains"]
    ]  # fmt: skip
    columns = ["Domain", "Tokens", "Loss before", "Loss after", "Difference (95 % interval)"]
    table = Table("Loss in nats per token", columns, rows, range(1, 5))
    return Section(
        "Loss",
        [
            Figure(
                [loss_chart(results)],
                "Loss after less loss before, paired, with 95 % intervals; below 0 the second is better.",
            ),
            table,
        ],
    )


def _made(results: Results) -> Section:
    blocks: list[Any] = [
        Table("The two", ["Model", "Path"], [["before", str(results["before"])], ["after", str(results["after"])]])
    ]
    if command := results.get("command"):
        blocks += [Text(["This command makes the page again:"]), Code(str(command), "Command")]
    return Section("How it was made", blocks)
