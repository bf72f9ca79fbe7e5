"""Records as tokens: what each says, turned into the conversations that are wanted, rendered many at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finemoe.core.errors import DataError
from finemoe.data.conversations.forms import Kind, Said, read, require_preference
from finemoe.data.conversations.messages import FormError, Message
from finemoe.text.chat import ChatTemplate
from finemoe.text.control import encode_chat, encode_questions_together
from finemoe.text.tokenizer import Tokenizer
from finemoe.text.turns import Turns, encode_all, encode_turns

NOTHING_ASKED = "nothing is asked in it"


@dataclass(frozen=True)
class Item:
    """A record as tokens."""

    said: Said
    segments: tuple[Turns, ...]
    """Two of a pair, the better answer first, which begin with the same prompt; else one."""


@dataclass(frozen=True)
class _Plan:
    """What is to be rendered of a record."""

    said: Said
    conversations: tuple[tuple[Message, ...], ...]
    tools: tuple[dict[str, Any], ...]


def encode_items(
    texts: Sequence[str], want: Kind, tokenizer: Tokenizer, template: ChatTemplate
) -> list[Item | FormError | DataError]:
    """Records, each the JSON of an object, as tokens; an error stands in the place of each that cannot be used."""
    plans: list[_Plan | FormError] = []
    for text in texts:
        try:
            plans.append(_plan(read(record_in(text)), want))
        except FormError as error:
            plans.append(error)
    together = [one for plan in plans if isinstance(plan, _Plan) and not plan.tools for one in plan.conversations]
    asked = iter(encode_questions_together(template, tokenizer, together if want == "prompt" else []))
    turns = iter(encode_all(template, tokenizer, together if want != "prompt" else []))
    found: list[Item | FormError | DataError] = []
    for plan in plans:
        if isinstance(plan, FormError):
            found.append(plan)
            continue
        try:
            if want == "prompt":
                ids = _asked(plan, template, tokenizer) if plan.tools else next(asked)
                if isinstance(ids, DataError):
                    raise ids
                found.append(Item(plan.said, (Turns(tuple(ids), (False,) * len(ids)),)))
                continue
            if plan.tools:
                each: list[Turns | DataError] = [
                    encode_turns(template, tokenizer, one, tools=plan.tools) for one in plan.conversations
                ]
            else:
                each = [next(turns) for _ in plan.conversations]
            found.append(Item(plan.said, _checked(each, want)))
        except (FormError, DataError) as error:
            found.append(error)
    return found


def _asked(plan: _Plan, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    return encode_chat(template, tokenizer, plan.conversations[0], tools=plan.tools)[1]


def record_in(text: str) -> dict[str, Any]:
    """The fields of a record.

    Raises:
        FormError: it is none.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise FormError("it is a text, and not a record with fields: use JSON Lines, JSON, CSV or Parquet") from error
    if not isinstance(record, dict):
        raise FormError(f"it is {type(record).__name__}, and not a record with fields")
    return record


def _plan(said: Said, want: Kind) -> _Plan:
    """What of it is wanted.

    Raises:
        FormError: it cannot be used so.
    """
    pair, conversation = said.pair, said.conversation
    tools = pair.prompt.tools if pair is not None else conversation.tools if conversation is not None else ()
    if want == "pair":
        if pair is None:
            raise FormError(f"it is in the form `{said.form}`, which holds one answer: a pair has `chosen`, `rejected`")
        require_preference(pair)
        prompt = tuple(_context(message) for message in pair.prompt.messages)
        return _Plan(said, ((*prompt, *pair.chosen), (*prompt, *pair.rejected)), tools)
    asked = pair.prompt.messages if pair is not None else conversation.messages if conversation is not None else ()
    if want == "conversation":
        if pair is None and said.kind != "conversation":
            raise FormError(f"it is read as `{said.form}`, and ends with a question and no answer to learn")
        whole = (*asked, *(pair.chosen if pair is not None else ()))
        for number, message in enumerate(whole, 1):
            if message["role"] == "assistant" and message.get("train", True) and not _says_something(message):
                raise FormError(f"message {number} is an answer that says nothing: a model would learn to end at once")
        return _Plan(said, (whole,), tools)
    question = said.question.messages
    if not question:
        raise FormError(NOTHING_ASKED)
    return _Plan(said, (question,), tools)


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _context(message: Message) -> Message:
    """A message that is read and not learnt."""
    return {**message, "train": False} if message["role"] == "assistant" else message


def _checked(each: Sequence[Turns | DataError], want: Kind) -> tuple[Turns, ...]:
    turns: list[Turns] = []
    for one in each:
        if isinstance(one, DataError):
            raise one
        turns.append(one)
    first = [next((n for n, learnt in enumerate(one.trained) if learnt), None) for one in turns]
    if None in first:
        what = "an answer of the pair is empty" if want == "pair" else "nothing in it is to be learnt"
        raise FormError(f"{what}: no message of the assistant, or `train` is false in all")
    if want == "pair" and turns[0].ids[: first[0]] != turns[1].ids[: first[1]]:
        raise FormError("the template writes the prompt otherwise before the better answer than before the worse")
    return tuple(turns)


def asked_in(said: Said) -> str:
    """What is asked, up to the first answer: two items that ask the same are no independent test of each other."""
    conversation = said.pair.prompt if said.pair is not None else said.conversation
    assert conversation is not None
    before: list[Any] = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            break
        before.append([message["role"], message["content"]])
    return json.dumps(before)
