"""The page of a run that learns from its own answers."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from charts.test_run_page import HOSTILE, step, text_of, write_run
from finemoe.charts.page import Card, Details, Section, Text
from finemoe.charts.run.figures import figures
from finemoe.charts.run.page import _answers, run_page
from finemoe.charts.run.rewarded import charts
from finemoe.charts.run.words import summary
from finemoe.core.errors import ConfigError
from finemoe.runs.report import run_results
from finemoe.runs.result import Run


def rewarded(folder: Path) -> Path:
    write_run(folder, steps=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "method": {"kind": "grpo"}}))
    found: list[dict[str, Any]] = []
    for number in range(1, 21):
        figures = {"reward": number / 20, "length": 3.0 + number, "reward_answer": number / 20, "reward_steps": 0.5}
        found.append({**step(number), "terms": {"policy": 0.1, "kl": 0.01}, "figures": figures})
    for number, reward in ((0, 0.2), (20, 0.9)):
        sample = {"prompt": "2+2", "answer": f"<4>{HOSTILE}", "ended": number > 0, "value": reward,
                  "references": [HOSTILE]}  # fmt: skip
        found.append({"kind": "validation", "step": number, "tokens": 100 * number, "seconds": 1.0,
                      "validation_reward": reward, "validation_length": 5.0, "samples": [sample]})  # fmt: skip
    found.append({"kind": "warning", "step": 9, "message": "half of the answers are cut"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    return folder


def test_reward_length_and_answers_stand_where_a_loss_would_say_nothing(tmp_path: Path) -> None:
    results = run_results(rewarded(tmp_path / "run"))
    page = text_of(run_page(results))
    assert "Answers and their reward" in page
    assert "Loss in training" not in page
    assert "Reward of held-out questions 0.900 at step 20; it was 0.200 at step 0." in page
    assert "drawn at temperature 1" in page
    assert "broken off at its length; worth 0.2" in page
    assert "worth 0.9" in page
    assert "Step 9: half of the answers are cut" in page
    assert HOSTILE not in page
    header = page[page.index("Measured on what was held out") :]
    assert "<th" in header
    assert ">loss<" not in header[: header.index("</table>")]


def answered(times: int, questions: int = 5) -> dict[str, Any]:
    """Results with `times` measurements, the answers of each named after its step; the last is very long."""
    found = []
    for number in range(times):
        step, last = 10 * number, number == times - 1
        samples = [
            {
                "prompt": f"question {place}",
                "answer": f"says {step} to {place}" + " on" * 5000 * last,
                "ended": True,
                "value": float(last),
                "verdicts": {"answer": "right" if last else "wrong", "format": "right"},
            }
            for place in range(questions)
        ]
        found.append({"kind": "validation", "step": step, "tokens": step, "seconds": 1.0, "samples": samples})
    return {"validations": found}


def folded(section: Section) -> list[tuple[str, list[Card]]]:
    return [(one.summary, one.blocks[-1].cards) for one in section.blocks if isinstance(one, Details)]


def test_answers_to_the_same_questions_at_many_measurements_are_folded_away() -> None:
    """Few enough that the page stays small, evenly spaced, each with what the rewards said of it."""
    section = _answers(answered(40))
    assert section is not None
    shown = folded(section)
    assert [summary for summary, _ in shown] == ["Its answers at 12 of 40 measurements"] * 4
    for place, (_, cards) in enumerate(shown):
        at = [int(one.title.removeprefix("Step ")) for one in cards]
        assert (at[0], at[-1], len(at)) == (0, 390, 12)
        assert {later - earlier for earlier, later in pairwise(at)} <= {30, 40}
        assert all(one.text.startswith(f"says {step} to {place}") for one, step in zip(cards, at, strict=True))
        assert [one.note for one in cards] == ["answer: wrong; format: right; worth 0"] * 11 + [
            "answer: right; format: right; worth 1"
        ]
        assert len(cards[-1].text) == 2000 + len(" ..."), "its end is cut off"
    few = _answers(answered(5))
    assert few is not None
    assert [(summary, len(cards)) for summary, cards in folded(few)] == [("Its answers at all 5 measurements", 5)] * 4
    three = _answers(answered(3))
    assert three is not None
    assert not folded(three), "all of them stand there"


def test_what_would_be_right_stands_beside_the_answers_and_the_folded_ones() -> None:
    results = answered(5)
    unknown = _answers(results)
    assert unknown is not None
    assert [one.paragraphs for one in unknown.blocks if isinstance(one, Text)][1:] == []
    for one in results["validations"]:
        one["samples"][0]["references"] = ["4", "four"]
        one["samples"][1]["references"] = ["x" * 5000]
    section = _answers(results)
    assert section is not None
    said = [one.paragraphs[0] for one in section.blocks if isinstance(one, Text)][1:]
    assert said == ["Right: 4 or four", f"Right: {'x' * 2000} ..."]
    inside = [[text.paragraphs[0] for text in one.blocks[:-1]] for one in section.blocks if isinstance(one, Details)]
    assert inside == [[said[0]], [said[1]], [], []]


def test_a_question_that_came_later_is_shown_from_then_on() -> None:
    """A run that goes on with more samples has had fewer before."""
    results = answered(6)
    for one in results["validations"][:2]:
        one["samples"] = one["samples"][:1]
    section = _answers(results)
    assert section is not None
    assert [len(cards) for _, cards in folded(section)] == [6, 4, 4, 4]


def test_the_run_is_drawn_along_its_steps(tmp_path: Path) -> None:
    """Tokens are of the model's own making: two steps of one length are no wider apart than others."""
    made = figures(run_results(rewarded(tmp_path / "run")))
    assert "speed" in made
    for name, chart in made.items():
        said = json.dumps(chart.to_dict())
        assert "training tokens" not in said
        assert '"training steps"' in said or name == "load"
    speed = made["speed"].to_dict()
    (data,) = speed["datasets"].values()
    assert [row["x"] for row in data] == list(range(1, 21))


