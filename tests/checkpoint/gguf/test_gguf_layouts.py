"""How tensors lie in a GGUF file: order of rows, stacked and fused experts, older layouts, quantised blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.gguf.gguf_files import (
    MODELS,
    QUERIES,
    random_model,
    recipe,
)
from checkpoint.gguf.written import exported, rewritten, state_of, stored
from finemoe.checkpoint.gguf.codec import element_types
from finemoe.checkpoint.gguf.opening import import_gguf, load_gguf, open_gguf
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.weights.imported import read_imported

gguf = pytest.importorskip("gguf")


def test_queries_and_keys_are_interleaved_as_llama_cpp_rotates_them(tmp_path: Path) -> None:
    model = random_model(MODELS["llama-tied-bias"])
    tensors = stored(exported(tmp_path, model))
    ours = state_of(model)
    for letter, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            plain = ours[f"blocks.1.attention.{letter}_proj.{kind}"].numpy().reshape(heads, 24, -1)
            found = tensors[f"blk.1.attn_{letter}.{kind}"].reshape(heads, 24, -1)
            for pair in range(12):  # components pair and pair + 12 of a head turn together
                np.testing.assert_array_equal(found[:, 2 * pair], plain[:, pair])
                np.testing.assert_array_equal(found[:, 2 * pair + 1], plain[:, pair + 12])
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], ours["blocks.1.attention.v_proj.weight"].numpy())


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("qwen", "olmoe"))])
def test_where_halves_turn_queries_and_keys_are_as_they_are(tmp_path: Path, name: str) -> None:
    model = random_model(MODELS[name])
    tensors, ours = stored(exported(tmp_path, model)), state_of(model)
    for letter in "qkv":
        theirs = tensors[f"blk.1.attn_{letter}.weight"]
        np.testing.assert_array_equal(theirs, ours[f"blocks.1.attention.{letter}_proj.weight"].numpy())


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    """As the `gguf` package lists them: the tensors of the architecture, and keys that exist at all."""
    path = exported(tmp_path, random_model(MODELS[name]))
    architecture = open_gguf(path).architecture
    (kind,) = (arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    names = {re.sub(r"blk\.\d+\.", "blk.{bid}.", stored).removesuffix(".weight") for stored in open_gguf(path).tensors}
    assert {stored.removesuffix(".bias") for stored in names} <= known
    groups = (vars(group).values() for group in vars(gguf.Keys).values() if isinstance(group, type))
    keys = {key.replace("{arch}", architecture) for group in groups for key in group if isinstance(key, str)}
    written = {key for key in open_gguf(path).metadata if key.startswith(f"{architecture}.")}
    assert written <= keys


def test_the_up_projection_of_latents_is_split_and_its_keys_transposed(tmp_path: Path) -> None:
    model = random_model(MODELS["deepseek2-v3"])
    tensors = stored(exported(tmp_path, model))
    up = state_of(model)["blocks.2.attention.kv_up_proj.weight"].numpy().reshape(4, 32 + 16, 64)
    np.testing.assert_array_equal(tensors["blk.2.attn_k_b.weight"], up[:, :32].transpose(0, 2, 1))
    np.testing.assert_array_equal(tensors["blk.2.attn_v_b.weight"], up[:, 32:])


def test_experts_are_stacked_in_tensors_of_their_own(tmp_path: Path) -> None:
    model = random_model(MODELS["deepseek2-v3"])
    tensors = stored(exported(tmp_path, model))
    gate_up = state_of(model)["blocks.1.feed_forward.experts.gate_up_proj"].numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate_exps.weight"], gate_up[:, :32])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight"], gate_up[:, 32:])
    bias = state_of(model)["blocks.1.feed_forward.router.selection_bias"].numpy()
    np.testing.assert_array_equal(tensors["blk.1.exp_probs_b.bias"], bias)


@pytest.mark.parametrize("both", [False, True])
def test_the_older_layout_of_latent_attention_is_read(tmp_path: Path, both: bool) -> None:
    model = random_model(MODELS["deepseek2-v2"])
    path = exported(tmp_path, model)
    tensors = stored(path)
    for layer in range(3):
        key, value = (tensors[f"blk.{layer}.attn_{name}_b.weight"] for name in ("k", "v"))
        tensors[f"blk.{layer}.attn_kv_b.weight"] = np.concatenate((key.transpose(0, 2, 1), value), 1).reshape(-1, 64)
        if not both:
            del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
    older = {
        "deepseek2.attention.key_length": 40,
        "deepseek2.attention.value_length": 16,
        "deepseek2.attention.head_count_kv": 4,
        "deepseek2.attention.key_length_mla": None,
        "deepseek2.attention.value_length_mla": None,
        "deepseek2.expert_gating_func": None,
    }
    source = open_gguf(rewritten(path, tmp_path / "older.gguf", older, tensors))
    assert source.config == model.config
    assert len(source.dropped) == (6 if both else 0)
    back = state_of(load_gguf(source.path))
    assert all(torch.equal(back[name], tensor) for name, tensor in state_of(model).items())


def test_fused_experts_and_left_out_biases_are_read(tmp_path: Path) -> None:
    model = random_model(MODELS["deepseek2-v3"])
    path = exported(tmp_path, model)
    tensors = stored(path)
    for layer in (1, 2):
        gate, up = (tensors.pop(f"blk.{layer}.ffn_{name}_exps.weight") for name in ("gate", "up"))
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate((gate, up), axis=1)
        del tensors[f"blk.{layer}.exp_probs_b.bias"]
    out = rewritten(path, tmp_path / "fused.gguf", {}, tensors)
    back = state_of(load_gguf(out))
    for name, tensor in state_of(model).items():
        expected = torch.zeros_like(tensor) if name.endswith("selection_bias") else tensor
        assert torch.equal(back[name], expected), name
    import_gguf(out, tmp_path / "imported", quiet=True)
    imported = read_imported(tmp_path / "imported", checksums=True)
    assert not imported.tensors.read("blocks.1.feed_forward.router.selection_bias").any()


def random_blocks(kind: Any, rows: int, blocks: int) -> np.ndarray:
    """Bytes of a type that dequantise to finite numbers."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    generator = np.random.default_rng(int(kind))
    data = generator.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        for _ in range(20):
            values = gguf.dequantize(data, kind)
            bad = ~np.isfinite(values).all(axis=1) | (np.abs(values).max(axis=1) > 1e6)
            data[bad] = generator.integers(0, 256, (int(bad.sum()), size), dtype=np.uint8)
    assert not bad.any()
    return data.reshape(rows, blocks * size)


READABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def test_quantised_tensors_are_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    dense = {"kind": "dense", "ffn_hidden_size": 256}
    model = random_model({**recipe(QUERIES, dense), "hidden_size": 64, "num_layers": len(READABLE)})
    blocks, kinds = {}, {}
    for layer, kind in enumerate(READABLE):
        name, number = f"blk.{layer}.ffn_down.weight", gguf.GGMLQuantizationType[kind]
        blocks[name] = random_blocks(number, 64, 256 // gguf.GGML_QUANT_SIZES[number][0])
        kinds[name] = number
    path = exported(tmp_path, model)
    out = rewritten(path, tmp_path / "mixed.gguf", {}, {**stored(path), **blocks}, kinds)
    back = state_of(load_gguf(out))
    report = import_gguf(out, tmp_path / "imported", quiet=True)
    assert report.dequantized == len(READABLE)
    imported = TensorFolder.open(tmp_path / "imported")
    for layer, kind in enumerate(READABLE):
        ours, name = f"blocks.{layer}.feed_forward.down_proj.weight", f"blk.{layer}.ffn_down.weight"
        np.testing.assert_array_equal(back[ours].numpy(), gguf.dequantize(blocks[name], kinds[name]), kind)
        assert torch.equal(imported.read(ours), back[ours])
        assert back[ours].abs().max() > 0


def test_every_type_is_readable_or_refused_by_name() -> None:
    kinds = {kind.name: kind for kind in element_types().values()}
    assert {"F32", "F16", "BF16", *READABLE} <= {name for name, kind in kinds.items() if kind.readable}
    assert not kinds["I32"].readable
