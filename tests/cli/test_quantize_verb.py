"""`finemoe quantize`, and `--weights` of the verbs that use a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.adapters.tuned_runs import base_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("verb"), "v3")


def test_a_model_is_made_small_and_used(run: Path, tmp_path: Path, command: Any) -> None:
    out = tmp_path / "small"
    said = command("quantize", run, out, "--weights", "int4", "--quiet").stdout
    assert "large products in int4" in said
    assert f"finemoe generate {out} --prompt TEXT" in said.replace("\n", " ")
    assert command("generate", out, "--prompt", "cat dog", "--max-new-tokens", "4").exit_code == 0
    facts = json.loads(command("quantize", run, tmp_path / "again", "--json", "--quiet").stdout)
    assert (facts["weights"], facts["path"]) == ("int8", str(tmp_path / "again"))
    refused = command("quantize", out, tmp_path / "twice", "--quiet")
    assert refused.exit_code == 2
    assert "has products in blocks already" in refused.stderr.replace("\n", " ")


def test_weights_are_made_small_for_one_call(run: Path, tmp_path: Path, command: Any) -> None:
    """The same text as from what `finemoe quantize` writes; greedily, since it is the same to the bit."""
    command("quantize", run, tmp_path / "small", "--quiet")
    asked = ("--prompt", "cat dog", "--max-new-tokens", "12", "--temperature", "0", "--json")
    written = json.loads(command("generate", tmp_path / "small", *asked).stdout)
    at_once = json.loads(command("generate", run, *asked, "--weights", "int8").stdout)
    assert written["completions"] == at_once["completions"] if "completions" in written else written == at_once
