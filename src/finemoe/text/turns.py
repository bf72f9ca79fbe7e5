"""A whole conversation as tokens, and which of them the assistant wrote: what a model is taught to write.

A template may say so itself (`{% generation %}`). Of any other it is found by rendering the conversation up to each
answer, and with it: what comes in between is the answer, where the template is proved to leave alone what it wrote
before. A template that is neither is refused: nothing is trained on by guessing.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from finemoe.core.errors import DataError
from finemoe.text.chat import ChatTemplate, Written
from finemoe.text.control import encode_marked, guard
from finemoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turns:
    """A conversation as a model reads it."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Of each token: the assistant wrote it, up to the one that ends its turn, and it is to be learnt."""

    def spans(self) -> list[tuple[int, int]]:
        """First and last + 1 of each run of trained tokens."""
        edges = [0, *(n for n in range(1, len(self.ids)) if self.trained[n] != self.trained[n - 1]), len(self.ids)]
        return [(a, b) for a, b in pairwise(edges) if a < b and self.trained[a]]


@dataclass(frozen=True)
class Asked:
    """What an encoding wants rendered, so that many of them can be rendered together."""

    messages: Sequence[Mapping[str, Any]]
    beginnings: tuple[tuple[int, bool], ...] = ()
    """Of how many messages, and whether with what makes the model answer."""
    marks: tuple[str, ...] = ()


Encoding = Generator[Asked, Written, Turns]
"""Asks for a text, and ends with the conversation as tokens."""
_MOST_READ = 4_000_000
"""Messages that are rendered, those of all beginnings together, to find the answers of one conversation."""


def encode_turns(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> Turns:
    """Tokens of `messages`, all of them, as the template writes them; answers with `train` False are context.

    What stands before an answer is encoded as it is when the model is asked, so that the answer begins with the very
    token that it would have to write. Control tokens that somebody else's message spells out are text.

    Raises:
        DataError: a template that fails, that does not say what the assistant wrote and changes what came before, or
            whose answers end with nothing that stops.
    """
    tools = list(tools) if tools else None
    encoding = _encoding(template, tokenizer, messages, tools is not None)
    text: Written | None = None
    while True:
        try:
            asked = next(encoding) if text is None else encoding.send(text)
        except StopIteration as end:
            turns: Turns = end.value
            return turns
        (text,) = template.render_beginnings([asked.messages], [asked.beginnings], tools, asked.marks, **variables)


def encode_all(
    template: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[Turns | DataError]:
    """`encode_turns` of many conversations without tools, rendered together; an error stands in the place of each
    that cannot be encoded.
    """
    found: dict[int, Turns | DataError] = {}
    running = {n: _encoding(template, tokenizer, messages, False) for n, messages in enumerate(conversations)}
    texts: dict[int, Written | DataError] = {}
    while running:
        wanted: dict[int, Asked] = {}
        for number, encoding in list(running.items()):
            try:
                given = texts.get(number)
                if isinstance(given, DataError):
                    raise given
                wanted[number] = next(encoding) if given is None else encoding.send(given)
            except StopIteration as end:
                found[number] = end.value
                del running[number]
            except DataError as error:
                found[number] = error
                del running[number]
        texts = _together(template, wanted)
    return [found[number] for number in range(len(conversations))]


def _together(template: ChatTemplate, wanted: Mapping[int, Asked]) -> dict[int, Written | DataError]:
    """What every encoding asked for: requests of one kind in one rendering, or one by one where one of them fails."""
    texts: dict[int, Written | DataError] = {}
    kinds: dict[tuple[str, ...], list[int]] = {}
    for number, asked in wanted.items():
        kinds.setdefault(asked.marks, []).append(number)
    for marks, numbers in kinds.items():
        try:
            found = template.render_beginnings(
                [wanted[number].messages for number in numbers],
                [wanted[number].beginnings for number in numbers],
                marks=marks,
            )
        except DataError as error:
            if len(numbers) == 1:
                texts[numbers[0]] = error
            else:
                for number in numbers:
                    texts |= _together(template, {number: wanted[number]})
            continue
        texts |= dict(zip(numbers, found, strict=True))
    return texts


def _encoding(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], has_tools: bool
) -> Encoding:
    _require_words_for(template, messages, has_tools)
    kept, marks = guard(tokenizer, [_plain(message) for message in messages], 3)
    wanted = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    by_marks = template.says_who_wrote(has_tools)
    pieces = yield from _by_marks(template, kept, marks) if by_marks else _by_prefixes(template, kept)
    answers = sum(written for written, _ in pieces)
    if answers != len(wanted):
        raise DataError(
            f"{template.origin}: marks {answers} answers in a conversation with {len(wanted)}: a template must put "
            "{% generation %} around each message of the assistant, and around nothing else"
        )
    ids: list[int] = []
    trained: list[bool] = []
    learn = iter(wanted)
    for written, text in pieces:
        own = encode_marked(tokenizer, text, marks[0], first=not ids)
        upto = _end_of_turn(own, tokenizer, template, text) if written and next(learn) else 0
        ids += own
        trained += [n < upto for n in range(len(own))]
    return Turns(tuple(ids), tuple(trained))


def _require_words_for(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], has_tools: bool) -> None:
    """Refuse what the template would leave out without a word: a model would learn to say nothing in its place.

    Raises:
        DataError: there are tools, calls of them or thoughts, and it writes none.
    """
    called, thought = (any(message.get(name) for message in messages) for name in ("tool_calls", "reasoning_content"))
    for word, there in (("tools", has_tools), ("tool_calls", called), ("reasoning_content", thought)):
        if there and not template.mentions(word, has_tools):
            raise DataError(
                f"{template.origin}: writes no `{word}`, which the conversation has: use a model whose template does, "
                "or leave them out of the data"
            )


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "train"}


