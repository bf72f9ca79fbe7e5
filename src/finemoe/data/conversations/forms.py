"""Records in the forms that people have: which form one is in, and the conversation, pair or prompt that it says.

Forms are a table: a new one is a function from a record to what it says, None where the record is in another, and a
line in FORMS. A record in no form, or with something wrong in it, is named with the fields that it has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from finemoe.data.conversations.messages import FormError, Message, messages_of, text_of
from finemoe.data.documents.fields import shown

Kind = Literal["conversation", "pair", "prompt"]

NO_FORM = "it is in no form of a conversation that is known"


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, which end with what the assistant said; of a prompt, with what it is to answer."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of what could be called."""


@dataclass(frozen=True)
class Pair:
    """Two answers to the same conversation, of which one is better."""

    prompt: Conversation
    chosen: tuple[Message, ...]
    """What the better answer adds; one message as a rule."""
    rejected: tuple[Message, ...]
    margin: float | None = None
    """By how much, where the record has scores."""


@dataclass(frozen=True)
class Said:
    """What a record says."""

    form: str
    """Its name in FORMS."""
    conversation: Conversation | None = None
    pair: Pair | None = None

    @property
    def kind(self) -> Kind:
        """What it can be used for."""
        if self.pair is not None:
            return "pair"
        assert self.conversation is not None
        return "conversation" if self.conversation.messages[-1]["role"] == "assistant" else "prompt"

    @property
    def question(self) -> Conversation:
        """What is asked: all messages up to the last answer, which are none where nothing is."""
        whole = self.pair.prompt if self.pair is not None else self.conversation
        assert whole is not None
        messages = whole.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return Conversation(messages, whole.tools)


def read(record: Mapping[str, Any]) -> Said:
    """What `record` says, in whatever form.

    Raises:
        FormError: it is in none of FORMS, or broken.
    """
    for name, form in FORMS.items():
        found = form(record)
        if found is not None:
            pair = found if isinstance(found, Pair) else None
            return Said(name, None if isinstance(found, Pair) else found, pair)
    raise FormError(f"{NO_FORM}; its fields are {shown(record)}")


def known_forms() -> str:
    """All of FORMS with their fields, as an error ends where a record was in none of them."""
    return "Known are " + "; ".join(f"{name}: {said}" for name, said in FIELDS.items())


