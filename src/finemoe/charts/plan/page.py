"""The report of `finemoe plan` as one HTML page."""

from __future__ import annotations

from typing import Any

from finemoe.charts.numbers import NOTHING, Results, clean, count, fixed, percent
from finemoe.charts.page import Bullets, Code, Details, Figure, Section, Table, Text, render_page
from finemoe.charts.plan.figures import memory_bars, step_bar, time_line
from finemoe.charts.plan.words import gib, moved, summary, took, uneven
from finemoe.charts.words import footer

MEANINGS = (
    "State (weights, gradients, moments) is exact, in float32 but for moments that a recipe has in bf16, spread as the "
    "layout says. Activations are counted as what each product, norm and attention keeps. Beside: an allowance for "
    "context and libraries.",
    "MaxVio: (largest − mean) ÷ mean of the rows that a process's experts receive. Memory is told at 0 and at 1.",
    "FLOPs: 6 for each active weight of a product and three forwards of the causal half of attention's scores.",
    "Exchanges: bytes that reach one rank, as counted from the layout; of a ring of n, (n−1)/n of the whole.",
    "Bubble: how long the rank waits that waits most, by the schedule's formula, or as simulated.",
    "The interval: between which four of five published runs lay that the constants were not fitted on.",
)


def plan_page(results: Results) -> str:
    """The whole report as one self-contained HTML document."""
    results = clean(results)
    makers = (_summary, _search, _memory, _step, _exchanges, _published, _meaning, _set_up)
    sections = [section for make in makers if (section := make(results)) is not None]
    subtitle = f"{results['on']} · {results['layout']}"
    banner = "" if results["memory"]["fits"] else "This layout does not fit: see Memory."
    return render_page(
        f"Plan of {results['model']}", sections, subtitle=subtitle, banner=banner,
        footer=footer(results.get("finemoe_version")),
    )  # fmt: skip


def _summary(results: Results) -> Section:
    return Section("Summary", [Bullets(summary(results))])


def _search(results: Results) -> Section | None:
    found = results.get("search")
    if not found:
        return None
    rows = [
        [row["layout"], took(row["seconds"]), count(row["tokens_per_second"]), gib(row["memory"]),
         uneven(row), f"{100 * row['bubble']:.1f} %"]
        for row in found["ranked"]
    ]  # fmt: skip
    said = (
        f"{found['tried']} layouts: {found['fitting']} fit, {found['impossible']} cannot be, or finemoe does not train "
        "by them. The first, for train, launch and plan:"
    )
    first = Code(found["ranked"][0]["options"], "Options of the first layout")
    columns = ["Layout", "Step", "Tokens/s, device", "Memory", "At MaxVio 1", "Bubble"]
    table = Table("The fastest", columns, rows, range(1, 6), strong=(0,), wrap=True)
    return Section("Layouts", [Text([said]), first, table])


def _memory(results: Results) -> Section:
    memory = results["memory"]
    names = [key for key in memory["peak"] if memory["uneven"][key] or memory["peak"][key]]
    rows = [[key.replace("_", " "), gib(memory["peak"][key]), gib(memory["uneven"][key])] for key in names]
    table = Table("The rank that takes most", ["Part", "MaxVio 0", "MaxVio 1"], rows, (1, 2), strong=(len(rows) - 1,))
    caption = "Memory of each rank of the pipeline, and of the fullest at MaxVio 1. Dashed: what a device has."
    return Section("Memory", [Figure([memory_bars(results)], caption), table])


def _step(results: Results) -> Section:
    blocks: list[Any] = [Figure([step_bar(results)], "What a step is spent on, on the rank that works longest.")]
    if (line := time_line(results)) is not None:
        shown, all_ = results["timeline"]["micro_batches"], results["step"]["micro_batches"]
        words = f"The time line of {shown} micro-batches" + (
            f" of {all_}; the ends are the same." if shown < all_ else "."
        )
        blocks.append(Figure([line], words))
    flops = results["flops_per_token"]
    rows = [[key, f"{value / 1e9:,.2f}", f"{100 * value / flops['total']:.1f} %"] for key, value in flops.items()]
    columns = ["Part", "GFLOP a token", "Share"]
    return Section("A step", [*blocks, Table("Arithmetic, forward and back", columns, rows, (1, 2))])


def _exchanges(results: Results) -> Section | None:
    rows = [
        [one["name"], str(one["group"]), f"{one['times']:,.0f}", moved(one["bytes"]), moved(one["total"])]
        for one in results["exchanges"]
    ]
    if not rows:
        return None
    columns = ["Exchange", "Processes", "Times a step", "Bytes each", "Bytes a step"]
    return Section("What is moved", [Table("Bytes that reach one rank", columns, rows, range(1, 5))])


def _published(results: Results) -> Section:
    run = results["v3_run"]
    said = (
        f"DeepSeek-V3's published run, {count(run['tokens'])} tokens on 2,048 H800: printed "
        f"{run['published_hours'] / 1e3:,.0f}K device-hours. With the constants fitted on half of the published runs, "
        f"this run among them: {run['predicted_hours'] / 1e3:,.0f}K "
        f"({percent(100 * (run['predicted_hours'] / run['published_hours'] - 1))}). With one factor more, "
        f"{fixed(run['factor'])}, fitted on this run itself: {run['with_factor_hours'] / 1e3:,.0f}K. That factor is "
        "all that the planner cannot count: imbalance, stops, what the printed layout does not tell."
    )
    rows = [
        [row["name"], count(row["measured"]), count(row["predicted"]),
         percent(100 * (row["predicted"] / row["measured"] - 1)), "fitted" if row["fitted"] else "judged"]
        for row in results["published"]
    ]  # fmt: skip
    blocks: list[Any] = [Text([said])]
    if rows:
        columns = ["Published run on this device", "Tokens/s measured", "predicted", "Error", "Part in the fit"]
        blocks.append(Table("Predicted and measured, tokens a second and device", columns, rows, (1, 2, 3)))
    judged = [
        [family, str(errors["points"]), f"{100 * errors['median']:.1f} %", f"{100 * errors['worst']:.0f} %",
         errors["worst_point"]]
        for family, errors in results["judged"].items()
    ]  # fmt: skip
    columns = ["Family", "Runs", "Median error", "Worst", "Which"]
    blocks.append(Table("On published runs without a part in the fit", columns, judged, (1, 2, 3)))
    return Section("What others measured", blocks)


def _meaning(results: Results) -> Section:
    return Section("What the words mean", [Bullets(MEANINGS)])


def _set_up(results: Results) -> Section:
    device = results["device"]
    rows = [
        [key.replace("_", " "), NOTHING if value is None else str(value)] for key, value in results["setup"].items()
    ]
    peaks = ", ".join(f"{name} {value / 1e12:,.0f}" for name, value in device["peak"].items())
    facts = [
        ["peak, TFLOP/s", peaks], ["memory", gib(device["memory"])], ["bandwidth", f"{moved(device['bandwidth'])}/s"],
        ["devices of a domain", str(device["domain"])], ["link", f"{moved(device['link'])}/s"],
        ["network", f"{moved(device['network'])}/s"], ["source", device["source"]],
    ]  # fmt: skip
    blocks: list[Any] = [
        Details("The run", [Table("The run", ["Key", "Value"], rows)]),
        Details("The device", [Table(device["name"], ["Property", "Value"], facts)]),
    ]
    if command := results.get("command"):
        blocks.append(Code(str(command), "Command"))
    return Section("How it was made", blocks)
