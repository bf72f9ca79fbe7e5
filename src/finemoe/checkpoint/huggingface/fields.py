"""A foreign config.json read field by field, so that nothing in it is passed over in silence.

Every field is understood by its family, known not to matter (with the reason), or reported. A field that changes what
the model computes, in a way that ours cannot, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from finemoe.core.errors import CheckpointError

IRRELEVANT: Mapping[str, str] = {
    "_attn_implementation": "which kernel ran, not what it computes",
    "_attn_implementation_autoset": "which kernel ran, not what it computes",
    "_flash_attn_2_enabled": "which kernel ran, not what it computes",
    "_name_or_path": "where the model once lay",
    "add_cross_attention": "no part of a language model alone",
    "architecture": "the family",
    "attn_implementation": "which kernel ran, not what it computes",
    "auto_map": "names Python code in the repository, which is never run",
    "bad_words_ids": "how texts were generated",
    "begin_suppress_tokens": "how texts were generated",
    "bos_token_id": "the tokenizer's business",
    "chunk_size_feed_forward": "cuts the same products into pieces",
    "cls_token_id": "the tokenizer's business",
    "decoder_start_token_id": "of models with an encoder",
    "diversity_penalty": "how texts were generated",
    "do_sample": "how texts were generated",
    "dtype": "every tensor says its own type",
    "early_stopping": "how texts were generated",
    "encoder_no_repeat_ngram_size": "how texts were generated",
    "eos_token_id": "the tokenizer's business",
    "ep_size": "over how many machines experts were spread",
    "experts_implementation": "which kernel ran, not what it computes",
    "exponential_decay_length_penalty": "how texts were generated",
    "finetuning_task": "what it was trained for",
    "forced_bos_token_id": "how texts were generated",
    "forced_eos_token_id": "how texts were generated",
    "gradient_checkpointing": "how memory was saved while training",
    "id2label": "names of classes",
    "is_decoder": "a language model is one",
    "is_llama_config": "says nothing new",
    "keys_to_ignore_at_inference": "which outputs were dropped",
    "label2id": "names of classes",
    "length_penalty": "how texts were generated",
    "max_length": "how texts were generated",
    "min_length": "how texts were generated",
    "model_type": "the family",
    "no_repeat_ngram_size": "how texts were generated",
    "num_beam_groups": "how texts were generated",
    "num_beams": "how texts were generated",
    "num_return_sequences": "how texts were generated",
    "output_attentions": "what was returned beside the logits",
    "output_hidden_states": "what was returned beside the logits",
    "output_router_logits": "what was returned beside the logits",
    "output_scores": "what was returned beside the logits",
    "pad_token_id": "the tokenizer's business",
    "prefix": "how texts were generated",
    "pretraining_tp": "cuts the same products into pieces",
    "problem_type": "what it was trained for",
    "remove_invalid_values": "how texts were generated",
    "repetition_penalty": "how texts were generated",
    "return_dict": "what was returned beside the logits",
    "return_dict_in_generate": "how texts were generated",
    "sep_token_id": "the tokenizer's business",
    "seq_aux": "how the balance loss of training was averaged",
    "suppress_tokens": "how texts were generated",
    "task_specific_params": "what it was trained for",
    "temperature": "how texts were generated",
    "tf_legacy_loss": "for another program",
    "tie_encoder_decoder": "of models with an encoder",
    "tokenizer_class": "the tokenizer's business",
    "top_k": "how texts were generated",
    "top_p": "how texts were generated",
    "torch_dtype": "every tensor says its own type",
    "torchscript": "for another program",
    "transformers.js_config": "for another program",
    "transformers_version": "which program wrote the file",
    "typical_p": "how texts were generated",
    "unsloth_fixed": "which program wrote the file",
    "unsloth_version": "which program wrote the file",
    "use_bfloat16": "every tensor says its own type",
    "use_cache": "whether keys were kept while generating",
    "use_flash_attn": "which kernel ran, not what it computes",
}
"""Fields that change nothing, whatever they say -> why."""

TRAINING_ONLY: Mapping[str, str] = {
    "attention_dropout": "dropout while training, which finemoe does not have",
    "embd_pdrop": "dropout while training, which finemoe does not have",
    "hidden_dropout": "dropout while training, which finemoe does not have",
    "hidden_dropout_prob": "dropout while training, which finemoe does not have",
    "neftune_noise_alpha": "noise while training, which finemoe does not have",
    "resid_pdrop": "dropout while training, which finemoe does not have",
    "router_aux_loss_coef": "a balance loss over all layers and sequences at once; set `balance` in the recipe",
    "router_jitter_noise": "noise while training, which finemoe does not have",
    "router_z_loss_coef": "a loss of training; set `balance.z` in the recipe",
}
"""Fields that matter in training alone: noted where they are not 0."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "compression_config": (),
    "cross_attention_hidden_size": (),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "index_topk": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "no_rope_layers": ([],),
    "num_hash_layers": (0,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "scale_depth": (),
    "scale_emb": (1,),
    "quantization": (),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "swiglu_limit": (),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Fields that change the function -> the values, beside null, at which they do not."""

_TELLING = frozenset(
    ("first_k_dense_replace", "n_group", "norm_topk_prob", "routed_scaling_factor", "topk_group", "topk_method")
)
"""Fields that every published file has, and whose default is another model."""

MAX_LAYERS: Final = 4096
MAX_EXPERTS: Final = 100_000
"""In all layers together: a hostile file must not make us build lists without end."""
_MAX_SIZE = 1 << 31
_MISSING = object()


@dataclass(frozen=True)
class Foreign:
    """The config.json of a family, as read."""

    raw: Mapping[str, Any]
    defaults: Mapping[str, Any]
    """What the family's own code takes where a field is left out."""


class Fields:
    """Reads a config and remembers which fields were read."""

    def __init__(self, foreign: Foreign) -> None:
        self._raw = self.raw = foreign.raw
        self._defaults = foreign.defaults
        self._read: set[str] = set()
        self._notes: list[str] = []
        self._warnings: list[str] = []
        self._taken: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        """Whether the file itself says something other than null."""
        self._read.add(name)
        return self._raw.get(name) is not None

    def value(self, name: str) -> Any:
        """What the file says, or the family's default; an error where there is neither."""
        self._read.add(name)
        found = self._raw.get(name, self._defaults.get(name, _MISSING))
        if found is _MISSING:
            raise CheckpointError(
                f"config.json: `{name}` is missing, and this family has no default for it; fetch the whole file"
            )
        if name not in self._raw and found is not None and name in _TELLING:
            self._taken[name] = found
        return found

    def integer(self, name: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        found = self.value(name)
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found < _MAX_SIZE:
            self.refuse(name, found, f"a whole number of at least {least} is needed")
        return int(found)

    def optional_integer(self, name: str, least: int = 1) -> int | None:
        """The same, or null."""
        return None if self.value(name) is None else self.integer(name, least)

    def number(self, name: str) -> float:
        """A number above 0."""
        found = self.value(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e30:
            self.refuse(name, found, "a number above 0 is needed")
        return float(found)

    def flag(self, name: str) -> bool:
        """True or false; null is false."""
        found = self.value(name)
        if found is not None and not isinstance(found, bool):
            self.refuse(name, found, "true or false is needed")
        return bool(found)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse every value but those; a field that is left out, or null, counts as its default."""
        found = self._raw.get(name, self._defaults.get(name))
        self._read.add(name)
        if found is not None and not _among(found, allowed):
            self.refuse(name, found, why)

    def idle(self, name: str, value: Any) -> None:
        """Take note of a field that the family's code does not look at and that says what it does anyway, `value`.

        With another value it stays unknown, and is reported at the end.
        """
        if _among(self._raw.get(name), (value,)):
            self._read.add(name)

    def refuse(self, name: str, value: Any, why: str) -> NoReturn:
        """Raise with the field, its value and the reason."""
        raise CheckpointError(f"config.json: `{name}` is {shown(value)}: {why}")

    def note(self, text: str) -> None:
        """Report something that is no reason to refuse."""
        self._notes.append(text)

    def warn(self, text: str) -> None:
        """Report something that everybody must know, as somebody else may compute something else."""
        self._warnings.append(text)

    def finish(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Account for every field not yet read; the notes of all, and the warnings.

        Raises:
            CheckpointError: one of them changes the function in a way that our model cannot.
        """
        for name in sorted(set(self._raw) - self._read):
            value = self._raw[name]
            if name in _NEUTRAL:
                allowed = ", ".join(["null", *(json.dumps(one) for one in _NEUTRAL[name])])
                if value is not None and not _among(value, _NEUTRAL[name]):
                    self.refuse(name, value, f"this model cannot compute that; it has {allowed} only")
            elif name in TRAINING_ONLY:
                if value:
                    self.note(f"`{name}` {shown(value)} is not taken over: {TRAINING_ONLY[name]}")
            elif name not in IRRELEVANT:
                self.note(f"`{name}` {shown(value)} is unknown and not used; check that it changes nothing")
        if self._taken:
            taken = ", ".join(f"{name} {shown(value)}" for name, value in self._taken.items())
            self.warn(f"config.json does not say what changes the model: {taken} is taken, as the family's code does")
        return tuple(dict.fromkeys(self._notes)), tuple(dict.fromkeys(self._warnings))


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def shown(value: Any) -> str:
    """JSON of a value, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
