"""What the methods on conversations share: their data, how they are measured, and what of a method is alike in all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from finemoe.checkpoint.open import load_chat_template, load_tokenizer
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.seeds import derive
from finemoe.data.batch import PackedBatch
from finemoe.data.conversations.forms import Kind
from finemoe.data.conversations.packing import Packer, TooLong, Weighing, fit
from finemoe.data.conversations.prepare import PreparedConversations, prepare_conversations
from finemoe.data.corpora import CorpusConfig
from finemoe.methods.live import live_terms
from finemoe.methods.setting import MethodConfig, Setting
from finemoe.model.transformer import Transformer
from finemoe.text.chat import CHAT_TEMPLATE, DEFAULT, ChatTemplate
from finemoe.text.tokenizer import Tokenizer
from finemoe.training.balancing import MoveBiases
from finemoe.training.gradients import Clip
from finemoe.training.losses.coefficients import ByCoefficients
from finemoe.training.method import Group, Measured, Method

_VALIDATION_TOKENS = 8192  # per forward pass


class ConversationsConfig(MethodConfig):
    """What methods on conversations have in common."""

    too_long: TooLong = "cut"
    """What becomes of a conversation longer than `data.sequence_length`: cut behind its last answer that fits, or
    dropped. Both are counted. Pairs are always dropped."""
    mtp: Literal["train", "freeze", "drop"] = "freeze"
    """What becomes of multi-token prediction modules: trained too, left as they are, or left out of the new model."""
    general: CorpusConfig | None = None
    """Documents whose loss is measured beside what is learnt, on those held out of them: what is forgotten."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "data": {"packing": "isolate"},
        "optimizer": {"learning_rate": 1e-5},
        "schedule": {"kind": "constant"},
    }
    """How the family tunes its chat models (DeepSeekMoE section 5.2)."""

    def moves(self, name: str) -> bool:
        """All but prediction modules that are not to be trained."""
        return self.mtp == "train" or not name.startswith("mtp.")


