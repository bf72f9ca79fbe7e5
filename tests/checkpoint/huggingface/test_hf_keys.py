"""Placements: every part of our tensors has one place in a file, of the right shape, and copies are named as such."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.keys import ignorable, without_absent_mtp
from finemoe.checkpoint.storage.safetensors import span
from finemoe.checkpoint.weights.placement import Placement
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer
from oracles.models import moe_table, small_config


def tiny(family: str, draw: Any) -> ModelConfig:
    """A drawn model of `family`, every switch on or off, no two sizes alike."""
    heads, experts, flag = draw(st.integers(1, 3)), draw(st.sampled_from([4, 6])), st.booleans()
    raw: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 11,
        "hidden_size": 12,
        "intermediate_size": 7,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, heads])),
        "num_experts": experts,
        "num_local_experts": experts,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "n_shared_experts": draw(st.integers(0, 2)),
        "moe_intermediate_size": 5,
        "shared_expert_intermediate_size": 5 * draw(st.integers(1, 2)),
        "tie_word_embeddings": draw(flag),
    }
    if family in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        rank = draw(st.none() | st.just(9))
        raw |= {"num_key_value_heads": heads, "q_lora_rank": rank, "kv_lora_rank": 3, "n_group": 2, "topk_group": 1}
        raw |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 2, "v_head_dim": 13}
        raw |= {"topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy"]))}
        if family != "deepseek_v2":
            raw |= {"num_nextn_predict_layers": draw(st.integers(0, 2)), "topk_method": "noaux_tc"}
    elif family not in ("olmoe", "deepseek"):
        raw |= {"head_dim": 6}
    if family in ("qwen2_moe", "qwen3_moe"):
        raw |= {"decoder_sparse_step": draw(st.integers(1, 2)), "mlp_only_layers": draw(st.sampled_from([[], [0]]))}
    if family == "mistral":
        raw |= {"sliding_window": None}
    if family == "glm4_moe":
        raw |= {"use_qk_norm": draw(flag), "attention_bias": draw(flag), "partial_rotary_factor": 2 / 3}
        raw |= {"num_nextn_predict_layers": draw(st.integers(0, 2))}
    if family.startswith(("deepseek", "kimi", "glm")):
        raw |= {"first_k_dense_replace": draw(st.integers(0, 3))}
    return FAMILIES[family].to_config({**raw, "num_attention_heads": heads if 12 % heads == 0 else 1})


def split(config: ModelConfig, family: str) -> tuple[list[Placement], list[Placement]]:
    """Placements, and those that name a place again."""
    seen: dict[tuple[str, str], str] = {}
    first, again = [], []
    for placement in FAMILIES[family].placements(config):
        key = (placement.ours, str(placement.index))
        (again if key in seen else first).append(placement)
        seen[key] = placement.theirs
    return first, again


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_every_part_has_one_place(family: str, data: st.DataObject) -> None:
    config = tiny(family, data.draw)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    places, copies = split(config, family)
    counts = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in state.items()}
    for placement in places:
        assert counts[placement.ours][placement.index].shape == placement.shape
        assert span(tuple(state[placement.ours].shape), placement.index)[2] == placement.shape  # one range of bytes
        counts[placement.ours][placement.index] += 1
    assert all(bool((count == 1).all()) for count in counts.values())
    names = [placement.theirs for placement in (*places, *copies)]
    assert len(set(names)) == len(names)
    assert len(copies) == 2 * len(config.mtp) + config.tie_embeddings
    assert {placement.ours for placement in copies} <= {"embedding.weight", "head.weight"}


@given(data=st.data())
def test_reading_and_writing_are_inverse(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    config = tiny(family, data.draw)
    places, _ = split(config, family)
    file = {
        p.theirs: torch.arange(numbers_in(p), dtype=torch.float32).reshape(p.shape) + 1000 * i
        for i, p in enumerate(places)
    }
    state = {name: torch.empty_like(tensor) for name, tensor in Transformer(config).state_dict().items()}
    for placement in places:
        state[placement.ours][placement.index] = file[placement.theirs]
    assert all(torch.equal(state[p.ours][p.index], file[p.theirs]) for p in places)


def numbers_in(placement: Placement) -> int:
    """Numbers in a placement."""
    return int(torch.Size(placement.shape).numel())


def test_names_of_a_prediction_module() -> None:
    raw = {
        "model_type": "deepseek_v3",
        **{"vocab_size": 11, "hidden_size": 12, "intermediate_size": 7, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 3, "qk_nope_head_dim": 4},
        **{"qk_rope_head_dim": 2, "v_head_dim": 5, "n_routed_experts": 16, "num_experts_per_tok": 2},
        **{"n_shared_experts": 1, "moe_intermediate_size": 5},
    }
    config = FAMILIES["deepseek_v3"].to_config(raw)
    assert len(config.mtp) == 1  # what the family's code takes where the file says nothing
    names = {placement.theirs: placement for placement in FAMILIES["deepseek_v3"].placements(config)}
    assert names["model.layers.4.eh_proj.weight"].ours == "mtp.0.projection.weight"
    assert names["model.layers.4.shared_head.norm.weight"].ours == "mtp.0.norm.weight"
    assert (
        names["model.layers.4.mlp.gate.e_score_correction_bias"].ours
        == "mtp.0.block.feed_forward.router.selection_bias"
    )
    assert names["model.layers.4.embed_tokens.weight"].ours == "embedding.weight"
    assert names["model.layers.4.shared_head.head.weight"].ours == "head.weight"

    kept, notes = without_absent_mtp(config, names)
    assert (kept, notes) == (config, ())
    kept, notes = without_absent_mtp(config, [name for name in names if not name.startswith("model.layers.4.")])
    assert kept.mtp == ()
    assert "1 multi-token prediction module" in notes[0]
    assert not any(p.theirs.startswith("model.layers.4.") for p in FAMILIES["deepseek_v3"].placements(kept))
    # One tensor left is damage, not absence.
    assert without_absent_mtp(config, ["model.layers.4.enorm.weight"]) == (config, ())


def test_only_computed_buffers_may_be_left_unused() -> None:
    for key in ("model.layers.3.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        assert "rotary" in (ignorable(key) or "")
    for key in ("model.layers.3.self_attn.q_proj.bias", "lm_head.weight", "model.layers.3.mlp.gate.weight"):
        assert ignorable(key) is None


def test_hash_tables_have_no_name() -> None:
    with pytest.raises(CheckpointError, match="hash"):
        FAMILIES["deepseek"].placements(small_config(feed_forward=moe_table("hash_layer")))
