"""The report of `finemoe evaluate` as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finemoe.charts.evaluation.figures import difference_chart, score_charts
from finemoe.charts.evaluation.words import (
    chance_text,
    difference_text,
    interval_text,
    is_share,
    metric_name,
    p_text,
    score_text,
    value_text,
)
from finemoe.charts.numbers import NOTHING, Results, clean, count, duration, finite
from finemoe.charts.page import Bullets, Code, Details, Figure, Section, Table, Text, render_page
from finemoe.charts.words import footer, listed


def evaluation_page(results: Results) -> str:
    """The whole report as one self-contained HTML document."""
    results = clean(results)
    makers = (_summary, _scores, _differences, _groups, _left_out, _set_up)
    sections = [section for make in makers if (section := make(results)) is not None]
    models = list(results["models"])
    subtitle = f"{listed(models)} · {str(results.get('date') or '')[:10]}"
    return render_page("Evaluation", sections, subtitle=subtitle, footer=footer(results.get("version")))


def _summary(results: Results) -> Section:
    lines = []
    for task, about in results["tasks"].items():
        for model, scores in results["scores"].items():
            if task not in scores:
                continue
            own = scores[task]
            lines.append(f"{about['title']}, {model}: {_sentence(own, about)}")
    for pair in results["differences"]:
        title = results["tasks"][pair["task"]]["title"]
        said = f"{difference_text(pair, pair['metric'])} over {pair['n']} items that both answered"
        if pair["verdict"] == "undecided":
            why = f": {pair['reason']}" if pair.get("reason") else ""  # folders of earlier versions have none
            lines.append(f"{title}: {pair['a']} against {pair['b']} is undecided ({said}){why}.")
        else:
            lines.append(f"{title}: {pair['a']} is {pair['verdict']} than {pair['b']} ({said}).")
    return Section("Summary", [Bullets(lines)])


def _sentence(own: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    estimate = own["metrics"].get(about["metric"])
    if estimate is None:
        return "no item could be judged."
    said = f"{metric_name(about['metric'])} {value_text(estimate['value'], about['metric'])}"
    said += f", 95 % interval {interval_text(estimate, about['metric'])}, {estimate['n']} items"
    low, high, chance = (finite(value) for value in (estimate["low"], estimate["high"], about["chance"]))
    if chance is not None and low is not None and high is not None:
        where = "above" if low > chance else "below" if high < chance else "not told from"
        said += f"; {where} guessing ({chance_text(chance, about['metric'])})"
    if own["truncated"]:
        said += f"; {own['truncated']} of {own['asked']} contexts were cut to fit the model"
    if undecided := own["outcomes"].get("undecided"):
        said += f"; a lower bound, as {undecided} answers could not be compared with the right one and score as wrong"
    return said + "."


def _scores(results: Results) -> Section:
    blocks: list[Any] = []
    for metric, share, chart in score_charts(results):
        caption = "Marker: score; bar: 95 % interval"
        caption += "; upright tick: what guessing scores" if share else f"; {metric_name(metric)}, lower is better"
        blocks.append(Figure([chart], caption + "."))
    rows = []
    for task, about in results["tasks"].items():
        for model, scores in results["scores"].items():
            for metric, estimate in scores.get(task, {}).get("metrics", {}).items():
                headline = about["title"] if metric == about["metric"] else f"{about['title']}, also"
                cells = [score_text(estimate, metric), interval_text(estimate, metric), str(estimate["n"])]
                rows.append(
                    [
                        headline,
                        model,
                        metric_name(metric),
                        *cells,
                        chance_text(about["chance"] if is_share(metric) else None, metric),
                    ]
                )
    columns = ["Task", "Model", "Metric", "Score ± standard error", "95 % interval", "n", "Guessing"]
    note = (
        "Of what is right or wrong: binomial error and Wilson's interval. Of all else: the jackknife's error, and at "
        "each end the wider of Student's t and the studentised bootstrap over items."
    )
    return Section("Scores", [*blocks, Table("Every metric of every task", columns, rows, (3, 4, 5, 6), note)])


def _differences(results: Results) -> Section | None:
    if not results["differences"]:
        return None
    rows, tests = [], {"mcnemar": "McNemar", "ratio": "t, bootstrap", "bootstrap": "bootstrap"}
    for pair in results["differences"]:
        cells = [difference_text(pair, pair["metric"]), interval_text(pair, pair["metric"]), p_text(pair["p_value"])]
        title = results["tasks"][pair["task"]]["title"]
        test = tests.get(pair["test"], NOTHING)
        rows.append([title, pair["a"], pair["verdict"], pair["b"], *cells, test, str(pair["n"])])
    columns = ["Task", "First", "Is", "Second", "First − second ± error", "95 % interval", "p", "Test", "n"]
    note = (
        "Undecided: the test does not reject at 5 % that both are equally good, or fewer than ten items were asked, or "
        "items that weigh by their length tell no more than ten would. Of Student's t and the studentised bootstrap "
        "the larger p counts. McNemar's test is exact, the interval beside it is not: where few items differ, the "
        "interval can leave 0 out and the test still not decide."
    )
    table = Table("Paired differences over the items that both models answered", columns, rows, (4, 5, 6, 8), note)
    chart = difference_chart(results)
    caption = "Right of the zero marks the first-named model scores higher. Filled: decided at 5 %; hollow: undecided."
    return Section("Model against model", [*([Figure([chart], caption)] if chart is not None else []), table])


def _groups(results: Results) -> Section | None:
    blocks: list[Any] = []
    for task, about in results["tasks"].items():
        models = [m for m, scores in results["scores"].items() if len(scores.get(task, {}).get("groups", {})) > 1]
        if not models:
            continue
        metric = about["metric"]
        names = sorted({group for model in models for group in results["scores"][model][task]["groups"]})
        rows = []
        for group in names:
            found = [results["scores"][model][task]["groups"].get(group) for model in models]
            size = next((str(estimate["n"]) for estimate in found if estimate), NOTHING)
            rows.append([group, size, *(score_text(estimate, metric) for estimate in found)])
        means = [score_text(results["scores"][model][task]["macro"], metric) for model in models]
        rows.append(["mean of the groups", NOTHING, *means])
        caption = f"{about['title']}: {metric_name(metric)} by group"
        table = Table(caption, ["Group", "n", *models], rows, range(1, 2 + len(models)), "", (len(rows) - 1,))
        blocks.append(table if len(rows) <= 15 else Details(f"{about['title']}: {len(names)} groups", [table]))
    return Section("By group", blocks) if blocks else None


def _left_out(results: Results) -> Section:
    rows, notes = [], []
    for task, about in results["tasks"].items():
        for model, scores in results["scores"].items():
            if task not in scores:
                continue
            own = scores[task]
            ends = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(own["outcomes"].items()))
            cells = [str(own[key]) for key in ("asked", "skipped", "truncated", "unfinished")]
            speed = count(own["tokens_per_second"]) if own["tokens_per_second"] else NOTHING
            rows.append(
                [about["title"], model, *cells, ends, duration(own["seconds"]), speed, str(own["reused_answers"])]
            )
            notes += [f"{about['title']}, {model}: {note}" for note in own["notes"]]
    columns = [
        "Task", "Model", "Items asked", "Records skipped", "Contexts cut", "Answers cut off", "Outcomes", "Time",
        "Tokens per second", "Answers kept",
    ]  # fmt: skip
    note = (
        "Skipped: could not be read. Contexts cut: from the left, to fit the model. Cut off: neither a stop nor the "
        "model ended them. Undecided: answered, but it could not be told whether rightly; scores as wrong. Error: "
        "judging failed; no score. Kept: from an earlier run; speed is of the others, while the model works."
    )
    table = Table("What became of the items", columns, rows, (2, 3, 4, 5, 7, 8, 9), note)
    return Section(
        "What was left out",
        [table, *([Details("What went wrong, the first of each", [Bullets(notes)])] if notes else [])],
    )


def _set_up(results: Results) -> Section:
    settings = results["settings"]
    lines = []
    for about in results["tasks"].values():
        least, most, wanted = about["shots"], about["shots_most"], about["shots_wanted"]
        shots = str(least) if least == most else f"{least} to {most}"
        shots += f" of {wanted} wanted" if least < wanted else ""
        lines.append(f"{about['title']}: {shots} worked examples, {about['items']} items, prompts {about['prompts']}.")
    for name, model in results["models"].items():
        exact = (
            "the same at every batch size" if model["batch_invariant"] else "to rounding, the same at every batch size"
        )
        lines.append(
            f"{name}: {count(model['parameters'])} parameters in {model['dtype']} on {model['device']}, reads at most "
            f"{model['reach']} tokens, {exact}; {model['path']}, fingerprint {model['fingerprint']}."
        )
    if settings["sandbox"]:
        lines.append("Code ran behind: " + "; ".join(f"{k}: {v}" for k, v in settings["sandbox"].items()) + ".")
    blocks: list[Any] = [Bullets(lines)]
    if command := results.get("command"):
        blocks += [Text(["This command repeats it:"]), Code(str(command), "Command")]
    about_machine = {"settings": settings, "machine": results.get("machine")}
    blocks.append(
        Details("Settings and machine", [Code(json.dumps(about_machine, indent=2, ensure_ascii=False), "Settings")])
    )
    return Section("How it was made", blocks)
