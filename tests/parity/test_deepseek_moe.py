"""DeepSeekMoE 16B has no class in transformers: an oracle of plain loops, and a golden file, stand in for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finemoe.checkpoint.huggingface.families import FAMILIES
from parity import deepseek_moe_oracle
from parity.foreign_models import ours, relative, take, write_folder
from parity.record_deepseek_moe import CASES, GOLDEN, IDS, weights


@pytest.mark.parametrize("case", CASES)
def test_deepseek_moe(case: str, tmp_path: Path) -> None:
    raw, tensors = CASES[case], weights(CASES[case])
    rounded = {name: tensor.float() for name, tensor in tensors.items()}
    write_folder(tmp_path, raw, rounded)
    model = ours(tmp_path)
    with torch.no_grad():
        found = model.logits(model(torch.tensor([IDS])).hidden)[0]
    assert relative(found, deepseek_moe_oracle.logits(raw, rounded, IDS)) <= 1e-5
    golden = torch.tensor(json.loads(GOLDEN.read_text())["logits of the first 8 tokens"][case], dtype=torch.float64)
    assert relative(found[:, :8].double(), golden) <= 1e-5

    family = FAMILIES["deepseek"]
    written = take(model, "deepseek", model.state_dict())
    assert written.keys() == rounded.keys()
    assert all(torch.equal(written[name], rounded[name]) for name in rounded)
    back = family.from_config(model.config, bos_token_id=0, eos_token_id=1, dtype="bfloat16")
    same = back.keys() & raw.keys()
    idle = {"norm_topk_prob"} if raw["num_experts_per_tok"] == 1 else set()
    idle |= {"first_k_dense_replace"} if raw["moe_layer_freq"] > 1 else set()  # 1 and 2 say the same
    assert {key: back[key] for key in same - idle} == {key: raw[key] for key in same - idle}
    assert raw.keys() - same == {"auto_map"}
    assert family.to_config(back) == model.config


def test_the_golden_file_is_of_these_cases() -> None:
    recorded = json.loads(GOLDEN.read_text())
    assert recorded["ids"] == IDS
    assert list(recorded["logits of the first 8 tokens"]) == list(CASES)
