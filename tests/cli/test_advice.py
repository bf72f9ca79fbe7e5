"""What these refusals advise is accepted when it is followed: every option that they name, one call for each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

_OPTION = r"--(?:set [\w.]+=[\w.]+|(?:gpus|micro-batch|tokens-per-step|gather) \w+|recompute)"
_ADVICE = re.compile(f"{_OPTION}(?: {_OPTION})*")
_SIZES = re.compile(r"parallel\.expert \d+ .*try one of ([\d, ]+)")
_MULTIPLE = re.compile(r"make it a multiple of (\d+)")
RECIPE = """[model]
preset = "tiny-moe"
num_layers = 6
[model.feed_forward]
num_routed_experts = 24
[training]
steps = 10
tokens_per_step = 65536
"""


def advised(said: str) -> list[list[str]]:
    """The words of each alternative."""
    found = [one.split() for one in _ADVICE.findall(said)]
    for sizes in _SIZES.findall(said):
        found += [["--set", f"parallel.expert={size.strip()}"] for size in sizes.split(",")]
    return found + [["--tokens-per-step", tokens] for tokens in _MULTIPLE.findall(said)]


def test_advice_changes_no_more_than_it_must(command: Any) -> None:
    """Neither moments nor recomputation where the layout is enough; as many devices as a search says."""
    said = " ".join(command("plan", "deepseek-v3", "--gpus", "256").stderr.split())
    assert "It fits with --set parallel.pipeline=" in said
    assert "moments" not in said.partition("It fits with")[2]
    words = ["--gpus", "2", "--set", "parallel.pipeline=2", "--seq-len", "4096", "--tokens-per-step", "65536"]
    assert "--gpus 4 " in command("plan", "deepseek-moe-16b", *words).stderr.partition("It fits with")[2]


@pytest.mark.parametrize(
    ("words", "least"),
    [
        ("deepseek-v3 --gpus 1", 1),
        ("deepseek-v3 --gpus 256", 1),
        ("deepseek-v3 --gpus 8 --search", 1),
        ("RECIPE --gpus 6 --set parallel.pipeline=6 --set parallel.schedule=zbv --micro-batch 1", 1),
        ("deepseek-v3 --gpus 64 --set parallel.pipeline=4", 1),
        ("deepseek-v3 --gpus 64 --set parallel.shard=8", 1),
        ("deepseek-moe-16b --gpus 16 --device a100 --micro-batch 8 --set parallel.replicate=2", 2),
        ("deepseek-moe-16b --gpus 8 --gather step --set parallel.replicate=8", 1),
        ("deepseek-moe-16b --gpus 1 --search", 1),
        ("deepseek-moe-16b --gpus 48 --set parallel.expert=5", 5),
        ("deepseek-moe-16b --gpus 48 --set parallel.expert=48", 5),
        ("deepseek-moe-16b --gpus 64 --set parallel.pipeline=64", 1),
        ("deepseek-moe-16b --gpus 64 --set parallel.pipeline=16 --set parallel.schedule=interleaved", 1),
        ("RECIPE --gpus 8 --set parallel.shard=16", 2),
        ("RECIPE --gpus 4 --set parallel.replicate=3 --set parallel.expert=2", 1),
        ("RECIPE --gpus 8 --tokens-per-step 1024", 1),
        ("RECIPE --gpus 8 --set parallel.pipeline=4 --tokens-per-step 8192 --micro-batch 16", 1),
        ("RECIPE --gpus 8 --set parallel.pipeline=4 --tokens-per-step 1024", 1),
        ("RECIPE --gpus 64 --set parallel.pipeline=32 --micro-batch 1", 1),
        ("RECIPE --gpus 4 --set parallel.pipeline=2 --set optimizer.kind=muon", 1),
        ("RECIPE --gpus 4 --set parallel.expert=2 --set optimizer.kind=muon", 1),
    ],
)
def test_advice_is_accepted(command: Any, tmp_path: Path, words: str, least: int) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    asked = words.replace("RECIPE", str(recipe)).split()
    refused = command("plan", *asked)
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    alternatives = advised(said)
    assert len(alternatives) >= least, said
    for one in alternatives:
        followed = command("plan", *asked, *one)
        assert followed.exit_code == 0, f"{said}\nfollowed by {' '.join(one)}: {followed.stderr}"
