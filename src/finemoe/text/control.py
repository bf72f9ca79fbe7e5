"""Control tokens: those that begin a text, end a turn, open a thought or a tool call; and the texts that spell them.

The one rule: a text never turns into control tokens unless it is asked to. What counts is what a token is for, and not
the flag `special` of tokenizer.json alone: DeepSeek, Qwen and GLM have roles, thoughts, tools and fill-in-the-middle
marks among their added tokens without it. Added words, such as a run of blanks, are tokens in every text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from finemoe.core.errors import DataError
from finemoe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from finemoe.text.chat import ChatTemplate

_ROOM = range(0xE000, 0xF900)  # private use: no template and hardly a message has them


def spelt_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The control tokens whose spelling stands in `text`: those that it would become, were it asked to; each once."""
    if not next(spellings(tokenizer, text), None):
        return []
    names = {token_id: name for name, token_id in tokenizer.control_tokens.items()}
    return list(dict.fromkeys(names[i] for i in tokenizer.encode_template(text) if i in names))


def spellings(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Names of control tokens that stand in `text`, found by looking: in a moment, for a corpus of them."""
    for opening, names in tokenizer.control_openings.items():
        if opening in text:
            yield from (name for name in names if name in text)


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    special: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> tuple[str, list[int]]:
    """What `template` makes of `messages`, up to where the model answers: the text and its ids.

    `tools` and `variables` as in `ChatTemplate.render`.

    The template's own control tokens are tokens. Those that a message spells out are text, so that nobody opens a turn
    from within one; unless `special`. What the assistant said is the model's own, and stays as it was.

    Raises:
        DataError: a malformed message, or a template that fails.
    """
    if special:
        text = template.render(messages, add_generation_prompt=True, tools=tools, **variables)
        return text, tokenizer.encode_template(text)
    kept, (mark,) = guard(tokenizer, messages, 1)
    text = template.render(kept, add_generation_prompt=True, tools=tools, **variables)
    return _unmarked(text, mark), encode_marked(tokenizer, text, mark)


def encode_questions_together(
    template: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[list[int] | DataError]:
    """Ids of `encode_chat` for each of them, rendered together; an error stands in the place of each that cannot be."""
    guarded = [guard(tokenizer, messages, 1) for messages in conversations]
    try:
        texts = template.render_all([kept for kept, _ in guarded], add_generation_prompt=True)
    except DataError as error:
        if len(conversations) == 1:
            return [error]
        return [one for each in conversations for one in encode_questions_together(template, tokenizer, [each])]
    return [encode_marked(tokenizer, text, mark) for text, (_, (mark,)) in zip(texts, guarded, strict=True)]


def guard(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], count: int
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """`messages` with a character inside every control token that somebody but the assistant spells out.

    Returns them, and `count` characters that stand in none of them, of which the first is that one.
    """
    marks = unused_characters(messages, count)
    return [_guarded(message, tokenizer, marks[0]) for message in messages], marks


def encode_marked(tokenizer: Tokenizer, text: str, mark: str, *, first: bool = True) -> list[int]:
    """Ids of what a template made of guarded messages, or of a piece of it; `first`: it begins the text."""
    text = text.replace(json_escape(mark), mark)
    if mark not in text and first:
        return tokenizer.encode_template(text)
    return _encode_guarded(tokenizer, text, mark, first)


def _unmarked(text: str, mark: str) -> str:
    return text.replace(json_escape(mark), mark).replace(mark, "")


def json_escape(char: str) -> str:
    """`char` as a template's `tojson` may write it."""
    return f"\\u{ord(char):04x}"


def unused_characters(messages: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """So many characters that stand in no message."""
    words = repr(messages)
    free = (chr(code) for code in _ROOM if chr(code) not in words and json_escape(chr(code)) not in words)
    return list(islice(free, count))


def _guarded(value: Any, tokenizer: Tokenizer, mark: str) -> Any:
    """`value` with `mark` inside every spelling of a control token; what the assistant said as it is."""
    if isinstance(value, Mapping):
        if value.get("role") == "assistant":
            return value
        return {key: _guarded(inner, tokenizer, mark) for key, inner in value.items()}
    if isinstance(value, list):
        return [_guarded(inner, tokenizer, mark) for inner in value]
    if not isinstance(value, str) or not spelt_in(tokenizer, value):
        return value
    first = "".join({name[0] for name in tokenizer.control_tokens})
    return re.sub(f"([{re.escape(first)}])", rf"\1{mark}", value)


def _encode_guarded(tokenizer: Tokenizer, text: str, mark: str, first: bool = True) -> list[int]:
    """Ids of a rendered text: control tokens where no `mark` breaks their spelling, all else as text."""
    ids: list[int] = []
    start = 0
    for token_id, (begin, end) in tokenizer.recognised(text):
        ids += tokenizer.encode_piece(text[start:begin].replace(mark, ""), first=first and start == 0)
        ids.append(token_id)
        start = end
    return ids + tokenizer.encode_piece(text[start:].replace(mark, ""), first=first and start == 0)
