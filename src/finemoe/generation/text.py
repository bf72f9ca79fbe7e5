"""TextStream: text as its tokens come, with strings that stop it. What it has given out is never taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from finemoe.core.errors import ConfigError
from finemoe.text.tokenizer import StreamDecoder


@final
class TextStream:
    """The text of one completion: whole characters, and nothing that a stop string may still need.

    The stop that is complete first ends the text; of several that are complete with the same character, the one that
    began first does. Where tokens begin and end makes no difference, and a stop may begin in one and end in another.
    """

    def __init__(
        self,
        decoder: StreamDecoder,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Begin a text.

        Args:
            decoder: fresh, from `Tokenizer.decoder`.
            stops: each ends the text before its first character.
            include_stop: the text ends behind the stop instead.
            min_tokens: a stop that is complete within so many first tokens is text like any other, as in vLLM.

        Raises:
            ConfigError: an empty stop.
        """
        if "" in stops:
            raise ConfigError("stop: an empty string would stop every text before it begins; leave it out")
        self._decoder = decoder
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._given: list[str] = []
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that was met."""
        return self._stopped

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._given)

    def push(self, token_id: int) -> str:
        """What `token_id` makes certain; empty for all that comes behind a stop.

        Raises:
            DataError: for an id outside the vocabulary.
        """
        if self._stopped is not None:
            return ""
        self._num_tokens += 1
        return self._take(self._decoder.push(token_id), self._num_tokens > self._min_tokens)

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self._stopped is not None:
            return ""
        certain = self._take(self._decoder.finish(), self._num_tokens >= self._min_tokens)
        if self._stopped is None:
            self._given.append(self._held)
            certain, self._held = certain + self._held, ""
        return certain

    def _take(self, piece: str, may_stop: bool) -> str:
        text = self._held + piece
        met = self._first_stop(text, len(self._held)) if may_stop else None
        if met is None:
            certain = len(text) - self._uncertain(text)
            self._held = text[certain:]
        else:
            end, begin, self._stopped = met
            certain, self._held = (end if self._include_stop else begin), ""
        self._given.append(text[:certain])
        return text[:certain]

    def _first_stop(self, text: str, known: int) -> tuple[int, int, str] | None:
        """End and begin of the stop that ends first, behind place `known`."""
        found = []
        for stop in self._stops:
            begin = text.find(stop, max(0, known - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        return min(found, default=None)

    def _uncertain(self, text: str) -> int:
        """Characters at the end of `text` that may begin a stop."""
        longest = 0
        for stop in self._stops:
            lengths = range(min(len(stop) - 1, len(text)), longest, -1)
            longest = next((length for length in lengths if text.endswith(stop[:length])), longest)
        return longest
