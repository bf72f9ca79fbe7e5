"""A preference needs no second model in memory, nor a second pass with gradients: complaint 10 of those who train."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finemoe.runs.run import train

PROGRAM = """
import json, sys
from finemoe.core import memory
from finemoe.runs.config import resolve_run
from finemoe.runs.run import first_trainer
from finemoe.runs.start import build_method

memory.forget_peak()
before = memory.peak_bytes()  # Python and torch themselves
config = resolve_run(json.loads(sys.argv[1]), "recipe")
trainer, _ = first_trainer(config, build_method(config))
memory.forget_peak()
trainer.run()
print(json.dumps({"peak": memory.peak_bytes() - before, "tokens": trainer.state.tokens}))
"""
PARAMETERS = 22_833_280
WORDS = ("ant", "bee", "cat", "dog", "ear", "fox", "gnu", "hen", "ink", "jay")


def say(drawn: random.Random, count: int) -> str:
    return " ".join(drawn.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 22.8 M parameters, and pairs that fill sequences of 256 tokens with as many as conversations do."""
    made, drawn = tmp_path_factory.mktemp("memory"), random.Random(0)
    (made / "words.txt").write_text("\n\n".join(say(drawn, 200) for _ in range(300)))
    pairs = [{"prompt": say(drawn, 4), "chosen": say(drawn, 68), "rejected": say(drawn, 68)} for _ in range(800)]
    (made / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tables = {
        "name": "base",
        "model": {"preset": "tiny-moe", "hidden_size": 640, "num_layers": 4, "vocab_size": 300},
        "data": {"corpus": {"kind": "files", "paths": [str(made / "words.txt")]}, "sequence_length": 64},
        "training": {"steps": 1, "tokens_per_step": 64, "threads": 1},
        "optimizer": {"learning_rate": 0.001},
    }
    run = train(tables, out=made / "base", quiet=True)
    assert run.summary["total_parameters"] == PARAMETERS
    return made


def measured(folder: Path, method: dict[str, Any]) -> dict[str, int]:
    """Most memory while three steps are done, by a process of its own."""
    recipe = {
        "start_from": str(folder / "base"),
        "method": method,
        "data": {"corpus": {"kind": "files", "paths": [str(folder / "pairs.jsonl")]}, "sequence_length": 256},
        "training": {"steps": 3, "tokens_per_step": 512, "threads": 1},
        "optimizer": {"learning_rate": 1e-5},
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be forgotten on Linux alone")
def test_a_preference_takes_hardly_more_memory_than_fine_tuning_at_equal_tokens(folder: Path) -> None:
    """Not by 15 %, and by nothing like a second model, which would be 91 MB."""
    tuning, preference = measured(folder, {"kind": "sft"}), measured(folder, {"kind": "dpo"})
    print(f"sft {tuning}, dpo {preference}: {preference['peak'] / tuning['peak']:.3f}")
    assert preference["tokens"] == pytest.approx(tuning["tokens"], rel=0.1)
    assert preference["peak"] <= 1.15 * tuning["peak"]
    assert preference["peak"] - tuning["peak"] < 4 * PARAMETERS / 2