def _ends_with_assistant(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    if not messages or messages[-1]["role"] != "assistant":
        raise FormError(f"`{where}` must end with what the assistant said")
    return messages


def _tools(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or ()
    if isinstance(tools, str):  # as datasets of the hub have them, whose tables know no open schema
        try:
            tools = json.loads(tools) or ()
        except (ValueError, RecursionError) as error:
            raise FormError(
                f"`tools` must be a list of JSON schemas, and is a text that is no JSON: {error}"
            ) from error
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not all(isinstance(one, Mapping) for one in tools):
        raise FormError("`tools` must be a list of JSON schemas")
    return tuple(dict(one) for one in tools)


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _has(record: Mapping[str, Any], *names: str) -> bool:
    return all(record.get(name) is not None for name in names)


# ---- forms ----------------------------------------------------------------------------------------------------------


def _scored(record: Mapping[str, Any]) -> Pair | None:
    """Several answers with scores each: the best and the worst of them."""
    answers = record.get("completions", record.get("responses"))
    asked, record = _question(record, ("prompt", "instruction", "question"))
    if asked is None or not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        return None
    if not all(isinstance(one, Mapping) for one in answers):
        return None
    scored = [(_score(one), text_of(one.get("response", one.get("content", one.get("text"))), "completions"))
              for one in answers]  # fmt: skip
    known = [(score, text) for score, text in scored if score is not None and text]
    if len(known) < 2:
        raise FormError("`completions` must hold two answers with a score each, such as `overall_score`")
    best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise FormError(f"all of `completions` have the score {best[0]:g}: none is better")
    chosen, rejected = ((_said("assistant", text),) for _, text in (best, worst))
    return Pair(_prompt_of(asked, record), chosen, rejected, best[0] - worst[0])


def _score(answer: Mapping[str, Any]) -> float | None:
    for name in ("overall_score", "score", "rating", "reward", "fine-grained_score"):
        value = _number(answer.get(name))
        if value is not None:
            return value
    return None


def _number(value: Any) -> float | None:
    """A finite number, or a text that is one, as "4.5"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _pairs(record: Mapping[str, Any]) -> Pair | None:
    """Two answers, beside a prompt or each behind the whole conversation."""
    better = record.get("chosen", record.get("response"))
    if better is None or record.get("rejected") is None:
        return None
    scores = [_number(record.get(f"{name}_score", record.get(f"score_{name}"))) for name in ("chosen", "rejected")]
    margin = None if scores[0] is None or scores[1] is None else scores[0] - scores[1]
    both = [better, record["rejected"]]
    asked, record = _question(record, ("prompt", "instruction", "question"))
    if asked is not None:
        prompt = _with_system(_prompt_of(asked, record), {"chosen": both[0], "rejected": both[1]})
        chosen, rejected = (_answer(one, prompt, name) for one, name in zip(both, ("chosen", "rejected"), strict=True))
        return _checked(Pair(prompt, chosen, rejected, margin))
    if any(isinstance(one, str) for one in both):
        raise FormError("`chosen` and `rejected` are texts, and there is no `prompt` that they answer")
    whole = [messages_of(one, name) for one, name in zip(both, ("chosen", "rejected"), strict=True)]
    same = 0
    while same < min(map(len, whole)) and whole[0][same] == whole[1][same]:
        same += 1
    prompt = Conversation(whole[0][:same], _tools(record))
    return _checked(Pair(prompt, whole[0][same:], whole[1][same:], margin))


def _answer(value: Any, prompt: Conversation, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (_said("assistant", value),)
    messages = messages_of(value, where)
    first = next((n for n, one in enumerate(messages) if one["role"] in ("system", "user")), None)
    if first is None or messages[0]["role"] == "assistant":
        return messages
    # It repeats what is asked, perhaps without the system message that stands beside, or with blanks around it.
    for asked in (prompt.messages, tuple(one for one in prompt.messages if one["role"] != "system")):
        if list(map(_bare, messages[: len(asked)])) == list(map(_bare, asked)):
            return messages[len(asked) :]
    raise FormError(f"`{where}` begins with another {messages[first]['role']} message than the prompt")


def _with_system(prompt: Conversation, answers: Mapping[str, Any]) -> Conversation:
    """The prompt behind the system message that stands before it where answers repeat it, if it has none of its own.

    Raises:
        FormError: it is another one in each, or stands in one alone.
    """
    if not prompt.messages or prompt.messages[0]["role"] == "system":
        return prompt
    found: list[tuple[Message, ...]] = []
    for where, value in answers.items():
        messages = () if isinstance(value, str) else messages_of(value, where)
        systems = tuple(takewhile(lambda one: one["role"] == "system", messages))
        repeated = messages[len(systems) : len(systems) + len(prompt.messages)]
        if list(map(_bare, repeated)) == list(map(_bare, prompt.messages)):
            found.append(systems)
    if len({tuple(map(_bare, one)) for one in found}) > 1:
        raise FormError(
            f"{' and '.join(f'`{where}`' for where in answers)} repeat the prompt behind different system messages, so "
            "that it cannot be told which the prompt has: write it as `system`, or in `prompt` as messages"
        )
    return Conversation((*found[0], *prompt.messages), prompt.tools) if found else prompt


def _bare(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def _checked(pair: Pair) -> Pair:
    if not pair.prompt.messages:
        raise FormError("`chosen` and `rejected` have no message in common that they answer")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        _ends_with_assistant(answer, name)
    return pair


def require_preference(pair: Pair) -> None:
    """Refuse a pair of which neither answer is better; who wants the prompt or the better one alone need not care.

    Raises:
        FormError: an answer is empty, or both are the same.
    """
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not any(one["content"] or one.get("tool_calls") for one in answer):
            raise FormError(f"`{name}` is empty")
    if pair.chosen == pair.rejected:
        raise FormError("`chosen` and `rejected` are the same: neither is better")


def _question(record: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
    """What is asked, under the first of `names` that has something, and the record with what stands beside it.

    Of an Alpaca record with an empty instruction it is the input.
    """
    asked = next((record[name] for name in names if record.get(name)), None)
    instruction, given = record.get("instruction"), record.get("input")
    blank = isinstance(instruction, str) and not instruction.strip() and asked in (None, instruction)
    if blank and isinstance(given, str) and given.strip():
        return given, {**record, "input": None}
    return asked, record


def _prompt_of(asked: Any, record: Mapping[str, Any]) -> Conversation:
    """What is asked, as text or messages, with a system message beside it."""
    messages = (_said("user", asked),) if isinstance(asked, str) else messages_of(asked, "prompt")
    more = record.get("input") or record.get("context")
    if isinstance(asked, str) and isinstance(more, str) and more.strip():
        messages = (_said("user", f"{asked}\n\n{more}"),)
    system = record.get("system") or record.get("system_prompt")
    if isinstance(system, str) and messages[0]["role"] != "system":
        messages = (_said("system", system), *messages)
    return Conversation(messages, _tools(record))


def _turns(name: str) -> Callable[[Mapping[str, Any]], Conversation | None]:
    """Messages under one name."""

    def form(record: Mapping[str, Any]) -> Conversation | None:
        if record.get(name) is None:
            return None
        messages = messages_of(record[name], name)
        system = record.get("system") or record.get("system_prompt")
        if isinstance(system, str) and messages[0]["role"] != "system":
            messages = (_said("system", system), *messages)
        return Conversation(messages, _tools(record))

    return form


def _completed(record: Mapping[str, Any]) -> Conversation | None:
    """A prompt and what completes it, as texts or messages."""
    if not _has(record, "prompt", "completion"):
        return None
    prompt = _with_system(_prompt_of(record["prompt"], record), {"completion": record["completion"]})
    answer = _ends_with_assistant(_answer(record["completion"], prompt, "completion"), "completion")
    return Conversation((*prompt.messages, *answer), prompt.tools)


def _instructed(record: Mapping[str, Any]) -> Conversation | None:
    """Alpaca's form and its kin: an instruction, perhaps with an input, and the answer under one of several names."""
    asked, record = _question(record, ("instruction", "question", "query", "prompt"))
    answer = next((record[name] for name in ("output", "response", "answer", "answers") if record.get(name)), None)
    if not isinstance(asked, str) or not isinstance(answer, str):
        return None
    prompt = _prompt_of(asked, record)
    history = record.get("history") or ()
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise FormError("`history` must be a list of questions and answers")
    past: list[Message] = []
    for number, turn in enumerate(history):
        if not isinstance(turn, Sequence) or len(turn) != 2:
            raise FormError(f"`history[{number}]` must be a question and its answer")
        past += [_said("user", text_of(turn[0], "history")), _said("assistant", text_of(turn[1], "history"))]
    system = [one for one in prompt.messages if one["role"] == "system"]
    rest = [one for one in prompt.messages if one["role"] != "system"]
    return Conversation((*system, *past, *rest, _said("assistant", answer)), prompt.tools)


def _asked(record: Mapping[str, Any]) -> Conversation | None:
    """Only what is asked."""
    asked, record = _question(record, ("prompt", "question", "instruction", "query"))
    return None if asked is None else _prompt_of(asked, record)


FORMS: dict[str, Callable[[Mapping[str, Any]], Conversation | Pair | None]] = {
    "pairs": _pairs,
    "scored answers": _scored,
    "messages": _turns("messages"),
    "ShareGPT": _turns("conversations"),
    "conversation": _turns("conversation"),
    "prompt and completion": _completed,
    "instruction and output": _instructed,
    "prompts": _asked,
}
"""In the order in which they are tried: what says more comes first."""
FIELDS: Mapping[str, str] = {
    "messages": "`messages` of role and content",
    "ShareGPT": "`conversations` of from and value",
    "prompt and completion": "`prompt`, `completion`",
    "instruction and output": "`instruction`, perhaps `input`, and `output`",
    "pairs": "`prompt`, `chosen`, `rejected`",
    "scored answers": "`prompt`, `completions` with a score each",
    "prompts": "`prompt` alone",
}
