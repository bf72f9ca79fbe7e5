"""Conversation: questions to a model and its answers, one after the other, with what holds for its experts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, final

from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.core.errors import ConfigError, DataError
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Event, Request, engine_for
from finemoe.generation.scoring import reach_of
from finemoe.server.constraints import Wish, constrain
from finemoe.server.dialects import THINK

_LEAST_ROOM = 8  # tokens of an answer


@final
class Conversation:
    """A model that one talks to; or, where it was not made to answer, a text that both write in turn."""

    def __init__(
        self, opened: LanguageModel, *, system: str | None = None, sampling: SamplingConfig | None = None
    ) -> None:
        """Begin one.

        Args:
            opened: the model.
            system: the system message, for a model with a chat template.
            sampling: how answers are drawn; the seed of each answer follows from its own.

        Raises:
            ConfigError: a system message for a model that was not made to answer.
        """
        self.opened = opened
        self.sampling = sampling or SamplingConfig(max_new_tokens=512)
        self.wish = Wish()
        """What holds for the experts; exchanged whole."""
        self.messages: list[dict[str, str]] = []
        """As chat templates know them; of a model without one, what was written in turn."""
        self.events: list[Event] = []
        """Of the last answer, with the experts that each token came out of."""
        self.answers = opened.template is not None
        self.thinking = False
        """Whether the last answer began within a thought, which its prompt had opened."""
        self._engine: Engine = engine_for(opened)
        self._tries = 0
        self._answered_under = self.wish
        if system is not None:
            self.system = system

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        """Exchange it, or take it away.

        Raises:
            ConfigError: the model was not made to answer.
        """
        if not self.answers and text is not None:
            raise ConfigError("this model has no chat template, and so no system message: it only goes on with a text")
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def ask(self, text: str) -> Iterator[Event]:
        """Say something; what comes back, token by token. What is read of it so far stays, also where one stops.

        Raises:
            ConfigError: experts that cannot be had, or no room for an answer.
            DataError: a template that fails.
        """
        known = self.messages
        self.messages = [*known, {"role": "user", "content": text}]
        self._tries = 0
        yield from self._answer(known)

    def retry(self) -> Iterator[Event]:
        """The last answer again, drawn anew; greedy ones come out the same.

        After a change of what holds for the experts it is drawn with the same seed: what differs is the experts' doing.

        Raises:
            ConfigError: there is none, and as in `ask`.
        """
        known = self.messages
        asked = known[:-1] if known and known[-1]["role"] == "assistant" else known
        if not asked or asked[-1]["role"] != "user":
            raise ConfigError("there is no answer yet: say something first")
        self.messages = list(asked)
        self._tries += self.wish == self._answered_under
        yield from self._answer(known)

    def _answer(self, known: list[dict[str, str]]) -> Iterator[Event]:
        """`known`: the conversation, should there be no answer."""
        said: list[str] = []
        asked = len(self.messages)
        try:
            number = self._engine.submit(self._request())
        except BaseException:  # an interrupt, too: what was said can be said again, and nothing is lost
            self.messages = known
            raise
        self.events, self._answered_under = [], self.wish
        try:
            for event in self._engine.events():
                self.events.append(event)
                said.append(event.text)
                yield event
        finally:
            self._engine.cancel(number)
            self.messages[asked:] = [{"role": "assistant", "content": "".join(said)}]

    def _request(self) -> Request:
        if self.answers:
            text, ids = self.opened.encode_chat(self.messages)
            self.thinking = text.rstrip().endswith(THINK)
        else:
            ids = self.opened.encode(_readable("".join(message["content"] for message in self.messages)))
        room = reach_of(self.opened) - len(ids)
        if room < _LEAST_ROOM:
            reach = reach_of(self.opened)
            raise ConfigError(f"the conversation has {len(ids):,} tokens, and the model reads {reach:,}: begin anew")
        sampling = self.sampling.model_copy(
            update={
                "max_new_tokens": min(self.sampling.max_new_tokens, room),
                "min_new_tokens": min(self.sampling.min_new_tokens, room),
                "seed": self.sampling.seed + self._tries,
            }
        )
        constraint = constrain(self.opened.model, self.wish)
        return Request(
            tuple(ids) or (self.opened.first_id,),
            sampling,
            constraint=constraint,
            continues=not self.answers,
            routes=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        wish: Mapping[str, Any] = vars(self.wish)
        tables = {name: {str(k): sorted(v) for k, v in wish[name].items()} for name in ("disabled", "forced")}
        return {
            "model": str(self.opened.source),
            "messages": self.messages,
            "sampling": self.sampling.model_dump(mode="json"),
            "experts": {**wish, **tables},
        }


def _readable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not valid Unicode: {error.reason}") from error
    return text


def chat(
    model: str | os.PathLike[str], *, system: str | None = None, weights: Any = "auto", **sampling: Any
) -> Conversation:
    """Open `model` to talk to; `sampling` as in `finemoe.generate`.

    Raises:
        FinemoeError: nothing that can be opened, or sampling that cannot be.
    """
    from finemoe.core.config import parse

    drawn = parse(SamplingConfig, {"max_new_tokens": 512, **sampling}, "chat")
    return Conversation(open_language_model(model, weights), system=system, sampling=drawn)