def _end_of_turn(ids: Sequence[int], tokenizer: Tokenizer, template: ChatTemplate, text: str) -> int:
    """How many tokens of an answer are learnt: up to the first that stops, and that one too."""
    stops = {*tokenizer.stop_ids, tokenizer.end_of_text_id}
    end = next((n + 1 for n, token in enumerate(ids) if token in stops), None)
    if end is None:
        raise DataError(
            f"{template.origin}: an answer ends with {text[-20:]!r}, which holds no token that stops "
            f"({', '.join(map(str, sorted(stop for stop in stops if stop is not None)))}), so that a model would never "
            "learn to end: name the end of a turn as eos_token_id in generation_config.json"
        )
    return end


def _by_marks(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    marks: Sequence[str],
) -> Generator[Asked, Written, list[tuple[bool, str]]]:
    """Pieces of the text, and whether the assistant wrote them, as the template says."""
    begin, end = marks[1:3]
    written_so = yield Asked(messages, marks=(begin, end))
    pieces: list[tuple[bool, str]] = []
    before, *rest = written_so.text.split(begin)
    pieces.append((False, before))
    for part in rest:
        written, closed, after = part.partition(end)
        if not closed or end in after:
            raise DataError(f"{template.origin}: {{% generation %}} within {{% generation %}} says nothing clear")
        pieces += [(True, written), (False, after)]
    return [piece for piece in pieces if piece[0] or piece[1]]


def _by_prefixes(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
) -> Generator[Asked, Written, list[tuple[bool, str]]]:
    """The same, from what is added to the text by each answer.

    The text begins with what is written up to the answer, and with what is written up to its end: so the first of them
    is the beginning of the second where it is no longer.
    """
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    reads = sum(2 * n + 1 for n in answers)
    if reads > _MOST_READ:
        raise DataError(
            f"{template.origin}: a conversation has {len(messages):,} messages, {len(answers):,} of them answers, and "
            "the template does not say where they are: each is found by rendering what stands before it, which comes "
            f"to {reads:,} messages, and {_MOST_READ:,} are the most: put {{% generation %}} and {{% endgeneration %}} "
            "around answers in the template, or divide the conversation"
        )
    wanted = tuple(one for n in answers for one in ((n, True), (n + 1, False)))
    whole = yield Asked(messages, wanted)
    text, lengths = whole.text, whole.lengths
    pieces, place = [], 0
    for number, asked, answered in zip(answers, lengths[0::2], lengths[1::2], strict=True):
        if not place <= asked <= answered:  # and -1: the text does not begin so
            raise DataError(
                f"{template.origin}: writes message {number + 1} otherwise when it is asked for, or when more follows, "
                "so that what the assistant wrote cannot be told: put {% generation %} and {% endgeneration %} around "
                "it in the template, or end conversations with their first answer"
            )
        pieces += [(False, text[place:asked]), (True, text[asked:answered])]
        place = answered
    pieces.append((False, text[place:]))
    return [piece for piece in pieces if piece[0] or piece[1]]
