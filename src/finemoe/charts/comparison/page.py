"""The report of `finemoe compare` as one HTML page: findings, evidence, cost, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from finemoe.charts.comparison.figures import (
    axes_of,
    final_losses,
    load_maps,
    loss_curves,
    pair_differences,
    paper_panels,
)
from finemoe.charts.comparison.records import above_window, mean_curves, shown_max_vio
from finemoe.charts.comparison.words import (
    arm_names,
    by_loss,
    interval_name,
    known_pairs,
    loss,
    on_processor,
    pair_sentence,
    samples_of,
    seed_count,
    speed_of,
    stat,
    summary,
)
from finemoe.charts.numbers import (
    NOTHING,
    Results,
    clean,
    count,
    decimals_for,
    duration,
    finite,
    fixed,
    half_interval,
    percent,
    plus_minus,
    scientific,
)
from finemoe.charts.page import Bullets, Card, Cards, Code, Details, Figure, Section, Table, Text, render_page
from finemoe.charts.words import footer, listed

MAX_VIO = "MaxVio is (largest − mean load) ÷ mean load of a layer's routed experts, averaged over layers; 0 is even."
TIMES = {
    "processor_seconds": "Processor time: seconds of all threads together, in training steps alone. Unlike the clock, "
    "it hardly depends on which other runs shared the machine.",
    "seconds": "By the clock: a run that had the machine to itself looks faster than one that shared it.",
}


def comparison_page(results: Results) -> str:
    """The whole report as one self-contained HTML document."""
    results = clean(results)
    makers = (_summary, _table, _curves, _final, _pairs, _paper, _load, _samples, _cost, _set_up)
    sections = [section for make in makers if (section := make(results)) is not None]
    banner = (
        ""
        if results.get("complete", True)
        else "These results are incomplete: some runs have not finished. Figures and verdicts below may still change."
    )
    subtitle = " · ".join(
        part for part in (str(results.get("date") or "")[:10], _budget(results), _seeds(results)) if part
    )
    return render_page(
        str(results.get("title") or "Comparison"),
        sections,
        subtitle=subtitle,
        banner=banner,
        footer=footer(results.get("finemoe_version")),
    )


def _budget(results: Results) -> str:
    budget = results.get("budget") or {}
    shown = {
        "tokens": lambda value: f"{count(value)} tokens an arm",
        "flops": lambda value: f"{scientific(value)} training FLOPs an arm",
        "seconds": lambda value: f"{duration(value)} of training an arm",
    }.get(str(budget.get("kind")))
    return shown(budget.get("value")) if shown else ""


def _seeds(results: Results) -> str:
    seeds = seed_count(results)
    return f"{seeds} seeds" if seeds > 1 else "one seed" if seeds else ""


def _ordered(results: Results) -> list[str]:
    """Every arm, best first; arms without a loss last."""
    ranked = by_loss(results)
    return ranked + [arm for arm in results["arms"] if arm not in ranked]


def _summary(results: Results) -> Section:
    lines = summary(results)
    return Section("Summary", [Text(lines[:1]), *([Bullets(lines[1:])] if lines[1:] else [])])


def _table(results: Results) -> Section:
    names, arms = arm_names(results), results["arms"]
    losses, bits = ([stat(arm, key) for arm in arms.values()] for key in ("validation_loss", "bits_per_byte"))
    digits, bit_digits = decimals_for(losses), decimals_for(bits)
    best = loss(arms[order[0]]) if (order := by_loss(results)) else None
    rows = []
    for arm in _ordered(results):
        record = arms[arm]
        value = loss(record)
        behind = (
            NOTHING if value is None or best is None else "best" if value == best else f"+{value - best:.{digits}f}"
        )
        rows.append([
            names[arm], str(record.get("routing") or NOTHING), plus_minus(stat(record, "validation_loss"), digits),
            behind,
            plus_minus(stat(record, "bits_per_byte"), bit_digits), plus_minus(stat(record, "max_vio"), 2),
            _dead(record), count(record.get("total_parameters")), count(record.get("active_parameters")),
        ])  # fmt: skip
    intervals = any(half_interval(value) is not None for value in losses)
    note = f"± is half the {interval_name(results)} over seeds. " if intervals else "One seed: there are no intervals. "
    columns = [
        "Arm", "Routing", "Validation loss (nats per token)", "Behind best", "Bits per byte", "MaxVio", "Dead experts",
        "Total parameters", "Active parameters",
    ]  # fmt: skip
    table = Table("Each arm after the same budget, best first", columns, rows, range(2, 9), note + MAX_VIO, (0,))
    return Section("Results", [table])


def _dead(record: Mapping[str, Any]) -> str:
    dead = finite(record.get("dead_experts"))
    return NOTHING if dead is None else f"{100 * dead:.1f} %"


def _curves(results: Results) -> Section | None:
    figures = []
    for axis, title in axes_of(results).items():
        chart = loss_curves(results, axis)
        if chart is None:
            continue
        caption = f"Validation loss against {title}"
        if seed_count(results) > 1:
            caption += "; line: mean over seeds, band: lowest to highest seed"
        caption += "."
        if (why := TIMES.get(axis)) and len(results["arms"]) > 1:
            caption += f" {why}"
        if hidden := above_window(mean_curves(results, axis)):
            caption += f" Ends above the axis: {listed(hidden)}."
        figures.append(Figure([chart], caption))
    if not figures:
        return None
    hint = (
        "The first, steep part lies above the axis. Drag to move, Ctrl + wheel or pinch to zoom, double-click to reset."
    )
    return Section("Loss curves", [Text([hint]), *figures])


def _final(results: Results) -> Section | None:
    chart = final_losses(results)
    if chart is None:
        return None
    caption = "Final validation loss. Marker: mean"
    if seed_count(results) > 1:
        caption += f"; bar: {interval_name(results)}; thin ticks: single seeds"
    return Section("Final losses", [Figure([chart], caption + ". The axis does not start at zero.")])


def _pairs(results: Results) -> Section | None:
    pairs, names = known_pairs(results), arm_names(results)
    if not pairs:
        return None
    rows = []
    for pair in pairs:
        low, high = fixed(pair.get("low")), fixed(pair.get("high"))
        span = NOTHING if NOTHING in (low, high) else f"{low} to {high}"
        versus = f"{names[pair['a']]} − {names[pair['b']]}"
        sentence = pair_sentence(pair, names)
        reason = str(pair.get("reason") or NOTHING)
        verdict = sentence.split(" by ")[0] if pair.get("verdict") in ("better", "worse") else "undecided"
        rows.append([versus, fixed(pair.get("difference")), span, verdict.rstrip("."), reason])
    columns = ["Pair", "Difference", "Interval", "Verdict", "Why"]
    table = Table("Difference in validation loss of each pair (nats per token)", columns, rows, (1, 2))
    blocks: list[Any] = [table if len(rows) <= 15 else Details(f"All {len(rows)} pairs in figures", [table])]
    if (chart := pair_differences(results)) is not None:
        caption = "Left of the zero marks the first-named arm is better. Filled: decided; hollow: undecided."
        figure = Figure([chart], caption)
        blocks.insert(0, figure if len(rows) <= 15 else Details(f"All {len(rows)} pairs as a figure", [figure]))
    return Section("Pair by pair", blocks)


def _paper(results: Results) -> Section | None:
    names = arm_names(results)
    rows = [
        [names[arm], str(paper.get("name") or NOTHING), fixed(paper.get("pile_loss")), fixed(loss(record))]
        for arm, record in results["arms"].items()
        if (paper := record.get("paper"))
    ]
    if not rows:
        return None
    arms = results["arms"].values()
    largest, most = (max(finite(arm.get(key)) or 0 for arm in arms) for key in ("total_parameters", "tokens"))
    caveat = (
        "The paper (DeepSeekMoE, arXiv 2401.06066, Tables 1 and 8) trained models of up to about 2 billion parameters "
        "on 100 billion tokens and reports the loss on the Pile. "
        f"Here the largest arm has {count(largest)} parameters and saw at most {count(most)} tokens, of other data and "
        "cut by another tokenizer, so the losses themselves cannot be compared. What can be compared is the order of "
        "the arms and, roughly, the size of the gaps between them."
    )
    table = Table(
        "Losses as published and as measured here",
        ["Arm", "In the paper", "Pile loss", "Our loss"],
        rows,
        (2, 3),
    )
    panels = paper_panels(results)
    caption = "Difference from the baseline, on separate scales; further left is better. Bars, where present: interval."
    return Section("Beside the paper", [Text([caveat]), *([Figure(panels, caption)] if panels else []), table])


def _load(results: Results) -> Section | None:
    maps = load_maps(results)
    if not maps:
        return None
    names, arms = arm_names(results), results["arms"]
    figures = []
    for arm, chart in maps.items():
        violation = fixed(shown_max_vio(arms[arm]), 2)
        caption = f"{names[arm]}: MaxVio {violation} in this run"
        if seed_count(results) > 1 and (mean := fixed(stat(arms[arm], "max_vio").get("mean"), 2)) != NOTHING:
            caption += f", {mean} over seeds"
        if (dead := _dead(arms[arm])) != NOTHING:
            caption += f"; dead experts: {dead}"
        figures.append(Figure([chart], caption + "."))
    intro = (
        "Share of the tokens that each routed expert received in the validation pass of the first seed, relative to an "
        "even share. " + MAX_VIO + " Shared experts see every token and are not shown. Layers and experts are numbered "
        "from 0."
    )
    return Section("Expert load", [Text([intro]), *figures])


def _samples(results: Results) -> Section | None:
    names = arm_names(results)
    samples = {arm: samples_of(record) for arm, record in results["arms"].items()}
    prompts = dict.fromkeys(str(one.get("prompt") or "") for found in samples.values() for one in found)
    if not prompts:
        return None
    blocks: list[Any] = [Text([f"Every arm continues {'this prompt' if len(prompts) == 1 else 'these prompts'}:"])]
    for prompt in prompts:
        made = {arm: one for arm, found in samples.items() for one in found if str(one.get("prompt") or "") == prompt}
        blocks.append(Code(prompt, "Prompt"))
        blocks.append(Cards([Card(names[arm], str(one.get("completion") or "")) for arm, one in made.items()]))
    return Section("Samples", blocks)


def _cost(results: Results) -> Section:
    names = arm_names(results)
    speed, speed_name, _ = speed_of(results)
    time, time_name = ("processor_seconds", "Processor time") if on_processor(results) else ("seconds", "Time")
    rows = []
    for arm in _ordered(results):
        record = results["arms"][arm]
        off = record.get("mismatch") or {}
        rows.append([
            names[arm], count(record.get("expert_parameters")), count(record.get("active_expert_parameters")),
            percent(off.get("total_percent")), percent(off.get("active_percent")),
            scientific(record.get("training_flops")),
            percent(off.get("flops_percent")), count(record.get("tokens")), duration(record.get(time)),
            count(record.get(speed)),
            NOTHING if (rate := finite(record.get("learning_rate"))) is None else f"{rate:g}",
        ])  # fmt: skip
    columns = [
        "Arm", "Expert parameters", "Active expert parameters", "Total off target", "Active off target",
        "Training FLOPs", "FLOPs off target", "Tokens", f"{time_name} a run", speed_name, "Peak learning rate",
    ]  # fmt: skip
    matching = results.get("matching") or {}
    text = [str(line) for line in matching.get("text") or []]
    note = "Off target: expert parameters and FLOPs against what matching asked for; widths round to whole units. "
    note += TIMES["processor_seconds" if on_processor(results) else "seconds"]
    table = Table("What each arm holds and costs", columns, rows, range(1, 11), note)
    return Section("Matching and cost", [*([Bullets(text)] if text else []), table, *_tuning(results)])


def _tuning(results: Results) -> list[Table]:
    """The learning-rate trials, so that a reader can see that every arm had the same chance."""
    tuning = results.get("tuning") or {}
    trials = {arm: losses for arm, losses in (tuning.get("validation_loss") or {}).items() if losses}
    if not trials:
        return []
    names = arm_names(results)
    rates = list(dict.fromkeys(rate for losses in trials.values() for rate in losses))
    rows = [[names.get(arm, arm), *(fixed(losses.get(rate)) for rate in rates)] for arm, losses in trials.items()]
    caption = f"Learning-rate trials: validation loss after {count(tuning.get('tokens'))} tokens, by rate"
    note = f"{NOTHING}: no finite loss." if any(NOTHING in row for row in rows) else ""
    return [Table(caption, ["Arm", *rates], rows, range(1, 1 + len(rates)), note)]


def _set_up(results: Results) -> Section:
    blocks: list[Any] = []
    if notes := [str(note) for note in results.get("notes") or []]:
        blocks.append(Bullets(notes))
    if command := results.get("command"):
        blocks += [Text(["This command reproduces the comparison:"]), Code(str(command), "Command")]
    if machine := results.get("machine"):
        rows = [[key.replace("_gib", " (GiB)").replace("_", " "), _shown(value)] for key, value in machine.items()]
        blocks.append(Table("Machine", ["Property", "Value"], rows))
    if recipe := results.get("recipe"):
        lines = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in flat(recipe))
        blocks.append(Details("Configuration, resolved", [Code(lines, "Configuration")]))
    return Section("How it was made", blocks)


def _shown(value: Any) -> str:
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves, the way `--set` takes them."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
