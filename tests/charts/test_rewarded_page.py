"""The page of a run that learns from its own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from charts.test_run_page import HOSTILE, step, text_of, write_run
from finemoe.charts.run.figures import figure_charts, figures
from finemoe.charts.run.page import run_page
from finemoe.runs.report import run_results


def rewarded(folder: Path) -> Path:
    write_run(folder, steps=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "method": {"kind": "grpo"}}))
    found: list[dict[str, Any]] = []
    for number in range(1, 21):
        figures = {"reward": number / 20, "length": 3.0 + number, "reward_answer": number / 20, "reward_steps": 0.5}
        found.append({**step(number), "terms": {"policy": 0.1, "kl": 0.01}, "figures": figures})
    for number, reward in ((0, 0.2), (20, 0.9)):
        sample = {"prompt": "2+2", "answer": f"<4>{HOSTILE}", "ended": number > 0, "value": reward}
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


def test_what_is_only_watched_is_no_part_of_the_reward(tmp_path: Path) -> None:
    folder = rewarded(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["method"]["rewards"] = [{"kind": "answer"}, {"kind": "format", "name": "steps", "weight": 0.0}]
    (folder / "config.json").write_text(json.dumps(config))
    page = run_page(run_results(folder))
    assert "only watched: steps" in page
    assert "of it: answer" in page
    assert "of it: steps" not in page


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


def test_figures_are_means_of_the_steps_of_a_point(tmp_path: Path) -> None:
    results = run_results(rewarded(tmp_path / "run"))
    assert results["steps"][-1]["figures"]["reward"] == 1.0
    charts = figure_charts(results, {"reward": "reward", "length": "tokens", "absent": "absent"})
    assert len(charts) == 2
    (data,) = charts[0].to_dict()["datasets"].values()
    assert [row["value"] for row in data] == [number / 20 for number in range(1, 21)]
