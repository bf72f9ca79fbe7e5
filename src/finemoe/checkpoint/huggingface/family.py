"""What a model family is: a reader and a writer of one `model_type`, and what is written is read back, always.

A family is one file in `families/` and a line in its table. This module knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finemoe.checkpoint.huggingface.fields import Fields, Foreign, shown
from finemoe.checkpoint.huggingface.keys import PLAIN, Spellings, placements
from finemoe.checkpoint.huggingface.layers import read_general, training_only
from finemoe.checkpoint.weights.agreement import differences
from finemoe.checkpoint.weights.placement import Placement
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig

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
_SHOWN = 3


@dataclass(frozen=True)
class Understood:
    """A config.json, read."""

    config: ModelConfig
    notes: tuple[str, ...]
    """What was not taken over, and what is unknown; a sentence each."""
    warnings: tuple[str, ...] = ()
    """What others may compute otherwise, and what was taken for what it does not say."""


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    name: str
    architecture: str
    """The class that Hugging Face files name."""
    reader: Callable[[Fields], ModelConfig]
    """The model that the fields describe; a field that it does not ask for is judged by the tables of `fields.py`."""
    writer: Callable[[ModelConfig, int | None], dict[str, Any]]
    """Its inverse: the fields for a model, and for the longest sequence where the model does not say one."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the family's own code takes where a field is left out, beside what all families take."""
    spellings: Spellings = PLAIN
    """How its files name the parts of an MoE layer."""
    native: bool = True
    """Whether transformers has a class of its own; else its code lies in the repository."""
    modules: bool = False
    """Whether its files may hold multi-token prediction modules after the layers."""
    switches: Mapping[str, str] = field(default_factory=dict)
    """Flags that say whether a layer has a tensor, and how the name of that tensor ends: the weights know better."""
    keeps: tuple[str, ...] = ()
    """Settings of training that the format has a field for, by the name in our configuration."""

    def read(self, raw: Mapping[str, Any]) -> Understood:
        """The ModelConfig that computes exactly what `raw` says, and what was left aside.

        Raises:
            CheckpointError: names the field, its value and the reason, where our model cannot.
        """
        if raw.get("model_type") != self.name:
            raise CheckpointError(f"config.json: `model_type` is {shown(raw.get('model_type'))}, not {self.name!r}")
        fields = Fields(Foreign(raw, {**_COMMON, **self.defaults}))
        read_general(fields)
        config = self.reader(fields)
        return Understood(config, *fields.finish())

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
        """The config.json of `config`, the inverse of `to_config`; it was read back and says the same model.

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
            values = self.writer(config, max_positions)
            raw = {
                "architectures": [self.architecture],
                "bos_token_id": bos_token_id,
                "eos_token_id": eos_token_id,
                "pad_token_id": pad_token_id,
                "model_type": self.name,
                "torch_dtype": dtype,
                **dict(sorted(values.items())),
            }
            self._prove(config, raw)
        except CheckpointError as error:
            raise CheckpointError(f"the model cannot be written as {self.name}: {error}") from error
        return raw

    def _prove(self, config: ModelConfig, raw: Mapping[str, Any]) -> None:
        """Raise unless `raw`, read again, computes what `config` does: a setting that no writer knows is not lost."""
        lost = differences(config, self.to_config(raw))
        if lost:
            more = f", and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
            raise CheckpointError(f"the format has no place for {', '.join(lost[:_SHOWN])}{more}")

    def placements(self, config: ModelConfig) -> list[Placement]:
        """Where each tensor of a file lies in `Transformer(config).state_dict()`; see `keys.placements`.

        Raises:
            CheckpointError: the model has a router that learns nothing, for which no family has a name.
        """
        return placements(config, self.spellings)

    def lost(self, config: ModelConfig) -> tuple[str, ...]:
        """What `from_config` leaves out, in words: settings of training, which the format has no field for."""
        return tuple(text for text in training_only(config) if not text.startswith(self.keeps))
