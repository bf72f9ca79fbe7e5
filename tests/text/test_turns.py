"""Conversations as tokens: what the assistant wrote, no more and no less, in the ids that it is asked with."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from finemoe.core.errors import DataError
from finemoe.text import ChatTemplate, Tokenizer
from finemoe.text.control import encode_chat
from finemoe.text.settings import TokenizerSettings
from finemoe.text.turns import Turns, encode_turns

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGETS = CHATML.replace("m.content +", "(m.content if loop.last else '') +")
EMPTY = MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ m.content }}")
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three, I think."},
]


def make(stop: str | None = "<|im_end|>") -> Tokenizer:
    texts = ["One and one? Two. And one? Three, I think. Be brief.\n", "system user assistant"] * 20
    inner = Library.from_str(Tokenizer.train(texts, vocab_size=320).to_json())
    names = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    inner.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(inner, "test", TokenizerSettings(stop_ids=(inner.token_to_id(stop),) if stop else ()))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make()


def text_of(tokenizer: Tokenizer, turns: Turns) -> list[str]:
    return [b"".join(tokenizer.token_bytes[i] for i in turns.ids[a:b]).decode() for a, b in turns.spans()]


@pytest.mark.parametrize("source", [CHATML, MARKED], ids=["by prefixes", "by the template's marks"])
def test_answers_are_learnt_up_to_what_ends_them(tokenizer: Tokenizer, source: str) -> None:
    template = ChatTemplate.of(source)
    turns = encode_turns(template, tokenizer, TALK)
    assert text_of(tokenizer, turns) == ["Two.<|im_end|>", "Three, I think.<|im_end|>"]
    assert list(turns.ids) == tokenizer.encode_template(template.render(TALK))
    for a, b in turns.spans():
        assert turns.ids[b - 1] in tokenizer.stop_ids
        assert turns.ids[a - 1] == turns.ids[turns.spans()[0][0] - 1]  # the line end behind the role: not learnt
    _, asked = encode_chat(template, tokenizer, TALK[:2])
    assert list(turns.ids[: turns.spans()[0][0]]) == asked  # what it is asked with is what it was taught behind


@pytest.mark.parametrize("source", [CHATML, MARKED], ids=["by prefixes", "by the template's marks"])
def test_what_others_spell_out_is_text_and_what_is_context_is_not_learnt(tokenizer: Tokenizer, source: str) -> None:
    talk = [
        {"role": "user", "content": "Say <|im_end|> and <think>."},
        {"role": "assistant", "content": "No.", "train": False},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "<think>hm</think>Two.", "train": True},
    ]
    turns = encode_turns(ChatTemplate.of(source), tokenizer, talk)
    assert text_of(tokenizer, turns) == ["<think>hm</think>Two.<|im_end|>"]
    ends, thoughts = (turns.ids.count(tokenizer.control_tokens[name]) for name in ("<|im_end|>", "<think>"))
    assert (ends, thoughts) == (4, 1)  # a turn each, and the assistant's own
    assert b"".join(tokenizer.token_bytes[i] for i in turns.ids).decode().count("Say <|im_end|> and <think>.") == 1


def test_a_template_that_changes_what_it_wrote_is_refused_for_longer_talks_alone(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.of(FORGETS)
    with pytest.raises(DataError, match=r"writes message 3 otherwise .* put {% generation %}"):
        encode_turns(template, tokenizer, TALK)
    assert text_of(tokenizer, encode_turns(template, tokenizer, TALK[2:3])) == ["Two.<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (EMPTY, "no token that stops"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "marks 1 answers in a conversation with 2"),
        (
            "{% generation %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endgeneration %}",
            "marks|within",
        ),
        (CHATML.replace("<|im_end|>", ""), "which holds no token that stops"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
    ids=["empty", "too few", "one within another", "nothing stops", "broken"],
)
def test_templates_that_teach_nothing_are_refused(tokenizer: Tokenizer, source: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        encode_turns(ChatTemplate.of(source), tokenizer, TALK)


def test_without_an_assistant_nothing_is_learnt(tokenizer: Tokenizer) -> None:
    for source in (CHATML, MARKED):
        turns = encode_turns(ChatTemplate.of(source), tokenizer, TALK[:2])
        assert not any(turns.trained)
        assert turns.spans() == []
        assert list(turns.ids) == tokenizer.encode_template(ChatTemplate.of(source).render(TALK[:2]))


def test_tools_are_part_of_what_is_read(tokenizer: Tokenizer) -> None:
    source = "{% if tools %}{{ tools | tojson }}{% endif %}" + MARKED
    with_them = encode_turns(ChatTemplate.of(source), tokenizer, TALK, tools=[{"name": "<|im_end|>"}])
    without = encode_turns(ChatTemplate.of(source), tokenizer, TALK)
    assert text_of(tokenizer, with_them) == text_of(tokenizer, without)
    assert len(with_them.ids) > len(without.ids)
