"""What records ask and what would be right, in whatever form they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finemoe.core.errors import DataError
from finemoe.data.conversations.forms import read
from finemoe.data.conversations.messages import FormError
from finemoe.data.conversations.questions import Question, encode_questions, reference_of
from finemoe.text.chat import ChatTemplate
from finemoe.text.control import encode_chat
from finemoe.text.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "one."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "two."},
]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"prompt": "2+2", "answer": "4"}, ("4",)),
        ({"prompt": "2+2", "answer": 4}, ("4",)),
        ({"prompt": "who", "answers": ["he", "she"]}, ("he", "she")),
        ({"question": "2+2", "answer": "2+2=4 #### 4"}, ("2+2=4 #### 4",)),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ("b",)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("b",)),
        ({"messages": [{"role": "user", "content": "a"}]}, ()),
        ({"prompt": "a", "answer": "  "}, ()),
    ],
)
def test_where_a_record_has_its_answer(record: dict[str, Any], wanted: tuple[str, ...]) -> None:
    assert reference_of(record, read(record)) == wanted


def test_a_question_is_all_up_to_the_last_answer_and_is_read_as_it_is_put() -> None:
    tokenizer = Tokenizer.train(["one? two? one. two. User: Assistant:"] * 5, vocab_size=270)
    template = ChatTemplate.plain(tokenizer.end_of_text)
    records = [{"messages": TALK, "level": 3}, {"nothing": 1}, {"prompt": "two?", "answer": "no"}]
    texts = [json.dumps(record) for record in records]
    whole, nothing, short = encode_questions(texts, tokenizer, template)
    assert isinstance(whole, Question)
    assert isinstance(short, Question)
    assert isinstance(nothing, FormError)
    assert [message["content"] for message in whole.messages] == ["one?", "one.", "two?"]
    assert (whole.text, whole.references, whole.record) == ("two?", ("two.",), records[0])
    assert tokenizer.decode(whole.ids).rstrip().endswith("Assistant:")
    bare = encode_questions(texts, tokenizer, template, "Q {prompt} A")
    assert [tokenizer.decode(one.ids) for one in bare if isinstance(one, Question)] == ["Q two? A"] * 2


def test_questions_are_rendered_together_as_they_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for every prompt would take minutes for twenty thousand of them."""
    tokenizer = Tokenizer.train(["one? two? one. two. User: Assistant:"] * 5, vocab_size=270)
    source = "{{ raise_exception('no') if 'bad' in messages[-1].content }}{% for m in messages %}{{ m.content }}\n"
    template = ChatTemplate.of(source + "{% endfor %}")
    asked = ["one?", f"two{tokenizer.end_of_text}?", *(f"{n} one?" for n in range(30))]
    texts = [json.dumps({"prompt": one, "answer": "1"}) for one in asked]
    alone = [encode_chat(template, tokenizer, [{"role": "user", "content": one}])[1] for one in asked]
    real, calls = ChatTemplate.render_all, []

    def counted(self: ChatTemplate, *args: Any, **given: Any) -> list[str]:
        calls.append(args)
        return real(self, *args, **given)

    monkeypatch.setattr(ChatTemplate, "render_all", counted)
    together = encode_questions(texts, tokenizer, template)
    assert len(calls) == 1
    assert [list(one.ids) for one in together if isinstance(one, Question)] == alone
    bad = encode_questions([texts[0], json.dumps({"prompt": "bad", "answer": "1"}), texts[1]], tokenizer, template)
    assert [type(one) for one in bad] == [Question, DataError, Question]
    calls.clear()
    assert len(encode_questions(texts, tokenizer, template, "{prompt}")) == len(texts)
    assert not calls, "nothing of a template is asked"
