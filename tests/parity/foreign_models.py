"""Tiny random models of transformers, written to files, for the parity tests.

Weights are larger than a fresh model's, so that routing and attention decide something; every option that the released
models use is on somewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finemoe.checkpoint.huggingface.families import FAMILIES, family_of
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SEQ = 48
_SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {**_SIZE, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3}
_LATENT: dict[str, Any] = {
    **_SIZE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "moe_intermediate_size": 14,
    "num_experts_per_tok": 3,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
"""One component kept, one in between, the rest slowed down, at a head of 8."""
_SHARP = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
_V2_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
_V3 = {**_LATENT, "q_lora_rank": 9, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0}
_GLM: dict[str, Any] = {
    **_GROUPED,
    "head_dim": 12,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "moe_intermediate_size": 14,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_mtp_layers": 0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "llama-head-dim": ("Llama", {**_GROUPED, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None}),
    "mistral-head-dim": (
        "Mistral",
        {**_GROUPED, "sliding_window": 64, "head_dim": 12, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
    "llama-linear": ("Llama", {**_GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4}}),
    "llama-llama3": (
        "Llama",
        {
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-yarn": ("Llama", {**_GROUPED, "rope_parameters": YARN}),
    "llama-yarn-untruncated": ("Llama", {**_GROUPED, "rope_parameters": {**YARN, "truncate": False}}),
    "llama-yarn-factor": ("Llama", {**_GROUPED, "rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "llama-yarn-shrunk": ("Llama", {**_GROUPED, "rope_parameters": {**YARN, "attention_factor": 0.9}}),
    "llama-yarn-kept": ("Llama", {**_GROUPED, "rope_parameters": {**YARN, "attention_factor": 1.0}}),
    "llama-linear-idle": (
        "Llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "mscale": 3.0}},
    ),
    "llama-dynamic": (
        "Llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-tied": ("Llama", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen2-tied": ("Qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 12}),
    "qwen3-of-r1": ("Qwen3", {**_GROUPED, "head_dim": 12, "rope_parameters": {**YARN, "attn_factor": 0.878}}),
    "qwen2-window-of-no-layer": (
        "Qwen2",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {**_GROUPED, **_EXPERTS}),
    "olmoe-normalised": ("Olmoe", {**_GROUPED, **_EXPERTS, "norm_topk_prob": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_GROUPED,
            **_EXPERTS,
            "moe_intermediate_size": 14,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe-step": (
        "Qwen2Moe",
        {
            **_GROUPED,
            **_EXPERTS,
            "moe_intermediate_size": 14,
            "shared_expert_intermediate_size": 14,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**_GROUPED, **_EXPERTS, "moe_intermediate_size": 14, "norm_topk_prob": True}),
    "deepseek_v2-lite": (
        "DeepseekV2",
        {
            **_LATENT,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": _SHARP,
        },
    ),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, **_V2_GROUPS, "q_lora_rank": 9, "rope_parameters": _SHARP}),
    "deepseek_v2-plain": ("DeepseekV2", {**_LATENT, **_V2_GROUPS, "q_lora_rank": 9, "n_shared_experts": 1}),
    "deepseek_v3": (
        "DeepseekV3",
        {**_V3, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v3-yarn-two": (
        "DeepseekV3",
        {**_V3, "rope_parameters": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.6}, "rms_norm_eps": 1e-5},
    ),
    "deepseek_v3-no-query-rank": ("DeepseekV3", {**_V3, "q_lora_rank": None, "norm_topk_prob": False}),
    "deepseek_v3-half-split": ("DeepseekV3", {**_V3, "rope_interleave": False, "first_k_dense_replace": 0}),
    "deepseek_v3-one-group": ("DeepseekV3", {**_V3, "n_group": 1, "topk_group": 1, "rope_parameters": YARN}),
    "deepseek_v3-tied-linear": (
        "DeepseekV3",
        {
            **_V3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "deepseek_v3-dense": ("DeepseekV3", {**_V3, "first_k_dense_replace": 3}),
    "deepseek_v3-yarn-of-kimi": (
        "DeepseekV3",
        {
            **{**_V3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
            "rope_parameters": {**YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm4_moe": ("Glm4Moe", _GLM),
    "glm4_moe-air": ("Glm4Moe", {**_GLM, "attention_bias": True, "use_qk_norm": False, "n_group": 1, "topk_group": 1}),
    "glm4_moe-three-quarters": (
        "Glm4Moe",
        {
            **{**_GLM, "head_dim": 16, "n_shared_experts": 2, "norm_topk_prob": False, "attention_bias": True},
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.75},
        },
    ),
    "glm4_moe-whole-heads": (
        "Glm4Moe",
        {**_GLM, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 1.0}},
    ),
}


def make(case: str, **changes: Any) -> Any:
    """The model of a case, in eval mode, with random weights that matter."""
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**json.loads(json.dumps({**options, **changes})))
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomize(dict(model.named_parameters()) | dict(model.named_buffers()), seed=len(case))
    return model.eval()


@torch.no_grad()
def randomize(tensors: Mapping[str, Tensor], seed: int) -> None:
    """Large weights in place: norms about 1, biases of both signs, matrices that keep the size of their input."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "inv_freq" in name or not tensor.numel():
            continue
        drawn = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.2 * drawn)
        elif tensor.ndim == 1:
            tensor.copy_(0.3 * drawn)
        elif "embed" in name:
            tensor.copy_(drawn)
            tensor[::4] *= 1e-3  # as small as the eps of the first norm
        else:
            tensor.copy_(drawn * 1.5 * tensor.shape[-1] ** -0.5)
            if "q_a_proj" in name or "kv_a_proj" in name:  # latents, not the rotary key
                tensor[: 12 if "kv_a_proj" in name else None] *= 1e-3


def reload(folder: Path) -> Any:
    """The transformers model in a folder, computed the plain way."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **plain).eval()


def tokens(vocab_size: int = 61) -> Tensor:
    """`[2, SEQ]` ids."""
    return torch.randint(vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(5))


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all tensors."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return json.loads((folder / "config.json").read_text()), weights


def fill(config: ModelConfig, family: str, weights: Mapping[str, Tensor]) -> Transformer:
    """Our model from a file's tensors, placement by placement; every tensor must have its place."""
    model = Transformer(config)
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in model.state_dict().items()}
    places = {placement.theirs: placement for placement in FAMILIES[family].placements(config)}
    for name, tensor in weights.items():
        placement = places[name]
        assert tensor.shape == placement.shape
        state[placement.ours][placement.index] = tensor
    assert not [name for name, tensor in state.items() if tensor.isnan().any()]
    model.load_state_dict(state)
    return model.eval()


def ours(folder: Path) -> Transformer:
    """Our model from a Hugging Face folder."""
    raw, weights = read_folder(folder)
    family = family_of(raw)
    return fill(family.to_config(raw), family.name, weights)


def take(model: Transformer, family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names, as a file of `family` holds them; copies left out."""
    seen, found = set(), {}
    for placement in FAMILIES[family].placements(model.config):
        place = (placement.ours, str(placement.index))
        if place not in seen:
            seen.add(place)
            found[placement.theirs] = tensors[placement.ours][placement.index].clone()
    return found


def write_folder(folder: Path, raw: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """A Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})


def gradients_as_file(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The gradients of a transformers model under the names of its files: written as if they were weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    return read_folder(folder)[1]


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
