"""A model together with how it reads and writes text: what every verb that uses a trained model opens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.open import (
    load_chat_template,
    load_model,
    load_tokenizer,
    read_model_config,
    stored_in_halves,
    stored_small,
)
from finemoe.core.errors import CheckpointError, ConfigError, DataError, RunError
from finemoe.core.logs import logger
from finemoe.core.reading import decode_json
from finemoe.model.config import Kernels, can_begin_with
from finemoe.model.quantised.blocks import format_of, is_quantised
from finemoe.model.quantised.making import MADE, quantise
from finemoe.model.transformer import Transformer
from finemoe.text.chat import ChatTemplate
from finemoe.text.control import encode_chat
from finemoe.text.tokenizer import Tokenizer

Weights = Literal["auto", "fp32", "bf16", "stored", "int8", "int4"]
"""Of large products; on a CPU all else is float32. auto: blocks of few bits stay what they are, which computes the same
as float32, and everything else is float32; stored: as they are; bf16, int8, int4: made into so many bits."""


@dataclass(frozen=True)
class LanguageModel:
    """A model in eval mode and its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    source: Path
    own: bool
    """It was trained here: each document was followed by the end-of-text token, and none began with another."""
    reach: int | None
    """Longest sequence that it was trained on, or is made for, where that is known."""
    isolated: bool = False
    """It was trained here with every document apart from its neighbours (`data.packing = "isolate"`)."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.embedding.weight.device

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a prompt: with the beginning token where the model's own tokenizer puts one.

        Control tokens that it spells out are text, unless `special`.
        """
        encode = self.tokenizer.encode if self.own else self.tokenizer.encode_prompt
        return encode(text, special=special)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """Its chat template, read from `source` when it is first asked for; None where it was not made to answer.

        Raises:
            DataError: it is damaged.
        """
        return load_chat_template(self.source)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, list[int]]:
        """What the template makes of `messages`, up to where the model answers: the text and its ids.

        Control tokens that a message spells out are text, unless `special` (`text.control.encode_chat`). `tools` are
        JSON schemas of what it may call, and `variables` all else that its template asks for.

        Raises:
            DataError: there is no template, or it fails.
        """
        if self.template is None:
            raise DataError(f"{self.source}: has no chat template, so it was not made to answer: use --prompt")
        return encode_chat(self.template, self.tokenizer, messages, special=special, tools=tools, **variables)

    @property
    def first_id(self) -> int:
        """What stands before the first token of a document: its beginning token, or the end of the one before."""
        bos = self.tokenizer.bos_id
        return self.tokenizer.end_of_text_id if self.own or bos is None else bos


def open_language_model(
    source: str | os.PathLike[str], weights: Weights = "auto", kernels: Kernels | None = None
) -> LanguageModel:
    """The model at `source` on the fastest device here, a small one on the CPU; `source` as in `load_model`.

    Raises:
        ConfigError: no such `weights`.
        FinemoeError: nothing that can be opened, or a tokenizer that is another model's.
    """
    if weights not in get_args(Weights):
        raise ConfigError(f"weights must be one of {', '.join(get_args(Weights))}, not {weights!r}")
    path = Path(source)
    kind = kind_of(path)
    data = training_data(path) if kind in ("run", "imported") else {}
    own = kind == "run" or bool(data)  # a run that was made small is an imported folder that keeps its data table
    model = _loaded(path, weights, kernels)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise RunError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids and the model only "
            f"{model.config.vocab_size}: they do not belong together, put the model's own tokenizer.json back"
        )
    length = data.get("sequence_length")  # of a file that an editor may have changed
    reach = (length if type(length) is int and length > 0 else None) if own else model.config.max_positions
    return LanguageModel(model, tokenizer, path, own, reach, data.get("packing") == "isolate")


def _loaded(path: Path, weights: Weights, kernels: Kernels | None) -> Transformer:
    gpu = torch.cuda.is_available()
    if weights == "int8" or weights == "int4" or (weights == "bf16" and not gpu):
        return load_model(path, kernels, small=weights)
    in_file = weights == "auto" and kind_of(path) == "gguf"  # whatever is in no blocks becomes float32
    if not gpu and (in_file or (weights == "stored" and stored_in_halves(path))):
        return load_model(path, kernels, small="stored")
    if weights in ("auto", "stored") and stored_small(path):
        if gpu:
            logger.info("%s: blocks of few bits are computed with on the CPU; weights in fp32 go to the GPU", path)
        return load_model(path, kernels, small="stored")
    dtype = None if weights == "stored" else torch.bfloat16 if weights == "bf16" else torch.float32
    return load_model(path, kernels, dtype=dtype).to("cuda" if gpu else "cpu")


def weights_for(opened: LanguageModel, source: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The weights at `source`, on the CPU and in the types of `opened`, if they are of that very model.

    Raises:
        FinemoeError: no model, damaged, of another architecture, or with another tokenizer.
    """
    path, own = Path(source), opened.model.config
    found = read_model_config(path).model_copy(update={"max_positions": own.max_positions})  # it has no weights
    if not (can_begin_with(own, found) and can_begin_with(found, own)):
        raise CheckpointError(f"{path} is of another architecture than the model whose weights it is to be")
    if load_tokenizer(path).fingerprint() != opened.tokenizer.fingerprint():
        raise CheckpointError(f"{path} has another tokenizer than the model whose weights it is to be")
    held = opened.model.state_dict()
    if not any(map(is_quantised, held.values())):
        return load_model(path, dtype=opened.model.embedding.weight.dtype).state_dict()
    fresh = load_model(path, small="stored" if stored_small(path) else None).state_dict()
    return {name: _like(tensor, fresh[name], f"{path}: {name}") for name, tensor in held.items()}


def _like(held: Tensor, fresh: Tensor, name: str) -> Tensor:
    """`fresh` in the type of `held`, or in blocks of its format.

    Raises:
        CheckpointError: blocks of a format that is only read.
    """
    if not is_quantised(held):
        return fresh.to(held.dtype)
    if fresh.shape == held.shape and is_quantised(fresh):
        return fresh
    kind = format_of(held)
    if is_quantised(fresh) or kind.name not in MADE:
        raise CheckpointError(
            f"{name} is to become {kind.name}, as the model that is open has it, and cannot: open that model with "
            "--weights fp32, which takes any"
        )
    return quantise(fresh, kind)


def training_data(run: Path) -> dict[str, Any]:
    """The data table in the configuration of a run, or of a run made small; empty where it does not say."""
    # A checkpoint lies two folders below its run.
    candidates = [folder / "config.json" for folder in (run, *run.resolve().parents[:2])]
    config = next((path for path in candidates if path.exists()), candidates[0])
    try:
        return dict(decode_json(config.read_bytes())["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
