"""On-policy: the student answers, and is told by the teacher of every token of its own answer what it should have been.

What is drawn follows from the weights, the seed of the run, the position of the prompt in it and the prompt alone, so a
run that is stopped and resumed draws the same answers again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from finemoe.core.errors import DataError
from finemoe.core.seeds import derive
from finemoe.data.batch import PackedBatch, TokenBatch
from finemoe.data.conversations.packing import Packer, fit
from finemoe.data.conversations.prepare import prepare_conversations
from finemoe.generation.config import SamplingConfig
from finemoe.methods.conversations import Conversations, speech_of
from finemoe.methods.grpo.source import Asked, OwnEngine
from finemoe.methods.setting import Setting
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer
from finemoe.training.method import Prompt

_PER_PASS = 16
"""[prompts] That are answered at once when it is measured."""


@dataclass(frozen=True)
class Prompts:
    """A batch: what is asked, and which random streams answer it."""

    prompts: tuple[tuple[int, ...], ...]
    streams: tuple[int, ...]
    """One a prompt: where it stands in the run."""
    room: int
    """[tokens] Most that an answer may have."""

    @property
    def num_sequences(self) -> int:
        """Prompts."""
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Of the prompts and the longest answers that they may get: how long they become, the model will say."""
        return sum(map(len, self.prompts)) + self.room * len(self.prompts)

    def to(self, device: torch.device | str) -> Prompts:
        """Itself: it holds no tensors."""
        return self


@final
@dataclass(frozen=True)
class Questions:
    """Prompts by position: `training.method.TrainingData`."""

    inner: Conversations
    """The prompts of both sides of the split; each is a position of its own."""
    room: int

    @staticmethod
    def read(setting: Setting, room: int) -> Questions:
        """The prompts of `setting`: what is asked in its records, up to the last answer.

        Raises:
            ConfigError: the run begins with no model.
            DataError: the records cannot be used, or are too few.
        """
        length = setting.data.sequence_length
        tokenizer, template, plain = speech_of(setting)
        prepared = prepare_conversations(setting.data, "prompt", tokenizer, template)
        seed = derive(setting.seed, "data")
        train, validation = (
            Packer(stored, fit(stored, length - room, "drop"), length - room, seed, together=False)
            for stored in prepared.sides.values()
        )
        train.require(setting.sequences_per_step, room)
        if not len(validation.fitted.items):
            raise DataError(
                f"all {len(validation.stored)} prompts held out are longer than the {length - room} tokens that "
                "method.answer_tokens leaves of data.sequence_length: raise it"
            )
        return Questions(Conversations(prepared, train, validation, plain), room)

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's."""
        return self.inner.tokenizer

    @property
    def sequences_per_epoch(self) -> int:
        """Prompts."""
        return self.inner.sequences_per_epoch

    @property
    def companions(self) -> Mapping[str, str]:
        """As of conversations."""
        return self.inner.companions

    @property
    def report(self) -> Mapping[str, Any]:
        """As of conversations."""
        return self.inner.report

    def batch(self, position: int, num_sequences: int) -> Prompts:
        """By position: a pure function."""
        items = self.inner.train.batch(position, num_sequences).items.tolist()
        return self._asked(self.inner.train, items, range(position, position + num_sequences))

    def asked(self) -> Iterator[Prompt]:
        """Prompts in the order of the first epoch."""
        return (Prompt(self.batch(position, 1).prompts[0]) for position in range(self.sequences_per_epoch))

    def held_out(self) -> Iterator[Prompts]:
        """What is validated on; its answers are drawn anew at each measurement, from the same streams."""
        packer, config = self.inner.validation, self.inner.prepared.config
        items = packer.fitted.items[: max(1, config.max_validation_tokens // config.sequence_length)].tolist()
        for start in range(0, len(items), _PER_PASS):
            part = items[start : start + _PER_PASS]
            yield self._asked(packer, part, range(-1 - start, -1 - start - len(part), -1))  # those of training are not

    def _asked(self, packer: Packer, items: list[int], streams: range) -> Prompts:
        prompts = (tuple(packer.stored.segment(int(item))[0].tolist()) for item in items)
        return Prompts(tuple(prompts), tuple(streams), self.room)

    def token_frequencies(self) -> Tensor:
        """[ids] counts in the prompts."""
        return self.inner.token_frequencies()


@final
@dataclass(frozen=True)
class OwnAnswers:
    """Has the model answer prompts at temperature 1, in eval mode, and packs what it wrote."""

    tokenizer: Tokenizer
    seed: int

    def __call__(self, model: Transformer, batch: Prompts) -> PackedBatch:
        """Prompts and answers; every token of an answer has the weight 1 / its length, so that answers count alike."""
        columns: dict[str, list[Tensor]] = {}
        for number, (prompt, answer) in enumerate(zip(batch.prompts, self._written(model, batch), strict=True)):
            ids = torch.tensor([*prompt, *answer])
            weights = torch.zeros(len(ids) - 1)
            weights[len(prompt) - 1 :] = 1 / len(answer)
            made = {
                "tokens": ids[:-1],
                "targets": ids[1:],
                "weights": weights,
                "positions": torch.arange(len(ids) - 1),
                "documents": torch.full((len(ids) - 1,), number),
            }
            for name, column in made.items():
                columns.setdefault(name, []).append(column)
        rows = TokenBatch(**{name: torch.cat(pieces)[None] for name, pieces in columns.items()})
        packed = PackedBatch(rows, batch.num_sequences, batch.num_sequences, torch.arange(batch.num_sequences))
        return packed.to(model.embedding.weight.device)

    def _written(self, model: Transformer, batch: Prompts) -> list[tuple[int, ...]]:
        device = model.embedding.weight.device.type

        def autocast() -> torch.autocast:
            # Weights that autocast casts without gradients must not be those that the training pass then finds cast.
            return torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False)

        source = OwnEngine(model, self.tokenizer, autocast, experts=False)
        sampling = SamplingConfig(seed=derive(self.seed, "own answers"), max_new_tokens=batch.room)
        asked = [Asked(ids, (stream,)) for ids, stream in zip(batch.prompts, batch.streams, strict=True)]
        return [answer.completion for (answer,) in source(asked, sampling)]
