"""PEFT itself opens what we write on the exported base, and computes our logits; a swapped layout is seen.

PEFT need not be in this interpreter: `FINEMOE_PEER=/path/to/python` names one that has it, with transformers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.adapters.tuned_runs import TOKENS, base_of, logits, select, tune
from finemoe.checkpoint.adapters.files import export_adapter, merge
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.open import load_model

PEER = os.environ.get("FINEMOE_PEER", sys.executable)
WITNESS = """
import sys
import torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
base, adapter, tokens, out = sys.argv[1:5]
model = transformers.AutoModelForCausalLM.from_pretrained(
    base, attn_implementation="eager", experts_implementation="eager"
).float().eval()
if sys.argv[5:]:  # make one instead of reading one
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "o_proj", "kv_b_proj"],
        target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    ))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(adapter)
else:
    model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    save_file({"logits": model.eval()(load_file(tokens)["tokens"], use_cache=False).logits.contiguous()}, out)
"""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("dense", {"targets": ["attention", "dense"], "rank": 3, "alpha": 5.0}),
    "deepseek_v3": ("v3", {"targets": ["attention", "shared_experts", "experts", "dense"], "rank": 3}),
    "deepseek_v2": ("v2", {"rank": 2}),
    "down alone": ("v3", {"targets": ["blocks.1.feed_forward.experts.down_proj"]}),
    "uneven": ("v3", {"targets": ["experts", "attention"], "rank": 2, "expert_rank_budget": 9}),
}


@pytest.fixture(scope="module")
def peer() -> str:
    if subprocess.run([PEER, "-c", "import peft, transformers"], capture_output=True).returncode:
        pytest.skip(f"{PEER} has no peft")
    return PEER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("witness")


def exported(folder: Path, arm: str) -> Path:
    place = folder / f"{arm}-hf"
    if not place.exists():
        export_hf(base_of(folder, arm), place, quiet=True)
    return place


def theirs(peer: str, base: Path, adapter: Path, *more: str) -> torch.Tensor:
    """PEFT's logits for TOKENS."""
    save_file({"tokens": TOKENS}, base.parent / "tokens.safetensors")
    out = adapter.with_suffix(".logits")
    command = [peer, "-c", WITNESS, *map(str, (base, adapter, base.parent / "tokens.safetensors", out)), *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "missing" not in done.stderr.lower(), done.stderr
    return load_file(out)["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_our_logits(case: str, peer: str, folder: Path, tmp_path: Path) -> None:
    arm, table = CASES[case]
    if case == "uneven":
        table = {**table, "selection": select(folder / "s.json", load_model(base_of(folder, arm)).config)}
    base = exported(folder, arm)
    run = tune(folder, arm, case.replace(" ", "-"), kind="lora", **table)
    assert export_adapter(run, tmp_path / "adapter")["family"] == ("llama" if arm == "dense" else f"deepseek_{arm}")
    ours = logits(run)
    assert (ours - logits(base)).abs().max() > 1e-2  # there is something to see
    assert (theirs(peer, base, tmp_path / "adapter") - ours).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("swapped", ["A rank by rank", "B expert by expert"])
def test_a_swapped_layout_is_seen(swapped: str, peer: str, folder: Path, tmp_path: Path) -> None:
    base = exported(folder, "v3")
    run = tune(folder, "v3", f"swapped {swapped[0]}", kind="lora", targets=["experts"], rank=3)
    export_adapter(run, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors, experts = load_file(file), 8
    for key, tensor in tensors.items():
        if swapped[0] == "A" and "lora_A" in key:
            tensors[key] = tensor.reshape(experts, -1, tensor.shape[1]).transpose(0, 1).flatten(0, 1).contiguous()
        if swapped[0] == "B" and "lora_B" in key:
            tensors[key] = tensor.reshape(len(tensor), -1, experts).transpose(1, 2).flatten(1).contiguous()
    save_file(tensors, file)
    assert (theirs(peer, base, tmp_path / "adapter") - logits(run)).abs().max() > 1e-3


@pytest.mark.slow
def test_what_peft_wrote_is_merged_here(peer: str, folder: Path, tmp_path: Path) -> None:
    base = exported(folder, "v3")
    wanted = theirs(peer, base, tmp_path / "adapter", "make")
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    merge(base, tmp_path / "adapter", tmp_path / "merged", quiet=True)
    found = logits(tmp_path / "merged")
    assert (found - wanted).abs().max() <= 1e-5
    assert (found - logits(base)).abs().max() > 1e-2
