"""`finemoe export --adapter` and `finemoe merge`: what they say and refuse, and that what comes out is the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.adapters.tuned_runs import base_of, select, tune
from finemoe.checkpoint.open import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verbs")


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    return tune(folder, "v3", "lora", kind="lora", rank=2)


def test_an_adapter_goes_out_and_comes_back(folder: Path, lora: Path, tmp_path: Path, command: Any) -> None:
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    said = command("export", lora, out, "--adapter").stdout
    assert "low-rank adapters for PEFT (deepseek_v3)" in said.replace("\n", " ")
    assert "finemoe merge BASE" in said
    assert "Left behind" in said  # the prediction modules were trained too
    said = command("merge", base_of(folder, "v3"), out, merged, "--quiet").stdout
    assert "the low-rank adapters of" in said
    found, wanted = load_model(merged).state_dict(), load_model(lora).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items() if not name.startswith("mtp"))
    assert command("generate", merged, "--prompt", "cat dog", "--max-new-tokens", "4").exit_code == 0
    assert command("export", merged, tmp_path / "hf", "--quiet").exit_code == 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "deepseek_v3"


def test_a_delta_goes_out_and_comes_back(folder: Path, tmp_path: Path, command: Any) -> None:
    path = select(folder / "selection.json", load_model(base_of(folder, "v3")).config)
    run = tune(folder, "v3", "esft", kind="experts", selection=path)
    facts = json.loads(command("export", run, tmp_path / "delta", "--adapter", "--json").stdout)
    assert (facts["format"], facts["family"]) == ("delta", None)
    assert facts["parameters"] == 3 * 3 * 16 * 6  # three experts of one layer, three matrices each
    assert "the tuned experts, as a delta" in command("export", run, tmp_path / "again", "--adapter").stdout
    facts = json.loads(
        command("merge", base_of(folder, "v3"), tmp_path / "delta", tmp_path / "merged", "--quiet", "--json").stdout
    )
    assert (facts["format"], facts["changed"]) == ("delta", 2)
    found, wanted = load_model(tmp_path / "merged").state_dict(), load_model(run).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    "options", [["--fp8"], ["--dtype", "bf16"], ["--verify"], ["--format", "hf"], ["--no-tokenizer"]], ids=str
)
def test_options_of_whole_models_are_refused(options: list[str], lora: Path, tmp_path: Path, command: Any) -> None:
    result = command("export", lora, tmp_path / "adapter", "--adapter", *options)
    assert result.exit_code == 2
    assert f"{options[0]} is of whole models" in result.stderr
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_merged_is_refused(folder: Path, lora: Path, tmp_path: Path, command: Any) -> None:
    base = base_of(folder, "v3")
    assert command("merge", tmp_path / "nothing", lora, tmp_path / "out").exit_code == 2
    result = command("merge", base, lora, tmp_path / "out")
    assert result.exit_code == 2
    assert "finemoe export RUN OUT --adapter" in result.stderr
    command("export", lora, tmp_path / "adapter", "--adapter")
    result = command("merge", base, tmp_path / "adapter", base / "merged")
    assert result.exit_code == 2
    assert "lies in the source" in result.stderr
