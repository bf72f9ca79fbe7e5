"""The report of `finemoe analyze load` as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finemoe.charts.load.figures import domain_maps, evenness, frames_of, heat_map, lift_maps, over_training
from finemoe.charts.load.words import summary
from finemoe.charts.numbers import NOTHING, Results, clean, count, fixed
from finemoe.charts.page import Bullets, Code, Details, Figure, Section, Table, Text, render_page
from finemoe.charts.words import footer

MEANINGS = (
    "Load: how often an expert was chosen. Even share: what each would get if all got the same.",
    "MaxVio: (largest − mean load) ÷ mean load of a layer (Wang et al., 2408.15664); 0 is even. Global: over all the "
    "text; a batch: mean over batches, which are of one domain each and so less even.",
    "Entropy: of the shares, over ln(experts). 1 is even. Effective experts: how many evenly used experts would be as "
    "even. CV: standard deviation over mean.",
    "Starved: below a tenth of the even share. Dead: never chosen here. Both are counts of experts.",
    "Together ÷ chance: how often two experts share a token, over how often they would if each token drew its experts "
    "without regard to each other. 1 is chance.",
    "Layers and experts are numbered from 0, as in the model.",
    "Shared experts see every token and are not shown. Filling at the end of a text is not counted.",
)


def load_page(results: Results) -> str:
    """The whole report as one self-contained HTML document."""
    results = clean(results)
    makers = (_summary, _layers, _movie, _over, _domains, _together, _meaning, _set_up)
    sections = [section for make in makers if (section := make(results)) is not None]
    last = results["series"][-1]
    tokens = sum(results["text"]["tokens"].values())
    subtitle = " · ".join(
        part for part in (str(results.get("date") or "")[:10], last["path"], f"{count(tokens)} tokens") if part
    )
    alarming = [alert for alert in last["alerts"] if alert["level"] != "note"]
    banner = f"{len(alarming)} of {len(last['layers'])} layers do not use their experts: see below." if alarming else ""
    return render_page(
        "Expert load", sections, subtitle=subtitle, banner=banner, footer=footer(results.get("finemoe_version"))
    )


def _summary(results: Results) -> Section:
    blocks: list[Any] = [Bullets(summary(results))]
    if said := results["alerts_in_training"]:
        items = [f"Step {alert['step']}: {alert['message']}" for alert in said]
        shown = Bullets(items)
        blocks += [Text(["During training:"]), shown] if len(items) <= 6 else [
            Details(f"{len(items)} alerts during training", [shown])
        ]  # fmt: skip
    return Section("Summary", blocks)


def _layers(results: Results) -> Section:
    series = results["series"]
    last = series[-1]
    rows = [[f"Layer {number}", *_cells(layer)] for number, layer in last["layers"].items()]
    tables: list[Any] = [_table(f"{last['name']}: load by layer", "Layer", rows)]
    if len(series) > 1:
        columns = ["Model", "Loss (nats per token)", "MaxVio", "MaxVio, a batch", "Entropy", "Starved", "Dead"]
        moments = [
            [
                one["name"], fixed(_mean_loss(results, one)), fixed(one["max_vio"], 2), fixed(one["max_vio_batch"], 2),
                fixed(one["entropy"]), str(one["starved"]), str(one["dead"]),
            ]
            for one in series
        ]  # fmt: skip
        tables.append(Table("The series, mean or sum of the layers", columns, moments, range(1, 7)))
    domains = [
        [f"Layer {number} · {domain}", *_cells(one | {"experts": layer["experts"]})]
        for number, layer in last["layers"].items()
        for domain, one in layer["domains"].items()
    ]
    if len(results["text"]["tokens"]) > 1:
        tables.append(Details("By domain", [_table(f"{last['name']}: load by layer and domain", "Layer", domains)]))
    return Section("In figures", tables)


def _table(caption: str, first: str, rows: Sequence[Sequence[str]]) -> Table:
    columns = [first, "Experts", "MaxVio", "MaxVio, a batch", "Entropy", "Effective experts", "CV", "Starved", "Dead"]
    return Table(caption, columns, rows, range(1, 9))


def _cells(layer: Mapping[str, Any]) -> list[str]:
    return [
        str(layer["experts"]), fixed(layer["max_vio"], 2), fixed(layer.get("max_vio_batch"), 2),
        fixed(layer["entropy"]), fixed(layer["effective_experts"], 1), fixed(layer["variation"], 2),
        str(layer["starved"]), str(layer["dead"]),
    ]  # fmt: skip


def _mean_loss(results: Results, one: Mapping[str, Any]) -> float | None:
    tokens = results["text"]["tokens"]
    known = [(tokens[domain], loss) for domain, loss in one["loss"].items() if domain in tokens and loss is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * loss for weight, loss in known) / total if total else None


def _movie(results: Results) -> Section:
    frames = frames_of(results)
    chart = heat_map(results, frames, slider=True)
    caption = "Load of every expert relative to an even share."
    if len(frames) > 1:
        caption += " The slider below the chart moves through the moments; it stands at the last."
    return Section("Load", [Figure([chart], caption)])


def _over(results: Results) -> Section | None:
    maps, curves = over_training(results), evenness(results)
    blocks = []
    if curves:
        caption = "How even the load is. Line: mean of the layers; band: lowest to highest layer."
        if len(results["history"]) > len(results["series"]):
            caption += " As the run's own validations recorded it, on the text it holds out: another than the table's."
        blocks.append(Figure(curves, caption))
    if maps:
        words = "A row is an expert, a column a moment: a row that keeps the colour of 0 is an expert nobody uses."
        if len(maps) < len(results["series"][-1]["layers"]):
            words += f" {len(maps)} layers of {len(results['series'][-1]['layers'])}, evenly chosen."
        blocks.append(Figure(maps, words))
    return Section("Over training", blocks) if blocks else None


def _domains(results: Results) -> Section | None:
    maps = domain_maps(results)
    if not maps:
        return None
    caption = f"{results['series'][-1]['name']}: load of each expert within one domain, relative to an even share."
    return Section("By domain", [Figure(maps, caption)])


def _together(results: Results) -> Section | None:
    layers = results["series"][-1]["layers"]
    rows = [
        [f"Layer {number}", f"{pair['a']} and {pair['b']}", count(pair["count"]), fixed(pair["lift"], 2)]
        for number, layer in layers.items()
        for pair in layer["pairs"][:5]
    ]
    if not rows:
        return None
    columns = ["Layer", "Experts", "Tokens", "Together ÷ chance"]
    note = "Pairs that are, or by their load should be, together in at least 20 tokens."
    blocks: list[Any] = []
    if maps := lift_maps(results):
        caption = "How often two experts are chosen for the same token, over chance; the last colours: ≤ ¼ and ≥ 4."
        blocks.append(Figure(maps, caption))
    table = Table("The pairs most above chance", columns, rows, (2, 3), note)
    blocks.append(table if len(rows) <= 20 else Details(table.caption, [table]))
    found = [
        [domain, f"Layer {number}", f"{pair['a']} and {pair['b']}", count(pair["count"]), fixed(pair["lift"], 2)]
        for domain in results["text"]["tokens"]
        for number, layer in layers.items()
        for pair in layer["domain_pairs"].get(domain, [])[:3]
    ]
    if found and len(results["text"]["tokens"]) > 1:
        caption = "The pairs most above chance within each domain"
        blocks.append(Details(caption, [Table(caption, ["Domain", *columns], found, (3, 4), note)]))
    return Section("Chosen together", blocks)


def _meaning(results: Results) -> Section:
    return Section("What the words mean", [Bullets(MEANINGS)])


def _set_up(results: Results) -> Section:
    blocks: list[Any] = []
    text = results["text"]
    each = ", ".join(f"{domain} {count(tokens)}" for domain, tokens in text["tokens"].items())
    blocks.append(
        Text([f"Tokens read: {each}; windows of {text['length']}, batches of {count(text['tokens_per_batch'])}."])
    )
    if command := results.get("command"):
        blocks.append(Code(str(command), "Command"))
    if machine := results.get("machine"):
        rows = [[key.replace("_", " "), NOTHING if value is None else _shown(value)] for key, value in machine.items()]
        blocks.append(Details("Machine", [Table("Machine", ["Property", "Value"], rows)]))
    return Section("How it was made", blocks)


def _shown(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