def changed(folder: Path, **figures: float) -> dict[str, Any]:
    """Results of the run with other figures in each step, and a reward that is only watched."""
    config = json.loads((folder / "config.json").read_text())
    config["method"]["rewards"] = [{"kind": "answer"}, {"kind": "format", "name": "steps", "weight": 0.0}]
    (folder / "config.json").write_text(json.dumps(config))
    results = run_results(folder)
    for point in results["steps"]:
        point["figures"] |= figures
    return results


def titles(results: dict[str, Any]) -> list[str]:
    return [json.loads(json.dumps(one.to_dict()))["encoding"]["y"]["title"] for one in charts(results)[0]]


def test_what_is_only_watched_is_no_part_of_the_reward(tmp_path: Path) -> None:
    results = changed(rewarded(tmp_path / "run"), reward_answer=0.25)
    assert "only watched: steps" in titles(results)
    assert "answer, before its weight" in titles(results), "and its weight is not 0"
    assert "of it: steps" not in titles(results)


def test_length_stands_beside_how_it_goes_with_reward(tmp_path: Path) -> None:
    """On an axis that a correlation fills, so that a small one looks small."""
    results = changed(rewarded(tmp_path / "run"), length_correlation=0.1)
    assert titles(results)[:2] == ["tokens of an answer", "correlation of length and reward"]
    assert charts(results)[0][1].to_dict()["encoding"]["y"]["scale"]["domain"] == [0, 1]


def test_what_most_steps_have_not_is_points_that_no_line_joins(tmp_path: Path) -> None:
    """A line from step 9 to 16 would show what was never measured."""
    results = changed(rewarded(tmp_path / "run"), length_correlation=0.1)
    for point in results["steps"]:
        if point["step"] not in (1, 9, 16):
            del point["figures"]["length_correlation"]
    length, related = (one.to_dict()["mark"]["type"] for one in charts(results)[0][:2])
    assert (length, related) == ("line", "point")


def test_a_single_reward_is_drawn_once(tmp_path: Path) -> None:
    """Its own chart was that of the reward again."""
    results = changed(rewarded(tmp_path / "run"))
    assert titles(results) == ["tokens of an answer", "only watched: steps", "divergence from the reference"]
    assert figures(results)["reward"].to_dict()["layer"]


def test_what_is_0_all_the_time_is_a_sentence_and_no_axis(tmp_path: Path) -> None:
    """Rounding was drawn from 0 to -8e-10, as if something had happened."""
    nothing = {"off_policy_kl": -8e-10, "clip_share": 0.0, "unreadable_answer": 0.0}
    results = changed(rewarded(tmp_path / "run"), **nothing)
    drawn, flat = charts(results)
    assert flat == ["tokens that are clipped", "off-policy KL", "nothing to judge: answer"]
    page = text_of(run_page(results))
    assert "0 in every step: tokens that are clipped, off-policy KL and nothing to judge: answer." in page
    some = changed(rewarded(tmp_path / "other"), off_policy_kl=2e-5, unreadable_answer=0.5, dead_groups=0.004)
    axes = {one.to_dict()["encoding"]["y"]["title"]: one.to_dict()["encoding"]["y"] for one in charts(some)[0]}
    assert axes["off-policy KL"]["scale"]["domain"] == [0, 1e-3]
    assert axes["groups without spread"]["scale"]["domain"] == [0, 0.01]
    assert axes["nothing to judge: answer"]["axis"]["format"] == "~%"
    assert "domain" not in axes["nothing to judge: answer"]["scale"]
    assert len(axes) == len(drawn) + 3


