"""What is asked: the prompts of a corpus of records, on both sides of the split, with what would be right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from finemoe.core.errors import DataError
from finemoe.core.logs import logger, progress
from finemoe.core.seeds import derive
from finemoe.data.conversations.forms import NO_FORM, known_forms
from finemoe.data.conversations.prepare import reasons
from finemoe.data.conversations.questions import Question, encode_questions
from finemoe.data.corpora import Side, read_corpus
from finemoe.data.documents.document import Skipped, SkipReport
from finemoe.methods.conversations import speech_of
from finemoe.methods.setting import Setting
from finemoe.text.chat import CHAT_TEMPLATE, DEFAULT, ChatTemplate
from finemoe.text.tokenizer import Tokenizer

_CHUNK = 64


@final
@dataclass(frozen=True)
class Prompts:
    """Those that are trained on, and those held out."""

    sides: Mapping[Side, tuple[Question, ...]]
    tokenizer: Tokenizer
    companions: Mapping[str, str]
    report: Mapping[str, Any]
    seed: int

    @staticmethod
    def read(setting: Setting, template: str | None, room: int) -> Prompts:
        """The prompts of `setting` that leave `room` tokens for an answer.

        Raises:
            ConfigError: the run begins with no model.
            DataError: nothing that can be asked, on either side of the split.
        """
        length = setting.data.sequence_length
        tokenizer, chat, plain = speech_of(setting)
        reading = _Reading(setting, template, length - room, tokenizer, chat)
        sides = reading.read()
        if plain and template is None:
            logger.warning(
                'no chat template in %s: prompts are asked as %r; set method.template = "{prompt}" to ask them plainly',
                setting.start_from,
                _short(tokenizer.decode(sides["train"][0].ids)),
            )
        companions = {CHAT_TEMPLATE: chat.sources[DEFAULT]} if plain and template is None else {}
        return Prompts(sides, tokenizer, companions, reading.report, derive(setting.seed, "prompts"))

    def at(self, place: int, *, shuffled: bool = True) -> int:
        """The item of training that is asked as the `place`-th of a run: every epoch has an order of its own."""
        count = len(self.sides["train"])
        epoch, within = divmod(place, count)
        if not shuffled:
            return within
        return int(np.random.default_rng([self.seed, epoch]).permutation(count)[within])

    def token_frequencies(self) -> Tensor:
        """[ids] counts in the prompts."""
        ids = np.array([token for one in self.sides["train"] for token in one.ids], dtype=np.int64)
        return torch.from_numpy(np.bincount(ids, minlength=self.tokenizer.vocab_size).astype(np.int64))


_SHOWN = 160


def _short(text: str) -> str:
    """Beginning and end, where it is long."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


class _Reading:
    """Records of a corpus, one after the other."""

    def __init__(
        self, setting: Setting, template: str | None, longest: int, tokenizer: Tokenizer, chat: ChatTemplate
    ) -> None:
        self._data, self._template, self._longest = setting.data, template, longest
        self._tokenizer, self._chat = tokenizer, chat
        self._skipped: list[Skipped] = []
        self._too_long = 0
        self.report: dict[str, Any] = {}

    def read(self) -> dict[Side, tuple[Question, ...]]:
        sides: dict[Side, list[Question]] = {"train": [], "validation": []}
        digest, skips = hashlib.sha256(), SkipReport()
        chunk: list[tuple[Side, str, str]] = []
        with progress("reading prompts", None, "prompts") as advance:
            for found in read_corpus(self._data.corpus, self._data.validation_share, skips, whole=True):
                text = found.document.text
                digest.update(repr((found.side, text)).encode("utf-8", "replace"))
                chunk.append((found.side, found.document.name, text))
                if len(chunk) == _CHUNK:
                    self._add(chunk, sides)
                    advance(len(chunk))
                    chunk = []
            self._add(chunk, sides)
        skips.check(self._data.max_skipped_share, "data.max_skipped_share")
        self._require(sides)
        self.report = {
            "kind": "prompt",
            "items": {side: len(found) for side, found in sides.items()},
            "with_reference": {side: sum(bool(one.references) for one in found) for side, found in sides.items()},
            "too_long": self._too_long,
            "duplicates": skips.duplicates,
            "num_skipped": skips.num_skipped + len(self._skipped),
            "skipped": [{"name": one.name, "reason": one.reason} for one in self._skipped[:8]],
            "corpus_sha256": digest.hexdigest(),
            "tokenizer_sha256": self._tokenizer.fingerprint(),
        }
        return {side: tuple(found) for side, found in sides.items()}

    def _add(self, chunk: list[tuple[Side, str, str]], sides: dict[Side, list[Question]]) -> None:
        texts = [text for _, _, text in chunk]
        questions = encode_questions(texts, self._tokenizer, self._chat, self._template)
        for (side, name, _), question in zip(chunk, questions, strict=True):
            if not isinstance(question, Question):
                self._skipped.append(Skipped(name, str(question)))
            elif len(question.ids) > self._longest:
                self._too_long += 1
            else:
                sides[side].append(question)

    def _require(self, sides: Mapping[Side, list[Question]]) -> None:
        kept = sum(map(len, sides.values()))
        read = kept + self._too_long + len(self._skipped)
        if len(self._skipped) > self._data.max_skipped_share * read:
            first = reasons(self._skipped)
            known = f". {known_forms()}" if NO_FORM in first else ""
            raise DataError(f"{len(self._skipped)} of {read} records cannot be asked ({first}){known}")
        for side, found in sides.items():
            if not found:
                raise DataError(f"no prompt of {read} records is on the {side} side of the split{self._long()}")

    def _long(self) -> str:
        if not self._too_long:
            return ""
        length = self._data.sequence_length
        return (
            f"; {self._too_long} are longer than the {self._longest} tokens that method.answer_tokens "
            f"{length - self._longest} leaves of data.sequence_length {length}: raise data.sequence_length, or lower "
            "method.answer_tokens"
        )
