"""The method `distill`: a student learns a teacher's distributions, of given texts or of its own answers.

Of given texts, forward: Hinton et al. 2015 (1503.02531), token by token. Of its own answers, reverse: Agarwal et al.
2023 (2306.13649) and Gu et al. 2023 (2306.08543), as exact expectations over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.checkpoint.open import read_model_config
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.core.errors import ConfigError
from finemoe.data.batch import Batch, TokenBatch
from finemoe.data.conversations.packing import TooLong
from finemoe.data.loader import pack
from finemoe.methods.conversations import Conversations, ConversationsConfig
from finemoe.methods.distillation.objective import Distil
from finemoe.methods.distillation.own_answers import OwnAnswers, Questions
from finemoe.methods.distillation.recorded import record
from finemoe.methods.distillation.teacher import Beside, Reading, Teacher, open_teacher
from finemoe.methods.live import live_terms
from finemoe.methods.measuring import HasHeldOut, HeldOut
from finemoe.methods.pretraining import PackedDocuments
from finemoe.methods.setting import Kept, MethodConfig, Setting, no_room, numbers
from finemoe.model.divergence import Direction
from finemoe.text.tokenizer import Tokenizer
from finemoe.training.balancing import MoveBiases
from finemoe.training.gradients import Clip
from finemoe.training.method import Group, Method, Prepare, TrainingData

_AT_ONCE = 16
"""[sequences] That a teacher which is recorded reads at once."""
_ANSWER_TOKENS = 128


class DistillConfig(MethodConfig):
    """Learning from a teacher of the same tokenizer."""

    kind: Literal["distill"] = "distill"
    teacher: str
    """A run or one checkpoint of it, an imported or a Hugging Face folder; any architecture with the student's
    tokenizer."""
    data_kind: Literal["conversations", "documents"] = "conversations"
    """What is read: conversations, of which the assistant's tokens count, or documents, of which all do."""
    policy: Literal["off", "on"] = "off"
    """off: the texts are the data's own; on: the student answers the data's prompts itself, at temperature 1."""
    divergence: Direction | None = None
    """forward: KL(teacher || student), which covers all that the teacher may say; reverse: KL(student || teacher),
    which leaves what it would not say. None: forward off policy, reverse on policy."""
    top_k: PositiveInt | None = None
    """[tokens] Only so many of the teacher's most probable tokens are kept, computed once and written to the cache; it
    is not in memory afterwards. None: the teacher runs beside the student."""
    temperature: PositiveFloat = 1.0
    """[factor] Both models' logits are divided by it before they are compared."""
    mix: NonNegativeFloat = 0.0
    """[coefficient] Of the ordinary cross-entropy of the data, added to the divergence."""
    answer_tokens: PositiveInt | None = None
    """[tokens] Longest answer that the student writes, on policy. None: 128."""
    too_long: TooLong | None = None
    """What becomes of a conversation longer than `data.sequence_length`: cut behind its last answer that fits, or
    dropped. None: cut."""
    mtp: Literal["freeze", "drop"] = "freeze"
    """What becomes of multi-token prediction modules: left as they are, or left out of the new model."""

    defaults: ClassVar[Mapping[str, Any]] = ConversationsConfig.defaults
    moves_biases: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        on = self.policy == "on"
        if on and self.data_kind == "documents":
            raise ValueError('policy "on" answers prompts, and documents ask nothing: use data_kind "conversations"')
        if on and self.top_k is not None:
            raise ValueError('top_k is of texts that are known before; policy "on" writes them: leave top_k out')
        if on and self.mix:
            raise ValueError('mix is of the data\'s own answers, which policy "on" does not read: leave it out')
        if not on and self.answer_tokens is not None:
            raise ValueError('answer_tokens is of policy "on"; set it, or leave answer_tokens out')
        if self.too_long is not None and (on or self.data_kind == "documents"):
            raise ValueError("too_long is of conversations that are read whole: leave it out")
        if self.top_k is not None and self.divergence == "reverse":
            raise ValueError(
                'divergence "reverse" needs the whole distribution of the teacher: leave top_k out, or use "forward"'
            )
        return self

    def refuse(self, sequences: int, length: int) -> None:
        """Room for a prompt before each answer of the student's.

        Raises:
            ValueError: there is none.
        """
        if self.policy == "on" and (room := self.answer_tokens or _ANSWER_TOKENS) >= length:
            raise ValueError(no_room(room, length))

    @property
    def direction(self) -> Direction:
        """As given, or what suits the policy."""
        return self.divergence or ("reverse" if self.policy == "on" else "forward")

    @property
    def prepares(self) -> bool:
        """A teacher that runs beside the student is put where it is."""
        return self.top_k is None

    def moves(self, name: str) -> bool:
        """All but prediction modules."""
        return not name.startswith("mtp.")

    def kept(self, weights: int) -> tuple[Kept, ...]:
        """The teacher, where it runs beside the student."""
        mend = "a smaller method.teacher"
        if self.policy == "off" and self.direction == "forward":
            mend = "method.top_k = 64, for which the teacher is asked before and not held"
        return (self._teacher(mend),) if self.top_k is None else ()

    @property
    def before(self) -> tuple[Kept, ...]:
        """The teacher, where its answers are kept instead."""
        return () if self.top_k is None else (self._teacher("a smaller method.teacher"),)

    def _teacher(self, mend: str) -> Kept:
        return Kept("the teacher", 4 * numbers(model_shapes(read_model_config(self.teacher))), mend)


