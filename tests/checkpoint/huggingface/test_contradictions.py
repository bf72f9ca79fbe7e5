"""More of what a config.json says, or leaves out, beside weights that are sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.published import LLAMA, MIXTRAL, TIED, V3, publish, tensors_of, write_weights
from checkpoint.huggingface.test_hf_config import BY_FAMILY
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.importing import import_hf, open_source
from finemoe.checkpoint.open import read_model_config
from finemoe.core.errors import CheckpointError


@pytest.mark.parametrize(
    ("family", "said"),
    [
        *(("qwen2", {"attention_bias": True}), ("qwen2", {"qkv_bias": True}), ("qwen2_moe", {"attention_bias": True})),
        *(("deepseek_v3", {"ep_size": 8}), ("deepseek_v2", {"ep_size": 4}), ("llama", {"sliding_window": 1 << 20})),
    ],
)
def test_what_says_nothing_new_refuses_nothing(family: str, said: dict[str, Any]) -> None:
    raw = BY_FAMILY[family]
    plain, found = FAMILIES[family].read(raw), FAMILIES[family].read({**raw, **said})
    assert found.config == plain.config
    assert found.warnings == plain.warnings
    assert not any(next(iter(said)) in note for note in found.notes)


def test_no_prediction_modules_may_be_null() -> None:
    raw = {**BY_FAMILY["deepseek_v3"], "num_nextn_predict_layers": None}
    assert FAMILIES["deepseek_v3"].to_config(raw).mtp == ()


@pytest.mark.parametrize("raw", [LLAMA, TIED, V3], ids=["llama", "tied", "v3"])
@pytest.mark.parametrize("more", [-3, 5])
def test_the_weights_say_how_many_tokens_there_are(tmp_path: Path, raw: dict[str, Any], more: int) -> None:
    rows = raw["vocab_size"]
    publish(tmp_path / "a", {**raw, "vocab_size": rows + more})
    write_weights(tmp_path / "a", tensors_of(raw))
    source = open_source(tmp_path / "a")
    assert source.config.vocab_size == rows
    assert f"`vocab_size` is {rows + more}, and the weights have {rows} tokens: read as {rows}" in source.warnings[0]
    import_hf(tmp_path / "a", tmp_path / "b", quiet=True)
    export_hf(tmp_path / "b", tmp_path / "c", quiet=True)
    assert read_model_config(tmp_path / "c") == source.config
    assert open_source(tmp_path / "c").warnings == ()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("", "module.", "The names that are there begin with 'module.': take it away"),
        ("", "_orig_mod.", "The names that are there begin with '_orig_mod.': take it away"),
        ("model.", "", "The names that are there lack 'model.': save the whole model"),
    ],
)
def test_names_with_something_before_them_are_answered_with_it(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    publish(tmp_path / "a", LLAMA)
    weights = {after + name.removeprefix(before): tensor for name, tensor in tensors_of(LLAMA).items()}
    write_weights(tmp_path / "a", weights)
    with pytest.raises(CheckpointError, match="missing") as error:
        open_source(tmp_path / "a")
    assert said in str(error.value)


@pytest.mark.parametrize("name", [None, ...])
def test_a_model_type_that_is_missing_is_the_one_of_the_class(tmp_path: Path, name: Any) -> None:
    raw = {**LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": name}
    publish(tmp_path / "a", LLAMA)
    write = {key: value for key, value in raw.items() if value is not ...}
    (tmp_path / "a" / "config.json").write_text(json.dumps(write))
    with pytest.raises(CheckpointError, match=r'no `model_type`.* so set `"model_type": "llama"`'):
        read_model_config(tmp_path / "a")


@pytest.mark.parametrize(
    ("raw", "field", "wrong", "right"),
    [
        *((LLAMA, "num_hidden_layers", wrong, 2) for wrong in (1, 3, 4000)),
        *((LLAMA, "num_key_value_heads", 2, 1), (LLAMA, "num_key_value_heads", None, 1)),
        *((LLAMA, "intermediate_size", 40, 24), (LLAMA, "hidden_size", 32, 16), (LLAMA, "head_dim", 4, 8)),
        *((MIXTRAL, "num_local_experts", wrong, 3) for wrong in (2, 4)),
        *((MIXTRAL, "intermediate_size", 40, 24), (MIXTRAL, "num_hidden_layers", 1, 2)),
        *((V3, "num_hidden_layers", 3, 2), (V3, "n_routed_experts", 8, 4), (V3, "moe_intermediate_size", 16, 12)),
        *((V3, "intermediate_size", 150, 140), (V3, "hidden_size", 128, 136)),
    ],
)
def test_a_size_that_the_weights_contradict_is_named(
    tmp_path: Path, raw: dict[str, Any], field: str, wrong: int | None, right: int
) -> None:
    publish(tmp_path / "a", raw)
    write = {**raw, field: wrong}
    if wrong is None:
        del write[field]
    (tmp_path / "a" / "config.json").write_text(json.dumps(write))
    with pytest.raises(CheckpointError) as error:
        open_source(tmp_path / "a")
    said = f"{wrong}" if wrong is not None else "2 (left out, so by default)"
    assert f"In config.json `{field}` is {said}, and the weights have {right}: get the config.json" in str(error.value)
