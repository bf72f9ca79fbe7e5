"""The report of `finemoe analyze knockout` as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finemoe.charts.knockout.figures import (
    curves,
    domain_curves,
    expert_map,
    expert_maps_by_domain,
    layer_dots,
    layer_dots_by_domain,
    pair_maps,
    records,
    shared_dots,
    usage_dots,
)
from finemoe.charts.knockout.words import by_size, change, signed, verdict
from finemoe.charts.numbers import NOTHING, Results, clean, finite, fixed
from finemoe.charts.page import Bullets, Code, Details, Figure, Section, Table, Text, render_page
from finemoe.charts.words import footer, model_and_text

TOP_EXPERTS = 15
TOP_PAIRS = 8
_INTERVAL = "95 % interval"
_PAIRED = (
    "Differences are paired: each window is read by the intact and by the constrained model, and the interval "
    "(Student's t, domains as strata) is over the windows' differences. Windows of one document are not independent, "
    "so that intervals over few documents are somewhat too narrow."
)


def knockout_page(results: Results) -> str:
    """The whole report as one self-contained HTML document."""
    results = clean(results)
    makers: Mapping[str, Callable[[Results], Section]] = {
        "masked": _masked,
        "active": _active,
        "shared": _shared,
        "experts": _experts,
        "pairs": _pairs,
        "layers": _layers,
    }
    done = [make(results) for name, make in makers.items() if results["experiments"].get(name)]
    banner = (
        "" if results["complete"] else "These results are incomplete: it was stopped before every experiment was done."
    )
    return render_page(
        "What the model loses without its experts",
        [_summary(results), *done, _how(results)],
        subtitle=model_and_text(results),
        banner=banner,
        footer=footer(results.get("finemoe_version")),
    )


def _summary(results: Results) -> Section:
    whole, lines = results["intact"]["loss"], []
    masked, paper = records(results, "masked"), results["paper"]
    if masked:
        best, most = masked[0], masked[-1]
        printed = paper["masked"]["DeepSeekMoE"]
        said = [
            f"Of each token's experts the {one['label']}: loss rises by {change(one['difference'])}"
            f"{_beside(printed, one)}."
            for one in ((best, most) if most is not best else (best,))
        ]
        lines += said
    for one in records(results, "shared"):
        if one["replaced"]:
            printed = paper["shared"]["replaced"] - paper["shared"]["intact"]
            lines.append(
                f"Without the shared experts, replaced by routed ones, loss rises by {change(one['difference'])}; in "
                f"the paper by +{printed:.3f}."
            )
    if active := [one for one in records(results, "active") if one["constraint"]["layers"]]:
        fewest = min(active, key=lambda one: one["count"])
        lines.append(f"With {fewest['count']} active routed experts it rises by {change(fewest['difference'])}.")
    if experts := records(results, "experts"):
        worst = by_size(experts)[0]
        needed = sum((finite(one["difference"]["low"]) or 0.0) > 0 for one in experts)
        lines.append(
            f"{needed} of {len(experts)} single experts have an interval above 0 ({_by_chance(len(experts))}); the "
            f"most missed, expert {worst['expert']} of layer {worst['layer']}: {change(worst['difference'], 4)}."
        )
    if pairs := records(results, "pairs"):
        signs = [verdict(one["interaction"]) for one in pairs]
        lines.append(
            f"Of {len(pairs)} tested pairs {signs.count('redundant')} have an interaction above 0, covering for each "
            f"other ({_by_chance(len(pairs))}), and {signs.count('work together')} below 0, working together."
        )
    if layers := records(results, "layers"):
        worst = by_size(layers)[0]
        lines.append(f"Of whole layers the most missed: {worst['label']}, {change(worst['difference'])}.")
    left = [f"Not run: {name}: {why}" for name, why in results["skipped"].items()]
    intact = f"The intact model has a loss of {fixed(whole['mean'])} nats per token."
    return Section("Summary", [Text([intact]), Bullets([*lines, *left])])


def _beside(printed: Mapping[str, float], one: Mapping[str, Any]) -> str:
    step = f"{16 * one['fraction']:g}"
    return f"; in the paper by {signed(printed[step] - printed['0'], 2)}" if step in printed else ""


def _by_chance(count: int) -> str:
    """How many of `count` intervals lie above 0 where nothing has an effect: a fortieth."""
    return f"by chance alone about {count / 40:.0f} would" if count >= 20 else "hardly any would by chance"


def _notes(results: Results, experiment: str) -> list[Any]:
    notes = results["experiments"][experiment]["notes"]
    return [Text([f"Left out: {note}." for note in notes])] if notes else []


def _table(results: Results, experiment: str, caption: str, paper: Callable[[dict[str, Any]], str] | None) -> Table:
    found = records(results, experiment)
    columns = ["Constraint", "Loss (nats per token)", f"Rise ({_INTERVAL})"]
    rows = [[one["label"], fixed(one["loss"]["mean"]), change(one["difference"])] for one in found]
    if paper is not None:
        columns.append("Rise in the paper")
        rows = [[*row, paper(one)] for row, one in zip(rows, found, strict=True)]
    return Table(caption, columns, rows, range(1, len(columns)))


def _domains(results: Results, experiment: str, drawn: list[Any]) -> list[Any]:
    found = records(results, experiment)
    names = list(found[0]["by_domain"])
    if len(names) < 2:
        return []
    columns = ["Constraint", *names]
    rows = [[one["label"], *(change(one["by_domain"][name]["difference"]) for name in names)] for one in found]
    table = Table(f"Rise in loss by domain ({_INTERVAL})", columns, rows, range(1, len(columns)))
    scale = "each on a scale of its own" if experiment == "layers" else "all on one scale"
    small = [Figure(drawn, f"The same in each domain, {scale}. Bars are 95 % intervals.")] if drawn else []
    worst = max(found, key=lambda one: finite(one["difference"]["mean"]) or 0.0)["by_domain"]
    ranked = sorted(names, key=lambda name: -(finite(worst[name]["difference"]["mean"]) or 0.0))
    summary = f"By domain: most in {ranked[0]}, least in {ranked[-1]}"
    return [Details(summary, [*small, table])]


def _curve(results: Results, experiment: str, text: str, caption: str, table: Table) -> list[Any]:
    """What both figures of the paper have here: the curve beside the printed one, the table, and each domain."""
    domains = _domains(results, experiment, domain_curves(results, experiment))
    figure = Figure(curves(results, experiment), caption)
    return [Text([text]), figure, table, *_notes(results, experiment), *domains]


def _masked(results: Results) -> Section:
    printed = results["paper"]["masked"]["DeepSeekMoE"]

    def paper(one: dict[str, Any]) -> str:
        step = f"{one['fraction'] * 16:g}"
        return signed(printed[step] - printed["0"]) if step in printed else NOTHING

    text = (
        "For every token and in every MoE layer, the experts that it would choose first are left out, and it takes the "
        "best of the rest. The steeper the rise, the less the others can stand in: the paper's Figure 4 measures by "
        "this how little its experts are redundant. The two panels have scales of their own."
    )
    table = _table(results, "masked", "The best experts left out", paper)
    caption = "Rise in loss with the best experts of each token left out."
    return Section("The best experts masked (Figure 4)", _curve(results, "masked", text, caption, table))


def _active(results: Results) -> Section:
    printed = results["paper"]["active"]
    trained = results["experiments"]["active"]["trained"]

    def paper(one: dict[str, Any]) -> str:
        step = str(one["count"])
        return signed(printed[step] - printed["7"]) if trained == 7 and step in printed else NOTHING

    text = (
        f"The model was trained with {trained} active routed experts a token and meets other numbers for the first "
        "time. The paper's model, trained with 7, still equals a fully active GShard with 4 (1.868 against 1.867)."
    )
    table = _table(results, "active", "Other numbers of active experts", paper)
    caption = "Rise in loss with fewer or more active routed experts."
    return Section("Fewer active experts (Figure 5)", _curve(results, "active", text, caption, table))


def _shared(results: Results) -> Section:
    shared = results["paper"]["shared"]

    def paper(one: dict[str, Any]) -> str:
        return signed(shared["replaced"] - shared["intact"]) if one["replaced"] else NOTHING

    text = (
        "The shared experts are taken out of every layer. Replaced: as many more routed experts are active, so that "
        "the compute stays the same; the paper's model goes from 1.808 to 2.414."
    )
    figure = Figure([shared_dots(results)], "Rise in loss without the shared experts. Bars are 95 % intervals.")
    table = _table(results, "shared", "Without the shared experts", paper)
    return Section("Without the shared experts", [Text([text]), figure, table, *_notes(results, "shared")])


def _experts(results: Results) -> Section:
    found = by_size(records(results, "experts"))
    columns = ["Expert", "Load", f"Rise ({_INTERVAL})", "Most in", "Rise there"]
    rows = []
    for one in found[:TOP_EXPERTS]:
        name, there = max(one["by_domain"].items(), key=lambda item: finite(item[1]["difference"]["mean"]) or 0.0)
        rows.append([
            f"layer {one['layer']}, expert {one['expert']}", f"{100 * one['share']:.2f} %",
            change(one["difference"], 4), name, change(there["difference"], 4),
        ])  # fmt: skip
    table = Table(
        "The experts that are missed most", columns, rows, (1, 2, 4), "Load: share of its layer's assignments."
    )
    text = (
        "Each expert alone is left out of its layer; tokens that would have chosen it take their next best. Orange is "
        "worse without it, blue better; faded: the interval holds 0, so that neither is decided. Among many experts "
        "some seem to matter by chance: about one in forty of those that do nothing has an interval above 0. Layers "
        "and experts are numbered from 0."
    )
    maps = expert_maps_by_domain(results)
    domains = [Details("By domain", [Figure([each], "") for each in maps])] if maps else []
    return Section(
        "Every single expert",
        [
            Text([text]),
            Figure([expert_map(results)], "Change in loss with one expert left out."),
            table,
            Figure([usage_dots(results)], "How much an expert is used, and what leaving it out costs."),
            *_notes(results, "experts"),
            *domains,
        ],
    )


def _pairs(results: Results) -> Section:
    found = by_size(records(results, "pairs"), "interaction")
    columns = ["Pair", f"Interaction ({_INTERVAL})", "Both out", "What it says"]
    shown = found if len(found) <= 2 * TOP_PAIRS else [*found[:TOP_PAIRS], *found[-TOP_PAIRS:]]
    rows = [
        [
            f"layer {one['layer']}, {one['experts'][0]} and {one['experts'][1]}",
            change(one["interaction"], 5),
            change(one["difference"], 5),
            verdict(one["interaction"]),
        ]
        for one in shown
    ]
    text = (
        "Interaction = loss without both − loss without the one − loss without the other + loss of the intact model. "
        "Above 0 (orange): together they are missed more than each alone adds up to, so they cover for each other: "
        "redundant. Below 0 (blue): without the one the other helps less, so they work together. Faded: the interval "
        "holds 0. The experts are the most used of the layer unless others were asked for. The diagonal is empty."
    )
    caption = "Interaction of pairs of experts of one layer."
    table = Table("Pairs, most redundant first", columns, rows, (1, 2))
    return Section("Pairs of experts", [Text([text]), Figure(pair_maps(results), caption), table])


def _layers(results: Results) -> Section:
    text = "In one layer at a time the routed experts, the shared ones or both add nothing; attention stays."
    figure = Figure([layer_dots(results)], "Rise in loss without one layer's experts. Bars are 95 % intervals.")
    table = _table(results, "layers", "Without the experts of one layer", None)
    domains = _domains(results, "layers", layer_dots_by_domain(results))
    return Section(
        "Whole layers",
        [Text([text]), figure, table, *domains],
    )


def _how(results: Results) -> Section:
    domains = results["intact"]["by_domain"]
    rows = [
        [name, f"{one['windows']:,}", f"{one['tokens']:,}", fixed(one["loss"]["mean"])] for name, one in domains.items()
    ]
    columns = ["Domain", "Windows", "Tokens", "Intact loss (nats per token)"]
    works = {name: made["work"] for name, made in results["experiments"].items()}
    done, plain = (sum(work[key] for work in works.values()) for key in ("blocks_run", "blocks_plain"))
    saving = (
        f"Blocks that come before the first change are computed once, and windows of which no token had chosen a "
        f"left-out expert are not run again: {done:,} of the {plain:,} block passes that plain evaluation takes."
    )
    machine = results.get("machine") or {}
    where = (
        f"{machine.get('processor')}, {machine.get('cores')} cores, torch {machine.get('packages', {}).get('torch')}"
    )
    return Section(
        "How it was measured",
        [
            Table(f"The text, in windows of {results['text']['length']} tokens", columns, rows, (1, 2, 3)),
            Text([_PAIRED, saving, f"The paper: {results['paper']['source']}. Measured on {where}."]),
            *([Code(str(command), "The command")] if (command := results.get("command")) else []),
        ],
    )
