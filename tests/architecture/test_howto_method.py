"""The method of docs/howto/add-a-method.md, put into a copy of the package: nothing in training/ or runs/ is edited."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finemoe.core.logs import read_json_lines
from runs.tiny_runs import assert_same_run, checkpoints, recipe, steps, write_corpus

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
from finemoe.runs.run import resume, train
from finemoe.training.trainer import Trainer

def stop_after(step):
    original = Trainer.step
    def stepping(self, *arguments):
        report = original(self, *arguments)
        if report.step == step:
            self.request_stop()
        return report
    Trainer.step = stepping
    return original

folder, raw = Path(sys.argv[1]), json.loads(sys.argv[2])
train(raw, out=folder / "unbroken", quiet=True)
original = stop_after(3)
assert train(raw, out=folder / "broken", quiet=True).interrupted
Trainer.step = original
assert not resume(folder / "broken", quiet=True).interrupted
"""


def page_code() -> str:
    text = (ROOT / "docs/howto/add-a-method.md").read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```\n")[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two runs of the method, one of them stopped after step 3 and resumed; and their recipe."""
    folder = tmp_path_factory.mktemp("method")
    ours = folder / "src/finemoe"
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (ours / "methods/prefer.py").write_text(page_code(), encoding="utf-8")
    table = (ours / "methods/__init__.py").read_text(encoding="utf-8")
    table = table.replace("grpo, pretraining, reward", "grpo, prefer, pretraining, reward")
    entry = '    "pretraining": (pretraining.PretrainingConfig, pretraining.build),\n'
    assert entry in table
    table = table.replace(entry, entry + '    "prefer": (prefer.PreferConfig, prefer.build),\n')
    (ours / "methods/__init__.py").write_text(table, encoding="utf-8")
    corpus = write_corpus(folder / "corpus")
    raw = recipe(corpus, "deepseek-moe", method={"kind": "prefer", "beta": 0.5}, training={"evaluate_every": 2})
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(raw)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, raw


def test_it_is_short() -> None:
    assert len([line for line in page_code().splitlines() if line.strip()]) <= 60


def test_it_learns_what_it_minimises(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    first, *_, last = steps(folder / "unbroken")
    assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)  # no margin before the first update
    assert last["loss"] < 0.8 * first["loss"]
    assert "cross_entropy" not in last["terms"]
    assert last["terms"]["expert"] > 0  # the router is balanced all the same


def test_its_own_measurement_is_recorded(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    measured = [r for r in read_json_lines(folder / "unbroken/metrics.jsonl") if r["kind"] == "validation"]
    assert [record["step"] for record in measured] == [2, 4, 6]
    summary = json.loads((folder / "unbroken/summary.json").read_text())
    assert summary["final_accuracy"] == measured[-1]["accuracy"] > 0.9
    assert "final_validation_loss" not in summary


def test_resumed_it_is_the_unbroken_run_to_the_bit(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    assert_same_run(folder / "unbroken", folder / "broken")
    kept = [load_file(checkpoints(folder / name)[-1] / "method.safetensors") for name in ("unbroken", "broken")]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    state = json.loads((checkpoints(folder / "broken")[-1] / "state.json").read_text())
    assert state["method"] == {"preference": {}}


def test_its_reference_stays_where_the_run_began(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    old, *_, new = (load_file(c / "method.safetensors") for c in checkpoints(folder / "unbroken"))
    weights = load_file(checkpoints(folder / "unbroken")[-1] / "model.safetensors")
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    moved = [name for name, tensor in weights.items() if not torch.equal(tensor, new[f"preference/{name}"])]
    assert len(moved) == len(weights)
