"""The page of one run: where it stands, its curves, its experts, what it writes, and how it was set up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from finemoe.charts.comparison.page import MAX_VIO, flat
from finemoe.charts.numbers import NOTHING, Results, clean, count, duration, finite, fixed
from finemoe.charts.page import Bullets, Card, Cards, Code, Details, Figure, Section, Table, Text, render_page
from finemoe.charts.run.figures import answers_itself, balance_chart, line_chart, load_map, loss_chart, reward_chart
from finemoe.charts.run.rewarded import charts, repeats, title_of
from finemoe.charts.run.words import state, summary
from finemoe.charts.words import footer, listed

_MOST_ALERTS = 8
_MOST_ROWS = 16
_MOST_FOLDED, _MOST_TIMES, _MOST_CHARACTERS = 4, 12, 2000
"""Questions whose answers at many measurements are on the page, at how many, and how long: some 100 KB in all."""


def run_page(results: Results) -> str:
    """The whole page as one self-contained HTML document, opened again after `results["refresh"]` seconds."""
    results = clean(results)
    makers = (_state, _rollouts, _loss, _measured, _answers, _balance, _alerts, _samples, _speed, _set_up)
    sections = [section for make in makers if (section := make(results)) is not None]
    where = state(results)
    banner, refresh = "", results["refresh"] if where in ("training", "stopped") else None
    if refresh:
        banner = f"Not finished: this page is written again, and opened again here, every {refresh} seconds."
    elif where == "training":
        banner = "Not finished: a process trains it. With --follow the page is written again until it ends."
    elif where != "finished":
        banner = f"Not finished. `finemoe resume {results['directory']}` goes on with it."
    return render_page(
        f"{results['name']}: {where}",
        sections,
        subtitle=" · ".join((str(results["date"])[:16].replace("T", " "), str(results["directory"]))),
        banner=banner,
        footer=footer(results.get("finemoe_version")),
        refresh=refresh,
    )


def _state(results: Results) -> Section:
    blocks: list[Any] = [Bullets(summary(results))]
    if found := results["summary"]:
        rows = [
            ["Validation loss", fixed(found.get("final_validation_loss"), 4)],
            ["Validation reward", fixed(found.get("final_validation_reward"), 4)],
            ["Answers that could not be judged", _percent(found.get("failed_share"))],
            ["Bits per byte", fixed(found.get("bits_per_byte"), 4)],
            ["Training loss", NOTHING if answers_itself(results) else fixed(found.get("final_training_loss"), 4)],
            ["Tokens", count(found.get("tokens"))],
            ["Time", duration(found.get("seconds"))],
            ["Tokens per second", count(found.get("tokens_per_second"))],
            ["Parameters, total", count(found.get("total_parameters"))],
            ["Parameters, active", count(found.get("active_parameters"))],
            ["MaxVio, mean of layers", fixed(found.get("max_vio"), 2)],
        ]
        blocks.append(Table("At the end", ["", ""], [row for row in rows if row[1] != NOTHING], (1,)))
    return Section("Where it stands", blocks)


def _percent(share: float | None) -> str:
    return f"{share:.1%}" if share else NOTHING


def _loss(results: Results) -> Section | None:
    chart = loss_chart(results)
    if chart is None or answers_itself(results):  # a policy gradient's loss says nothing of how good it is
        return None
    every = results["steps_per_point"]
    joined = f"; a point is the mean of {every} steps" if every > 1 else ""
    caption = f"Loss in training{joined}, and on held-out text. The first, steep part may lie above the axis."
    return Section("Loss", [Figure([chart], caption)])


def _rollouts(results: Results) -> Section | None:
    """What a model that learns from its own answers is rewarded for, how long they are, how far it has gone."""
    if not answers_itself(results) or not results["steps"]:
        return None
    blocks: list[Any] = []
    if (reward := reward_chart(results)) is not None:
        said = "Reward, mean over the rollout of each step, and of held-out questions, answered at temperature 1."
        blocks.append(Figure([reward], said))
    small, flat = charts(results)
    if small:
        said = (
            "Means over the rollout that each step learnt from. A step's time "
            "goes into writing answers (rollout), judging them (reward), and all else (update)."
        )
        blocks.append(Figure(small, said))
    if flat:
        blocks.append(Text([f"0 in every step: {listed(flat)}."]))
    return Section("Answers and their reward", blocks) if blocks else None


def _balance(results: Results) -> Section | None:
    blocks: list[Any] = []
    if (chart := balance_chart(results)) is not None:
        blocks.append(Figure([chart], "MaxVio of each layer, in training steps. " + MAX_VIO))
    if (chart := load_map(results)) is not None:
        blocks.append(Figure([chart], f"Load of every expert {results['load_of']}. Layers and experts count from 0."))
    return Section("Experts", blocks) if blocks else None


def _alerts(results: Results) -> Section | None:
    items = [f"Step {alert['step']}: {alert['message']}" for alert in results["alerts"]]
    if not items:
        return None
    shown: list[Any] = [Bullets(items[-_MOST_ALERTS:])]
    if older := items[:-_MOST_ALERTS]:
        shown.append(Details(f"{len(older)} earlier ones", [Bullets(older)]))
    return Section("Alerts", shown)


_OF_DOCUMENTS = {"kind", "step", "tokens", "seconds", "validation_loss", "bits_per_byte", "max_vio", "dead_experts"}


def _measured(results: Results) -> Section | None:
    """What a method measures beside the loss, at a few steps."""
    found = results["validations"]
    each = [key for one in found for key, value in one.items()
            if key not in _OF_DOCUMENTS and isinstance(value, (int, float))]  # fmt: skip
    keys = list(dict.fromkeys(each))
    if not keys:
        return None
    few = _spaced(found, _MOST_ROWS)
    keys = ["validation_loss", *keys] if "validation_loss" in found[-1] else keys
    told, nothing, title = keys, list[str](), _plain_title
    if answers_itself(results):
        title = partial(title_of, results)
        told, nothing = _telling(keys, found)
    columns = ["Step", *map(title, told)]
    rows = [[f"{one['step']:,}", *(fixed(one.get(key), 3) for key in told)] for one in few]
    left_out = f"{len(few)} of {len(found)} measurements; all are in metrics.jsonl" if len(few) < len(found) else ""
    note = f"0 every time: {listed([title(key) for key in nothing])}." if nothing else ""
    table = Table(left_out, columns, rows, tuple(range(len(columns))), note=note)
    return Section("Measured on what was held out", [table])


def _spaced(found: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """At most so many of them, evenly spaced, the first and the last among them."""
    return found if len(found) <= most else [found[n * (len(found) - 1) // (most - 1)] for n in range(most)]


def _plain_title(key: str) -> str:
    return key.removeprefix("validation_").replace("_", " ")


def _telling(keys: Sequence[str], found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Figures of answers that have something to say, reward and length first, and those that are 0 every time."""
    nothing = [key for key in keys if not any(finite(one.get(key)) for one in found)]
    first = [key for key in ("validation_reward", "validation_length") if key in keys]
    others = [key for key in keys if key not in first and not repeats(found, key, "validation_reward")]
    shown = [key for key in (*first, *others) if key in first or key not in nothing]
    return shown, [key for key in nothing if key not in shown]