@final
@dataclass(frozen=True)
class Taught:
    """The data of a method, with who teaches it in its report: `training.method.TrainingData`."""

    data: TrainingData[Any]
    teacher_sha256: str

    @property
    def tokenizer(self) -> Tokenizer:
        """Of both."""
        return self.data.tokenizer

    @property
    def sequences_per_epoch(self) -> int:
        """As of the data."""
        return self.data.sequences_per_epoch

    @property
    def companions(self) -> Mapping[str, str]:
        """As of the data."""
        return self.data.companions

    @property
    def report(self) -> Mapping[str, Any]:
        """With the teacher's hash: a run that resumes has the same one."""
        return {**self.data.report, "teacher_sha256": self.teacher_sha256}

    def batch(self, position: int, num_sequences: int) -> Batch:
        """By position: a pure function."""
        made: Batch = self.data.batch(position, num_sequences)
        return made

    def token_frequencies(self) -> Tensor:
        """[ids] counts in the training tokens."""
        return self.data.token_frequencies()


def build(config: DistillConfig, setting: Setting) -> Method[Any]:
    """The method, with its teacher opened, and asked where its answers are kept.

    Raises:
        ConfigError: the teacher has another tokenizer, or there is no model to begin with.
        DataError: the data cannot be used, or is too little.
        CheckpointError: there is no teacher.
    """
    isolate = setting.data.packing == "isolate"
    data: Any
    if config.policy == "on":
        data = Questions.read(setting, config.answer_tokens or _ANSWER_TOKENS)
    elif config.data_kind == "documents":
        data = PackedDocuments.read(setting)
    else:
        data = Conversations.read(setting, ConversationsConfig(too_long=config.too_long or "cut"), "conversation")
    opened = open_teacher(config.teacher, data.tokenizer, setting.model.vocab_size)
    vocab = min(setting.model.vocab_size, opened.model.config.vocab_size)
    mark, beside = fingerprint(opened.model), Beside(opened.model, vocab)
    teacher: Teacher = beside
    prepare: tuple[Prepare, ...] = (beside.prepare,)
    if config.top_k is not None:
        if config.top_k >= vocab:
            raise ConfigError(f"method.top_k {config.top_k} is not below the {vocab} ids that there are: leave it out")
        model, k = opened.model, config.top_k
        teacher = record(lambda: readings(data, isolate), model, mark, k, config.temperature, vocab, setting.data)
        prepare = ()  # and the model goes, with this function
    answers = OwnAnswers(data.tokenizer, setting.seed) if config.policy == "on" else None
    objective = Distil(teacher, vocab, config.direction, config.temperature, config.mix, isolate, answers)

    def select(name: str) -> Group | None:
        return Group() if config.moves(name) else None

    live = [f"cross-entropy {config.mix:g}"] if config.mix else []
    live += live_terms(setting, mtp=False)
    return Method(
        data=Taught(data, mark),
        objective=objective,
        measure=HeldOut(_held_out(data), objective),
        select=select,
        prepare=prepare,
        before_update=(Clip(setting.max_gradient_norm),),
        after_update=(MoveBiases(setting.balancing),),
        asks=data.asked if isinstance(data, Questions) else None,
        notes=(*_sentences(data), _taught_by(config), f"added to the loss: {', '.join(live) or 'nothing'}"),
    )


def readings(data: Conversations | PackedDocuments, isolate: bool) -> Iterator[Reading]:
    """All that a run on `data` may read, and what it validates on, each text once."""
    if isinstance(data, Conversations):
        bins = data.train.bins
        for start in range(0, len(bins), _AT_ONCE):
            yield Reading.of(data.train.pack(bins[start : start + _AT_ONCE]), isolate)
    else:
        config, end = data.prepared.config, data.prepared.tokenizer.end_of_text_id
        for source in data.prepared.train.sources:
            for start in range(0, count := source.num_windows(config.sequence_length), _AT_ONCE):
                chosen = np.arange(start, min(start + _AT_ONCE, count))
                yield Reading.of(pack(source.windows(chosen, config.sequence_length), config.packing, end), isolate)
    for batch in _held_out(data).held_out():
        yield Reading.of(batch, isolate)


@dataclass(frozen=True)
class _HeldOutDocuments:
    data: PackedDocuments

    def held_out(self) -> Iterator[TokenBatch]:
        return self.data.prepared.validation_batches(_AT_ONCE)


def _held_out(data: Conversations | PackedDocuments | Questions) -> HasHeldOut:
    return _HeldOutDocuments(data) if isinstance(data, PackedDocuments) else data


def _sentences(data: Conversations | PackedDocuments | Questions) -> tuple[str, ...]:
    if isinstance(data, Questions):
        return data.inner.sentences
    return data.sentences if isinstance(data, Conversations) else ()


def _taught_by(config: DistillConfig) -> str:
    """The teacher, in words."""
    how = "of the student's own answers" if config.policy == "on" else "of the data's texts"
    where = f"its {config.top_k} most probable tokens are on disk" if config.top_k else "it runs beside the student"
    return f"taught by {config.teacher}: the {config.direction} divergence {how}; {where}"
