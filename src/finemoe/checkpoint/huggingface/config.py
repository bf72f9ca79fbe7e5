"""Hugging Face's config.json and our ModelConfig, family by family. A new family is a reader, a writer and a line here.

`FAMILIES[model_type].read(raw)` understands every field or says which it does not; `from_config` is its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finemoe.checkpoint.huggingface.fields import Fields, Foreign, shown
from finemoe.checkpoint.huggingface.grouped import (
    read_deepseek,
    read_llama,
    read_mixtral,
    read_olmoe,
    read_qwen2,
    read_qwen2_moe,
    read_qwen3,
    read_qwen3_moe,
    write_grouped,
)
from finemoe.checkpoint.huggingface.latent import read_deepseek_v2, read_deepseek_v3, write_latent
from finemoe.checkpoint.huggingface.layers import read_general, training_only
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


@dataclass(frozen=True)
class Understood:
    """A config.json, read."""

    config: ModelConfig
    notes: tuple[str, ...]
    """What was not taken over, and what is unknown; a sentence each."""


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    name: str
    architecture: str
    """The class that Hugging Face files name."""
    _read: Callable[[Fields], ModelConfig]
    _write: Callable[[ModelConfig, str, int | None], dict[str, Any]]
    native: bool = True
    """Whether transformers has a class of its own; else its code lies in the repository."""
    _defaults: Mapping[str, Any] = field(default_factory=dict)

    def read(self, raw: Mapping[str, Any]) -> Understood:
        """The ModelConfig that computes exactly what `raw` says, and what was left aside.

        Raises:
            CheckpointError: names the field, its value and the reason, where our model cannot.
        """
        if raw.get("model_type") != self.name:
            raise CheckpointError(f"config.json: `model_type` is {shown(raw.get('model_type'))}, not {self.name!r}")
        fields = Fields(Foreign(raw, {**_COMMON, **self._defaults}))
        read_general(fields)
        config = self._read(fields)
        return Understood(config, fields.finish())

    def to_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """`read(raw).config`.

        Raises:
            CheckpointError: as `read`.
        """
        return self.read(raw).config

    def from_config(
        self,
        config: ModelConfig,
        *,
        max_positions: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        dtype: str = "float32",
    ) -> dict[str, Any]:
        """The config.json of `config`, the inverse of `to_config`.

        Args:
            config: of the model.
            max_positions: used where `config` does not say it.
            bos_token_id: of the tokenizer; so `eos_token_id` and `pad_token_id`.
            eos_token_id: one or several.
            pad_token_id: None where there is none.
            dtype: of the weights, as torch names it.

        Raises:
            CheckpointError: names the reason, where the family cannot compute what `config` does.
        """
        try:
            values = self._write(config, self.name, max_positions)
        except CheckpointError as error:
            raise CheckpointError(f"the model cannot be written as {self.name}: {error}") from error
        return {
            "architectures": [self.architecture],
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "model_type": self.name,
            "torch_dtype": dtype,
            **dict(sorted(values.items())),
        }

    def lost(self, config: ModelConfig) -> tuple[str, ...]:
        """What `from_config` leaves out, in words: settings of training, which the format has no field for."""
        kept = "balance.expert" if self.name in ("deepseek", "deepseek_v2") else None
        return tuple(text for text in training_only(config) if kept is None or not text.startswith(kept))


_COMMON: Mapping[str, Any] = {
    "head_dim": None,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "norm_topk_prob": False,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QWEN_MOE: Mapping[str, Any] = {"decoder_sparse_step": 1, "max_position_embeddings": 32768, "mlp_only_layers": None}
_DEEPSEEK: Mapping[str, Any] = {
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "routed_scaling_factor": 1.0,
    "seq_aux": True,
}

_ALL = (
    Family("llama", "LlamaForCausalLM", read_llama, write_grouped),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        read_mixtral,
        write_grouped,
        True,
        {
            "max_position_embeddings": 131_072,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        read_olmoe,
        write_grouped,
        True,
        {"max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        read_qwen2,
        write_grouped,
        True,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        read_qwen2_moe,
        write_grouped,
        True,
        {**_QWEN_MOE, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4, "num_key_value_heads": 16},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        read_qwen3,
        write_grouped,
        True,
        {"head_dim": 128, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        read_qwen3_moe,
        write_grouped,
        True,
        {**_QWEN_MOE, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4},
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        read_deepseek_v2,
        write_latent,
        True,
        {**_DEEPSEEK, "q_lora_rank": 1536, "topk_method": "greedy"},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        read_deepseek_v3,
        write_latent,
        True,
        {
            "first_k_dense_replace": 3,
            "max_position_embeddings": 4096,
            "n_group": 8,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "rope_interleave": True,
            "routed_scaling_factor": 2.5,
            "topk_group": 4,
        },
    ),
    Family("deepseek", "DeepseekForCausalLM", read_deepseek, write_grouped, False, _DEEPSEEK),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""By `model_type`; the most widely read come first."""


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family that a config.json names.

    Raises:
        CheckpointError: none, or one that is not known.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"config.json: `model_type` is {shown(name)}, and finemoe opens {', '.join(FAMILIES)}; "
            "another architecture computes something else, even where its tensors look alike"
        )
    return FAMILIES[name]


def representable_as(config: ModelConfig) -> dict[str, str | None]:
    """For every family None, or the reason why it cannot compute what `config` does."""
    found: dict[str, str | None] = {}
    for name, family in FAMILIES.items():
        try:
            family.from_config(config, max_positions=1)
        except CheckpointError as error:
            found[name] = str(error)
        else:
            found[name] = None
    return found