def _answers(results: Results) -> Section | None:
    """What the model answers to the same questions, at first and at last, and folded away what it answered between."""
    found = [one for one in results["validations"] if one.get("samples")]
    if not found:
        return None
    drawn = "value" in found[-1]["samples"][0]
    how = "drawn at temperature 1, from the same random numbers each time" if drawn else "the most probable one"
    shown: list[Any] = [Text([f"Questions that were held out; every answer is {how}."])]
    for number, sample in enumerate(found[-1]["samples"]):
        when = [one for one in found if _asked(one, number) == sample["prompt"]]
        cards = [_card(one, number) for one in ([when[0], when[len(when) // 2], when[-1]] if len(when) > 2 else when)]
        right = _right(sample)
        shown += [Code(sample.get("asked", sample["prompt"]), "the question"), *right, Cards(cards)]
        if len(when) > len(cards) and number < _MOST_FOLDED:
            few = _spaced(when, _MOST_TIMES)
            which = f"all {len(when)}" if len(few) == len(when) else f"{len(few)} of {len(when)}"
            folded = Cards([_card(one, number, _MOST_CHARACTERS) for one in few])
            shown.append(Details(f"Its answers at {which} measurements", [*right, folded]))
    return Section("Answers", shown)


def _right(sample: Mapping[str, Any]) -> list[Text]:
    """What would be right, where the record said it."""
    said = " or ".join(map(str, sample.get("references", ())))
    more = " ..." if len(said) > _MOST_CHARACTERS else ""
    return [Text([f"Right: {said[:_MOST_CHARACTERS]}{more}"])] if said else []


def _asked(validation: Mapping[str, Any], number: int) -> str | None:
    """The question of that number; None where fewer were asked, as before `samples` was raised."""
    samples = validation["samples"]
    return samples[number]["prompt"] if number < len(samples) else None


def _card(validation: Mapping[str, Any], number: int, most: int | None = None) -> Card:
    """An answer, how it ended, what each reward said of it, and its worth."""
    own = validation["samples"][number]
    said = [] if own["ended"] else ["broken off at its length"]
    verdicts = own.get("verdicts", {})
    said += [verdict if len(verdicts) == 1 else f"{name}: {verdict}" for name, verdict in verdicts.items()]
    if own.get("value") is not None:
        said.append(f"worth {own['value']:g}")
    answer = own["answer"] if most is None or len(own["answer"]) <= most else own["answer"][:most] + " ..."
    return Card(f"Step {validation['step']:,}", answer, "; ".join(said))


def _samples(results: Results) -> Section | None:
    if (
        not results["samples"] or _answers(results) is not None
    ):  # what was taught to answer has nothing to say by itself
        return None
    said = f"What the model writes from nothing at step {results['sampled_at']:,}; drawn at temperature 0.8."
    cards = [Card(f"Sample {number}", text) for number, text in enumerate(results["samples"], start=1)]
    return Section("Samples", [Text([said]), Cards(cards)])


def _speed(results: Results) -> Section | None:
    shown = (("tokens_per_second", "tokens per second"), ("learning_rate", "learning rate"),
             ("gradient_norm", "gradient norm"))  # fmt: skip
    charts = [chart for key, title in shown if (chart := line_chart(results, key, title)) is not None]
    caption = "Speed by the clock (what else runs on the machine shows), learning rate, gradient norm before clipping."
    return Section("Speed and steps", [Figure(charts, caption)]) if charts else None


def _set_up(results: Results) -> Section:
    blocks: list[Any] = []
    for title, found in (("Machine and versions", results["environment"]), ("Data", results["data"])):
        if found:
            rows = [[key, _shown(value)] for key, value in flat(found)]
            blocks.append(Details(title, [Table(title, ["", ""], rows, wrap=True)]))
    lines = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in flat(results["config"]))
    blocks.append(Details("Configuration, resolved", [Code(lines, "Configuration")]))
    return Section("Configuration", blocks)


def _shown(value: Any) -> str:
    return NOTHING if value is None else str(value)
