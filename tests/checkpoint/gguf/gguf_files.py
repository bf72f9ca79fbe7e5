"""Small models as imported folders, and GGUF files spelt out byte by byte, for the GGUF tests."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers

from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.weights.imported import ImportedWriter
from finemoe.core.config import parse
from finemoe.model.config import ModelConfig, ModelRecipe, expand
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer
from finemoe.text.from_vocabulary import tokenizer_from_vocabulary

VOCAB = 288
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "a n", "Ġ a")

QUERIES = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
QWEN3 = {**QUERIES, "head_dim": 24, "qk_norm": "head"}
NORMALISED = {"kind": "softmax_topk", "normalize_gates": True}
DENSE = {"kind": "dense", "ffn_hidden_size": 96}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SIGMOID = {"kind": "sigmoid_biased", "num_groups": 4, "groups_per_token": 2, "route_scale": 2.5}
YARN = {"kind": "yarn", "factor": 40.0, "original_max_positions": 128, "mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_positions": 8192}


def moe(router: Mapping[str, Any], shared: int = 2) -> dict[str, Any]:
    return {
        "kind": "moe",
        "num_routed_experts": 8,
        "experts_per_token": 3,
        "expert_hidden_size": 32,
        "num_shared_experts": shared,
        "router": dict(router),
    }


def recipe(attention: Mapping[str, Any], feed_forward: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 3,
        "max_positions": 512,
        "attention": dict(attention),
        "feed_forward": dict(feed_forward),
        **others,
    }


LEAD = {"count": 1, "feed_forward": DENSE}
MODELS: dict[str, dict[str, Any]] = {
    "llama": recipe(QUERIES, DENSE),
    "llama-tied-bias": recipe({**QUERIES, "head_dim": 24, "qkv_bias": True}, DENSE, tie_embeddings=True),
    "llama-3": recipe({**QUERIES, "head_dim": 32, "rope": {"theta": 500_000.0, "scaling": LLAMA3}}, DENSE),
    "llama-linear": recipe({**QUERIES, "rope": {"scaling": {"kind": "linear", "factor": 4.0}}}, DENSE),
    "llama-yarn": recipe(
        {**QUERIES, "rope": {"scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 128}}}, DENSE
    ),
    "qwen2": recipe({**QUERIES, "qkv_bias": True}, DENSE),
    "qwen2-yarn-tied": recipe(
        {
            **{**QUERIES, "qkv_bias": True},
            "rope": {"theta": 1e6, "scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 128}},
        },
        DENSE,
        tie_embeddings=True,
    ),
    "qwen3": recipe(QWEN3, DENSE),
    "qwen2moe": recipe(
        {**QUERIES, "qkv_bias": True}, {**moe({"kind": "softmax_topk"}, 3), "gate_shared_experts": True}
    ),
    "qwen3moe": recipe(QWEN3, moe(NORMALISED, 0)),
    "olmoe": recipe({**QUERIES, "num_kv_heads": 4, "qk_norm": "projection"}, moe({"kind": "softmax_topk"}, 0)),
    "mixtral": recipe(QUERIES, moe(NORMALISED, 0)),
    "deepseek": recipe(QUERIES, moe({"kind": "softmax_topk"}), leading=LEAD),
    "deepseek2-v2": recipe(
        {**LATENT, "rope": {"layout": "interleaved", "scaling": YARN}},
        moe({"kind": "softmax_topk", "route_scale": 2.0}),
        leading=LEAD,
    ),
    "deepseek2-lite": recipe({**LATENT, "q_lora_rank": None}, moe({"kind": "softmax_topk"}), leading=LEAD),
    "deepseek2-v3": recipe(LATENT, moe(SIGMOID), leading=LEAD),
    "deepseek2-dense": recipe(LATENT, DENSE),
}
"""Every architecture, rope scaling and router that has a place in GGUF."""


def config_of(raw: Mapping[str, Any]) -> ModelConfig:
    return expand(parse(ModelRecipe, raw, "test"))


def random_model(raw: Mapping[str, Any]) -> Transformer:
    """Weights large enough that attention and routing matter."""
    model = Transformer(config_of(raw))
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
        elif tensor.dim() == 1:
            tensor.copy_(0.2 * torch.randn_like(tensor))
        else:
            tensor.copy_(1.5 * torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    return model.eval()


def small_tokenizer() -> Tokenizer:
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
    types = [3, 3] + [1] * (len(tokens) - 2)
    return tokenizer_from_vocabulary(tokens, MERGES, types, "gpt-2", bos_id=0, eos_id=1, add_bos=True)


def companions() -> dict[str, bytes]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return {
        "tokenizer.json": small_tokenizer().to_json().encode(),
        "tokenizer_config.json": json.dumps({**config, "add_bos_token": True}).encode(),
        "generation_config.json": b'{"bos_token_id": 0, "eos_token_id": 1}',
        "chat_template.jinja": TEMPLATE.encode(),
    }


def import_folder(folder: Path, model: Transformer, files: Mapping[str, bytes] | None = None) -> Path:
    """An imported folder that holds `model`."""
    folder.mkdir(parents=True)
    state = model.state_dict()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    with ImportedWriter(folder, specs, []) as writer:
        for name, tensor in state.items():
            writer.weights.write(name, tensor)
        record: dict[str, Any] = {"config": {}, "tensors": {}}
        about = {"family": "test", "format": "gguf"}
        writer.finish(model.config, about, record, companions() if files is None else files)
    return folder


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def packed(value: Any) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, bytes):
        return value  # spelt out by the test
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    kind, body = (8, b"".join(map(text, value))) if isinstance(value[0], str) else (5, np.int32(value).tobytes())
    return struct.pack("<IIQ", 9, kind, len(value)) + body


def spelt(
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], int, bytes]] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    shift: int = 0,
) -> bytes:
    """A GGUF file: tensors are (name, shape as PyTorch has it, type, bytes); `shift` moves all but the first."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(metadata))))
    head += b"".join(text(key) + packed(value) for key, value in metadata.items())
    body = b""
    for name, shape, kind, data in tensors:
        offset = len(body) + (shift if body else 0)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += text(name) + dims + struct.pack("<IQ", kind, offset)
        body += data + bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + body
