"""`finemoe analyze experts` and `finemoe analyze difference`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finemoe.checkpoint.run_state.state import RunState, save


@pytest.fixture(scope="module")
def tuned(run_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, with another router in one layer, as its second step."""
    directory = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(run_directory, directory)
    weights = load_file(next((directory / "checkpoints").iterdir()) / "model.safetensors")
    router = next(name for name in weights if name.endswith("router.weight"))
    weights[router] = weights[router] + 0.3 * torch.randn(weights[router].shape, generator=torch.manual_seed(1))
    state = RunState(weights, {}, {"step": 2}, (directory / "config.json").read_text())
    save(directory / "checkpoints", 2, state, keep=2)
    return directory


TEXTS = ("--text", "def main():\n    return 1\n" * 12, "--length", "32")


def test_experts_writes_cards_page_and_figures(command, tuned, tmp_path):
    out = tmp_path / "cards"
    result = command("analyze", "experts", tuned, *TEXTS, "--out", out, "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed == json.loads((out / "results.json").read_text())
    assert len(printed["cards"]) == sum(layer["experts"] for layer in printed["layers"])
    assert [each["step"] for each in printed["cards"][0]["stability"]] == [1]
    assert printed["tokens"] == sum(each["tokens"] for each in printed["domains"])
    assert 'id="widget-data"' in (out / "report.html").read_text()
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".png"}


def test_experts_prints_a_table_of_80_columns(command, tuned, tmp_path):
    (tmp_path / "code.txt").write_text("def main():\n    return 1\n" * 20)
    (tmp_path / "prose.txt").write_text("one two three [bold]four[/bold] \x1b[31m five\n" * 20)
    corpora = [f"--corpus={name}={tmp_path / name}.txt" for name in ("code", "prose")]
    result = command("analyze", "experts", tuned, *corpora, "--length", "32", "--no-stability")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "most specialised" in result.stdout
    assert "Spec." in result.stdout, "the table must not be squeezed until its headings break off"
    assert "\x1b" not in result.stdout


def test_difference_writes_its_report(command, run_directory, tuned, tmp_path):
    out = tmp_path / "difference"
    result = command("analyze", "difference", run_directory, tuned, *TEXTS, "--out", out)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80 + len(str(out))
    found = json.loads((out / "results.json").read_text())
    first, second = found["layers"][0]["domains"]["all"], found["layers"][1]["domains"]["all"]
    assert first["flip_rate"]["mean"] == first["flip_rate_router"] > 0
    assert first["flip_rate_states"] == second["flip_rate_router"] == 0
    assert found["before"] == str(run_directory)
    assert {path.name for path in (out / "figures").glob("*.svg")} == {
        "flips.svg", "causes.svg", "load_change.svg", "loss.svg"
    }  # fmt: skip


def test_difference_as_json_of_a_model_with_itself(command, run_directory):
    result = command("analyze", "difference", run_directory, run_directory, *TEXTS, "--json")
    found = json.loads(result.stdout)
    assert all(layer["domains"]["all"]["flip_rate"]["mean"] == 0 for layer in found["layers"])
    assert found["domains"][0]["difference"]["mean"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("experts", "nowhere"), "there is nothing here"),
        (("experts", "RUN", "--tokens", "0"), "must both be at least 1"),
        (("difference", "RUN", "nowhere"), "there is nothing here"),
        (("experts", "RUN", "--corpus", "a=nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_are_one_message(command, run_directory, arguments, said):
    result = command("analyze", *(str(run_directory) if word == "RUN" else word for word in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
