"""The page of `finemoe paper`: each claim, the printed figure, ours, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finemoe.charts.comparison.figures import final_losses
from finemoe.charts.comparison.words import arm_names, by_loss, stat
from finemoe.charts.numbers import Results, clean, count, decimals_for, duration, plus_minus, scientific
from finemoe.charts.page import Bullets, Code, Figure, Section, Table, Text, render_page
from finemoe.charts.paper.figures import active_panels, differences, masked_panels
from finemoe.charts.paper.words import COLUMNS, claim_row, counted, every_claim
from finemoe.charts.words import footer


def paper_page(results: Results) -> str:
    """The whole report as one self-contained HTML document."""
    results = clean(results)
    sections = [_verdicts(results), _claims(results), *_figures(results), _arms(results), _how(results)]
    waiting = sum(claim["verdict"] == "not run" for claim in every_claim(results))
    banner = f"{waiting} claims are not judged: their runs were not asked for, or have not finished." if waiting else ""
    seeds = len(results["seeds"])
    subtitle = f"{results['date'][:10]} · scale {results['scale']} · {seeds} seeds · {_tokens(results)} tokens a run"
    return render_page(
        results["title"], sections, subtitle=subtitle, banner=banner, footer=footer(results["finemoe_version"])
    )


def _tokens(results: Results) -> str:
    return count(results["recipe"]["budget"]["value"])


def _verdicts(results: Results) -> Section:
    blocks: list[Any] = [Text([counted(results), f"Scale {results['scale']}: {results['scale_about']}."])]
    outcomes = [(claim["statement"], claim) for claim in every_claim(results)]
    outcomes += [
        (f"{claim['statement']}, on training text", claim["on_training_text"])
        for claim in every_claim(results)
        if claim["on_training_text"]
    ]
    kinds = {
        "Contradicted:": [f"{said}: {one['reason']}" for said, one in outcomes if one["verdict"] == "contradicted"],
        "Undecided, with a mean that points against the paper:": [
            f"{said}: {one['reason']}" for said, one in outcomes if one["points_against"]
        ],
        "Reproduced:": [f"{said}: {one['reason']}" for said, one in outcomes if one["verdict"] == "reproduced"],
    }
    for title, items in kinds.items():
        if items:
            blocks += [Text([title]), Bullets(items)]
    blocks.append(
        Text([
            f"A verdict is about this scale alone{_smaller(results)}. Each claim is tested on its own at 95 %, so of "
            "twenty that are not so about one would still look decided by chance.",
        ])
    )  # fmt: skip
    return Section("Verdicts", blocks)


def _smaller(results: Results) -> str:
    """How far it is from the paper's validation runs: 1.97 B parameters, 100 B tokens."""
    ours = results["arms"].get("deepseek-moe")
    if ours is None:
        return ""
    parameters, tokens = 1.97e9 / ours["total_parameters"], 1e11 / results["recipe"]["budget"]["value"]
    fewer, less = (f"{float(f'{ratio:.2g}'):,.0f}" for ratio in (parameters, tokens))
    return f": models {fewer} times smaller than the paper's, trained on {less} times less text"


def _claims(results: Results) -> Section:
    blocks: list[Any] = []
    idle = []
    for one in results["experiments"].values():
        if all(claim["verdict"] == "not run" for claim in one["claims"]):
            idle.append(f"{one['title']}: {one['command']}")
            continue
        rows = [claim_row(claim) for claim in one["claims"]]
        strong = [number for number, claim in enumerate(one["claims"]) if claim["verdict"] == "contradicted"]
        blocks.append(Table(one["title"], COLUMNS, rows, numeric=(7,), note=one["note"], strong=strong, wrap=True))
        blocks.append(Code(one["command"], f"Command for {one['title']}"))
    if idle:
        blocks += [Text(["Not run:"]), Bullets(idle)]
    return Section("Claim by claim", blocks)


def _figures(results: Results) -> Iterator[Section]:
    chart = differences(results)
    if chart is not None:
        caption = (
            "Markers: ours, with the 95 % interval over seeds; thick ticks: the printed difference. Left of 0 the "
            "first of the two has the lower loss."
        )
        yield Section("Differences in loss", [Figure([chart], caption)])
    masked, active = masked_panels(results), active_panels(results)
    blocks: list[Any] = []
    if masked:
        blocks.append(
            Figure(masked, "Figure 4: the experts each token would choose first are left out, without retraining.")
        )
    if active:
        blocks.append(
            Figure(active, "Figure 5: fewer routed experts a token than it was trained with, without retraining.")
        )
    if blocks:
        yield Section("Experts left out", blocks)


def _arms(results: Results) -> Section:
    names, arms = arm_names(results), results["arms"]
    digits = decimals_for(stat(arm, "validation_loss") for arm in arms.values())
    rows = []
    for arm in by_loss(results):
        record = arms[arm]
        rows.append([
            names[arm], str(record["routing"]), plus_minus(stat(record, "validation_loss"), digits),
            plus_minus(stat(record, "training_loss"), digits), plus_minus(stat(record, "max_vio"), 2),
            count(record["total_parameters"]), count(record["active_parameters"]),
            scientific(record["training_flops"]), duration(record["seconds"]),
        ])  # fmt: skip
    columns = (
        "Arm",
        "Experts",
        "Held-out loss",
        "Training loss",
        "MaxVio",
        "Parameters",
        "Active",
        "FLOPs",
        "Time a run",
    )
    table = Table(
        "Means over seeds ± half the 95 % interval; losses in nats per token", columns, rows, numeric=tuple(range(2, 9))
    )
    chart = final_losses(results)
    figure = [Figure([chart], "Held-out loss of every arm; ticks are single seeds.")] if chart is not None else []
    return Section("Arms", [table, *figure])


def _how(results: Results) -> Section:
    machine = results["machine"]
    text = [
        f"{machine.get('processor')}, {machine.get('cores')} cores, torch {machine.get('torch')}, "
        f"{machine.get('precision')}.",
        "A claim sets two figures of runs with the same seed against each other; the interval is Student's t over "
        f"seeds. Two losses count as equal within {results['margin']} nats per token. reproduced: the interval allows "
        "nothing else; contradicted: it excludes the claim; undecided: it allows both.",
        "On training text: the same of the mean loss over the last fifth of the steps, at most 100, after "
        f"{results['passes']:.2f} passes over the text; below one pass every token is met for the first time.",
        *results["notes"],
    ]
    return Section("How it was done", [Text(text), Code(results["command"], "Command for everything")])