def test_where_there_is_no_reference_nothing_is_said_of_one(tmp_path: Path) -> None:
    results = changed(rewarded(tmp_path / "run"))
    for point in results["steps"]:
        del point["figures"]["kl"]
    assert "divergence" not in text_of(run_page(results))
    assert "divergence from the reference" not in titles(results)


def test_where_the_time_went_is_one_chart(tmp_path: Path) -> None:
    results = changed(rewarded(tmp_path / "run"), time_rollout=0.6, time_reward=0.1)
    assert "share of a step's time" not in titles(results), "an earlier version did not say what else there was"
    results = changed(rewarded(tmp_path / "other"), time_rollout=0.6, time_reward=0.1, time_update=0.3)
    assert titles(results)[-1] == "share of a step's time"


@pytest.mark.parametrize(
    ("levels", "said"),
    [([None], "1 alert: see below."), (["note"], "No alerts; one note below."),
     ([], "No alerts."), ([None, None], "2 alerts: see below."),
     ([None, "note"], "1 alert: see below.")],
)  # fmt: skip
def test_an_alert_of_a_method_is_not_about_experts(tmp_path: Path, levels: list[str | None], said: str) -> None:
    results = run_results(rewarded(tmp_path / "run"))
    results["alerts"] = [
        {"kind": "warning", "step": 9, "message": "it", **({"level": level} if level else {})} for level in levels
    ]
    assert summary(results)[-1] == said


def test_held_out_figures_are_called_as_in_the_charts_and_zeros_are_left_out(tmp_path: Path) -> None:
    """A narrow window showed nothing of what mattered, behind columns of zeros."""
    results = changed(rewarded(tmp_path / "run"))
    for one in results["validations"]:
        one |= {"validation_reward_answer": one["validation_reward"], "validation_greedy_reward_answer": 0.5,
                "validation_reward_steps": 0.75, "validation_failed_share": 0.0}  # fmt: skip
    page = text_of(run_page(results))
    table = page[page.index("Measured on what was held out</h2>") :]
    head = re.findall(r"<th scope=\"col\"[^>]*>([^<]*)</th>", table[: table.index("</thead>")])
    assert head == ["Step", "reward", "tokens of an answer", "greedily: answer", "only watched: steps"]
    assert "0 every time: answers not judged." in table


@pytest.mark.parametrize(("count", "said"), [(16, None), (40, "16 of 40 measurements; all are in metrics.jsonl")])
def test_measurements_that_are_left_out_are_counted(tmp_path: Path, count: int, said: str | None) -> None:
    folder = rewarded(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [one for one in lines if one["kind"] != "validation"]
    head = {"kind": "validation", "tokens": 1, "seconds": 1.0}
    lines += [{**head, "step": 1 + n, "validation_reward": None if n > 9 else 0.5} for n in range(count)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    page = text_of(run_page(run_results(folder)))
    table = page[page.index("Measured on what was held out") :]
    assert "measurements; all are" in table if said else "measurements; all are" not in table
    assert said is None or said in table
    assert ">reward<" in table[: table.index("</table>")], "it was measured once"


def test_a_plot_of_such_a_run_is_its_reward(tmp_path: Path) -> None:
    """It was the surrogate's loss, under a legend that named a line which was not there."""
    run = Run(rewarded(tmp_path / "run"), {}, interrupted=True)
    assert run.plot().name == "reward"
    plain = Run(write_run(tmp_path / "plain"), {}, interrupted=True)
    assert plain.plot().name == "loss"
    with pytest.raises(ConfigError, match="no figure 'loss'"):
        run.plot("loss")
    with pytest.raises(ConfigError, match="no figure 'loss'"):
        Run(write_run(tmp_path / "begun", steps=0), {}, interrupted=True).plot()


def test_a_legend_names_what_is_drawn(tmp_path: Path) -> None:
    results = run_results(write_run(tmp_path / "run", steps=10))
    said = json.dumps(figures(results)["loss"].to_dict())
    assert '"domain": ["training"]' in said


def test_figures_are_means_of_the_steps_of_a_point(tmp_path: Path) -> None:
    results = run_results(rewarded(tmp_path / "run"))
    assert results["steps"][-1]["figures"]["reward"] == 1.0
    length, *_ = charts(results)[0]
    (data,) = length.to_dict()["datasets"].values()
    assert [row["value"] for row in data] == [3.0 + number for number in range(1, 21)]
    made = figures(results)
    assert "loss" not in made, "a policy gradient's loss says nothing"
    (data,) = made["reward"].to_dict()["datasets"].values()
    assert [row["value"] for row in data if row["arm"] == "training"] == [number / 20 for number in range(1, 21)]
    assert [(row["x"], row["value"]) for row in data if row["arm"] == "held out"] == [(0, 0.2), (20, 0.9)]
