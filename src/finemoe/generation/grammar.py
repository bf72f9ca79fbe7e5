"""Grammars: completions that are JSON of a schema, match a regular expression, or are one of several texts.

The work is llguidance's (extra `serve`). It is given every token as bytes, so that each tokenizer we open will do.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Annotated, Any, final

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from finemoe.core.config import Config
from finemoe.core.errors import ConfigError
from finemoe.text.tokenizer import Tokenizer

_MOST_COMPILED = 64
"""Grammars kept ready for the next request that has them."""


def _as_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (Mapping, bool)) else value


class Grammar(Config):
    """What a completion must be, from its first token to its end. Exactly one of the three."""

    json_schema: Annotated[str | None, BeforeValidator(_as_text)] = None
    """JSON that this JSON schema, as an object or as its text, accepts. White space is free between its parts, unless
    the schema holds `"x-guidance": {"whitespace_flexible": false}`."""
    regex: str | None = None
    """Text of which all matches this regular expression, in the syntax of Rust: without look-around or references."""
    choice: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """One of these texts."""

    @model_validator(mode="after")
    def _check_one(self) -> Grammar:
        given = [name for name in ("json_schema", "regex", "choice") if self.__dict__[name] is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of json_schema, regex and choice, not {' and '.join(given) or 'none'}")
        return self


@final
class Grammars:
    """Grammars over one vocabulary: what each lets through, token by token."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int | None = None, end_ids: Collection[int] = ()) -> None:
        """Make ready for `tokenizer`; takes a third of a second for a vocabulary of 100,000.

        Args:
            tokenizer: of the model.
            vocab_size: ids from here on are never let through, and masks are as long. None: the tokenizer's.
            end_ids: let through where the grammar may end. None given: those at which the tokenizer stops.

        Raises:
            ConfigError: llguidance is not installed, or none of `end_ids` is in the vocabulary.
        """
        if find_spec("llguidance") is None:
            raise ConfigError("a grammar needs the package llguidance: pip install 'finemoe[serve]'")
        import llguidance

        self._library = llguidance
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        size = min(self._vocab_size, tokenizer.vocab_size)
        ends = sorted(i for i in (end_ids or tokenizer.stop_ids) if i < size)
        if not ends:
            raise ConfigError(f"a grammar needs a token that ends the text among the {size} of the vocabulary")
        self._ends = frozenset(ends)
        wrapped = self._library.TokenizerWrapper(_Vocabulary(tokenizer, size, ends))
        self._tokenizer = self._library.LLTokenizer(wrapped, eos_token=ends)
        self._compiled: dict[Grammar, Any] = {}

    def start(self, grammar: Grammar) -> GrammarState:
        """A completion that begins.

        Raises:
            ConfigError: a schema or an expression that is wrong, or that llguidance does not know how to follow.
        """
        if grammar not in self._compiled:
            while len(self._compiled) >= _MOST_COMPILED:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[grammar] = self._compile(grammar)
        return GrammarState(self._compiled[grammar].deep_copy(), self._vocab_size, self._ends)

    def _compile(self, grammar: Grammar) -> Any:
        matcher = self._library.LLMatcher
        if grammar.json_schema is not None:
            _check_json(grammar.json_schema)
            name, source = "json_schema", matcher.grammar_from_json_schema(grammar.json_schema)
        elif grammar.regex is not None:
            name, source = "regex", matcher.grammar_from_regex(grammar.regex)
        else:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in grammar.choice or ())
            name, source = "choice", matcher.grammar_from_lark(f"start: {texts}")
        compiled = matcher(self._tokenizer, source, log_level=0)
        if compiled.is_error():
            raise ConfigError(f"grammar: {name} cannot be followed: {_reason(compiled.get_error())}")
        return compiled


