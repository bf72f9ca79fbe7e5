"""One message of a conversation, in OpenAI's or ShareGPT's shape: who says it, and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""`role` and `content`, text; perhaps `reasoning_content`, `tool_calls`, `tool_call_id`, `name`, and `train`, False for
an assistant's message that is context and not to be learnt. As chat templates know them."""

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
_KEPT = ("reasoning_content", "tool_calls", "tool_call_id", "name", "train")


class FormError(Exception):
    """A record that is in no form, or whose form is broken; the message says what is wrong with it."""


def messages_of(turns: Any, where: str) -> tuple[Message, ...]:
    """Messages in OpenAI's or ShareGPT's shape, checked.

    Raises:
        FormError: something else, an unknown role, or content that is no text.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise FormError(f"`{where}` must be a list of messages that is not empty")
    messages = (_message(turn, f"{where}[{number}]") for number, turn in enumerate(turns))
    return tuple(one for one in messages if one["content"] or one["role"] != "system")


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise FormError(f"`{where}` is no message: it must have a role and content")
    said, content = (next((turn[name] for name in names if turn.get(name) is not None), None)
                     for names in (("role", "from"), ("content", "value")))  # fmt: skip
    role = ROLES.get(str(said).lower())
    if role is None:
        raise FormError(f"`{where}` has the role {said!r}; known are {', '.join(dict.fromkeys(ROLES.values()))}")
    message: Message = {"role": role, "content": text_of(content, f"{where}.content")}
    for name in _KEPT:
        if turn.get(name) is not None:
            message[name] = turn[name]
    if turn.get("weight") is not None:  # as OpenAI's own files have it
        if turn["weight"] not in (0, 1):
            raise FormError(f"`{where}.weight` is {turn['weight']!r}: write 0 or 1")
        message["train"] = bool(turn["weight"])
    if "train" in message and not isinstance(message["train"], bool):
        raise FormError(f"`{where}.train` is {message['train']!r}: write true or false")
    if not message["content"] and role not in ("assistant", "system") and "tool_calls" not in message:
        raise FormError(f"`{where}` is empty: a {role} message says something")
    return message


def text_of(content: Any, where: str) -> str:
    """The text of a content: text itself, or parts of which all are text.

    Raises:
        FormError: a picture, a number, or anything else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part if isinstance(part, str) else _part(part, where) for part in content]
        return "".join(texts)
    raise FormError(f"`{where}` is {type(content).__name__}, and must be text")


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise FormError(f"`{where}` has a part of type {kind!r}: only text can be learnt")
