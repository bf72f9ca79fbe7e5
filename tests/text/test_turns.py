"""Conversations as tokens: what the assistant wrote, no more and no less, in the ids that it is asked with."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from finemoe.core.errors import DataError
from finemoe.text import ChatTemplate, Tokenizer, chat, turns
from finemoe.text.control import encode_chat
from finemoe.text.settings import TokenizerSettings
from finemoe.text.turns import Turns, encode_all, encode_turns

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


def long_talk(turns: int, words: int = 1) -> list[dict[str, Any]]:
    """A question, an answer, and so on."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": f"{n} says" + " more" * words} for n in range(turns)]


def test_a_thousand_turns_without_marks(tokenizer: Tokenizer) -> None:
    talk = long_talk(1000)
    found = encode_turns(ChatTemplate.of(CHATML), tokenizer, talk)
    assert text_of(tokenizer, found) == [one["content"] + "<|im_end|>" for one in talk[1::2]]


def test_long_turns_take_no_more_memory_than_they_are_long(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that stands before each answer, together, would be 80 MB."""
    monkeypatch.setattr(chat, "_MEMORY", 160 << 20)
    talk = long_talk(400, words=200)
    assert len(encode_turns(ChatTemplate.of(CHATML), tokenizer, talk).spans()) == 200


@pytest.mark.parametrize("most", [1, 7, 40])
def test_conversations_rendered_in_groups_are_the_same(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    talks = [long_talk(turns) for turns in (2, 9, 1, 14, 3)]
    for source in (CHATML, MARKED):
        template = ChatTemplate.of(source)
        with monkeypatch.context() as patch:
            patch.setattr(chat, "_MOST_MESSAGES", most)
            found = encode_all(template, tokenizer, talks)
        assert found == [encode_turns(template, tokenizer, talk) for talk in talks]
        assert [len(one.spans()) for one in found if isinstance(one, Turns)] == [1, 4, 0, 7, 1]


@pytest.mark.parametrize("most", [1, 25_000])
@pytest.mark.parametrize(
    ("condition", "where"),
    [("loop.index == 38 and not loop.last", 38), ("loop.index == 38 and messages | length == 60", 38)],
    ids=["when more follows", "of one length alone"],
)
def test_one_answer_written_otherwise_among_many_is_found(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, most: int, condition: str, where: int
) -> None:
    monkeypatch.setattr(chat, "_MOST_MESSAGES", most)
    odd = CHATML.replace("m.content +", f"('' if {condition} else m.content) +")
    with pytest.raises(DataError, match=f"writes message {where} otherwise"):
        encode_turns(ChatTemplate.of(odd), tokenizer, long_talk(60))


def test_a_template_that_looks_at_the_clock_proves_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_MOST_MESSAGES", 1)
    clock = CHATML + "{{ strftime_now('%f') if messages | length == 4 else '' }}"
    with pytest.raises(DataError, match="now in one way and now in another"):
        encode_turns(ChatTemplate.of(clock), tokenizer, long_talk(4))


def test_more_turns_than_can_be_found_are_told(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_MOST_READ", 100)
    said = r"has 24 messages, 12 of them answers.* comes to 300 messages, and 100 are the most: put {% generation %}"
    with pytest.raises(DataError, match=said):
        encode_turns(ChatTemplate.of(CHATML), tokenizer, long_talk(24))
    assert len(encode_turns(ChatTemplate.of(MARKED), tokenizer, long_talk(24)).spans()) == 12