@final
class GrammarState:
    """Where a completion is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, ends: frozenset[int]) -> None:
        """From `Grammars.start`."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends
        self._num_tokens = 0
        self._closed = False  # by a token that ends, of which the matcher is not told: it would not always count it

    @property
    def ended(self) -> bool:
        """Whether nothing but a token that ends may follow, or one has come: the completion is whole."""
        return self._closed or self._matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """Whether the completion would be whole if it ended here."""
        return self._matcher.is_accepting()

    def allowed(self) -> Tensor:
        """[vocab] bool, on the CPU: the tokens that may come next. At least one is True.

        Raises:
            ConfigError: the grammar became too large to follow.
        """
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        if self._closed:
            mask[list(self._ends)] = True
            return mask
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size]).bool()
        mask[: len(known)] = known
        return mask

    def advance(self, token_id: int) -> None:
        """Take a token.

        Raises:
            ValueError: the grammar does not allow it; the state stays as it was.
        """
        # Asked first: a token that is refused would leave the matcher broken for good.
        if self.accepts([token_id]) != 1:
            raise ValueError(f"token {token_id} is not allowed by the grammar after {self._num_tokens} tokens")
        if token_id in self._ends:
            self._closed = True
        else:
            self._matcher.consume_token(token_id)
            self._check()
        self._num_tokens += 1

    def accepts(self, token_ids: Sequence[int]) -> int:
        """How many of these, one behind the other, the grammar would take: what of a draft is worth trying."""
        if self._closed:
            return 0
        last = next((place for place, token in enumerate(token_ids) if token in self._ends), len(token_ids))
        before = list(token_ids[:last])
        count = self._matcher.validate_tokens(before)
        if count < len(before) or last == len(token_ids):
            return count
        self._matcher.consume_tokens(before)
        count += self._matcher.is_accepting()  # the library counts no token that ends
        if before:
            self._matcher.rollback(len(before))
        return count

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens, as if they had never been taken.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= count <= self._num_tokens:
            raise ValueError(f"cannot roll back {count} of {self._num_tokens} tokens")
        taken = count - (count > 0 and self._closed)
        if taken:
            self._matcher.rollback(taken)
            self._check()
        self._closed = self._closed and count == 0
        self._num_tokens -= count

    def copy(self) -> GrammarState:
        """One that goes its own way, for samples of one prompt."""
        twin = GrammarState(self._matcher.deep_copy(), self._vocab_size, self._ends)
        twin._num_tokens, twin._closed = self._num_tokens, self._closed
        return twin

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"grammar: cannot be followed further: {_reason(self._matcher.get_error())}")


@final
class _Vocabulary:
    """The face of a tokenizer that llguidance looks at."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: list[int]) -> None:
        spelt = tokenizer.token_bytes
        # An id without a token spells nothing, and is never let through.
        self.tokens = [spelt.get(token_id, b"") for token_id in range(size)]
        self.special_token_ids = sorted(i for i in {*tokenizer.control_tokens.values(), *ends} if i < size)
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        """Where a grammar leaves no choice of text, the tokens that the tokenizer would take are let through."""
        data = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode_piece(data.decode(errors="replace"), first=False)
        # Some tokenizers put a space before a text, or normalise it, which no grammar allows.
        spelt = b"".join(self.tokens[i] for i in ids if i < len(self.tokens))
        return ids if spelt == data else self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again, up to a byte that no token spells."""
        ids, begin = [], 0
        while begin < len(data):
            ends = range(min(len(data), begin + self._longest_token), begin, -1)
            end = next((end for end in ends if data[begin:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[data[begin:end]])
            begin = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {spelt: i for i, spelt in enumerate(self.tokens) if spelt and i not in special}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._ids), default=1)


def _check_json(schema: str) -> None:
    try:
        found = json.loads(schema)
    except ValueError as error:
        raise ConfigError(f"grammar: json_schema is not JSON: {error}") from error
    if not isinstance(found, (dict, bool)):
        raise ConfigError(f"grammar: json_schema must be an object, not {schema[:40]}")


def _reason(message: str) -> str:
    """The first words of llguidance; behind them it prints all that it knows."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines()]
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[:1]
    return found[0].removeprefix("Parser Error: ")