@final
@dataclass(frozen=True)
class Conversations:
    """Conversations, or pairs, in batches without padding: `training.method.TrainingData`."""

    prepared: PreparedConversations
    train: Packer
    validation: Packer
    plain: bool
    """The model had no chat template, so it learns the plain one."""

    @staticmethod
    def read(
        setting: Setting,
        config: ConversationsConfig,
        want: Kind,
        weighing: Weighing = "token",
        ending: Callable[[Tokenizer], int] | None = None,
    ) -> Conversations:
        """The conversations of `setting`, rendered by the template of the model that the run begins with.

        `ending`: the token that follows each of them, and is all that is learnt.

        Raises:
            ConfigError: the run begins with no model.
            DataError: the records cannot be used, or are too few.
        """
        tokenizer, template, plain = speech_of(setting)
        prepared = prepare_conversations(setting.data, want, tokenizer, template)
        length, seed = setting.data.sequence_length, derive(setting.seed, "data")
        last = None if ending is None else ending(tokenizer)
        both = []
        for stored in prepared.sides.values():
            fitted = fit(stored, length, config.too_long)
            packing = "isolate" if want == "pair" else setting.data.packing
            both.append(Packer(stored, fitted, length, seed, weighing, packing, want != "pair", last))
        train, validation = both
        train.require(setting.sequences_per_step)
        if not len(validation.fitted.items):
            raise DataError(
                f"all {len(validation.stored)} items held out are longer than data.sequence_length {length}: raise it"
            )
        return Conversations(prepared, train, validation, plain)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.prepared.tokenizer

    @property
    def sequences_per_epoch(self) -> int:
        """Bins, or pairs."""
        return len(self.train.bins)

    @property
    def companions(self) -> Mapping[str, str]:
        """The plain template, where the model learns it."""
        return {CHAT_TEMPLATE: self.prepared.template.sources[DEFAULT]} if self.plain else {}

    @property
    def report(self) -> Mapping[str, Any]:
        """What was read, cut and left out."""
        sides = {"train": self.train, "validation": self.validation}
        template = self.prepared.template
        said = repr((sorted(template.sources.items()), sorted(template.special_tokens.items())))
        return {
            **self.prepared.report,
            "template_sha256": hashlib.sha256(said.encode("utf-8", "replace")).hexdigest(),
            "too_long": {side: {"cut": one.fitted.cut, "dropped": one.fitted.dropped} for side, one in sides.items()},
            "bins": len(self.train.bins),
        }

    def batch(self, position: int, num_sequences: int) -> PackedBatch:
        """By position: a pure function."""
        return self.train.batch(position, num_sequences)

    def held_out(self) -> Iterator[PackedBatch]:
        """What is validated on, always the same in the same order; items are numbered on from those of training."""
        chosen = self.validated
        per_pass = max(1, _VALIDATION_TOKENS // self.prepared.config.sequence_length)
        for start in range(0, len(chosen), per_pass):
            batch = self.validation.pack(chosen[start : start + per_pass])
            yield PackedBatch(batch.rows, batch.num_sequences, batch.num_documents, batch.items + self.offset)

    @property
    def validated(self) -> list[list[int]]:
        """The bins that are validated on: as many as `data.max_validation_tokens` has room for."""
        config = self.prepared.config
        return self.validation.bins[: max(1, config.max_validation_tokens // config.sequence_length)]

    @property
    def offset(self) -> int:
        """The number of the first item held out."""
        return len(self.train.stored)

    def token_frequencies(self) -> Tensor:
        """[ids] counts in the training tokens."""
        counts = np.bincount(self.train.stored.tokens, minlength=self.tokenizer.vocab_size)
        return torch.from_numpy(counts.astype(np.int64))

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """What is trained on, and how full the bins are, in words."""
        fitted, report = self.train.fitted, self.report["too_long"]["train"]
        read, room = int(fitted.tokens.sum()), len(self.train.bins) * self.train.sequence_length
        said = f"{len(fitted.items):,} to train on"
        if self.train.together:
            said += f" in {len(self.train.bins):,} bins, {read / room:.0%} full"
        lost = [f"{count:,} {what}" for what, count in report.items() if count]
        if lost:
            said += f"; longer than {self.train.sequence_length} tokens: {', '.join(lost)}"
        plain = "the model has no chat template: it learns the plain one, User: and Assistant:"
        return (said, plain) if self.plain else (said,)


def speech_of(setting: Setting) -> tuple[Tokenizer, ChatTemplate, bool]:
    """Tokenizer and chat template of the model that the run begins with; whether the template is the plain one.

    Raises:
        ConfigError: it begins with none.
    """
    if setting.start_from is None:
        raise ConfigError("this method adapts a model that was trained before: name it as start_from")
    source = Path(setting.start_from)
    tokenizer = Tokenizer.load(setting.data.tokenizer) if setting.data.tokenizer else load_tokenizer(source)
    template = load_chat_template(source)
    if template is not None:
        return tokenizer, template, False
    return tokenizer, ChatTemplate.plain(tokenizer.end_of_text), True


def method_on(
    config: ConversationsConfig,
    setting: Setting,
    data: Conversations,
    objective: ByCoefficients,
    measure: Callable[[Transformer], Measured],
    notes: tuple[str, ...] = (),
) -> Method[PackedBatch]:
    """The parts of a method that are alike in all: clipping, biases, what is live."""
    live = live_terms(setting, mtp=config.mtp == "train")

    def select(name: str) -> Group | None:
        return Group() if config.moves(name) else None

    return Method(
        data=data,
        objective=objective,
        measure=measure,
        select=select,
        before_update=(Clip(setting.max_gradient_norm),),
        after_update=(MoveBiases(setting.balancing),),
        notes=(*data.sentences, *notes, f"added to the loss: {', '.join(live) or 'nothing'}"),
    )
