"""Questions and answers, one after the other, with experts switched off between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.checkpoint.language_model import open_language_model
from finemoe.core.errors import ConfigError
from finemoe.generation import SamplingConfig
from finemoe.server.constraints import Wish, constrain
from finemoe.server.conversation import Conversation
from server.talkers import write_run


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("talk") / "talker", chat=True)


@pytest.fixture
def talk(talker: Path) -> Conversation:
    conversation: Conversation = finemoe.chat(talker, temperature=0.9, max_new_tokens=12, seed=4)
    return conversation


def said(events: Any) -> str:
    return "".join(event.text for event in events)


def test_answers_are_part_of_what_follows(talk: Conversation) -> None:
    first = said(talk.ask("one"))
    second = said(talk.ask("two"))
    assert talk.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": second},
    ]
    text, ids = talk.opened.encode_chat(talk.messages[:3])
    assert first in text
    assert talk.events[0].sequence.prompt == tuple(ids)


def test_a_retry_under_another_wish_keeps_the_seed(talker: Path) -> None:
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12, seed=5)
    talk = Conversation(open_language_model(talker), sampling=sampling)
    first = [event.token_id for event in talk.ask("Hello")]
    talk.wish = Wish(active=1)
    list(talk.retry())
    talk.wish = Wish()
    assert [event.token_id for event in talk.retry()] == first
    assert [event.token_id for event in talk.retry()] != first  # nothing was changed: another seed


def test_a_retry_replaces_the_answer(talk: Conversation) -> None:
    first = said(talk.ask("one"))
    again = said(talk.retry())
    assert again != first
    assert [message["content"] for message in talk.messages] == ["one", again]
    talk.sampling = talk.sampling.model_copy(update={"temperature": 0.0})
    assert said(talk.retry()) == said(talk.retry())


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(talk: Conversation) -> None:
    events = talk.ask("one")
    part = next(events).text + next(events).text
    events.close()
    assert talk.messages[-1] == {"role": "assistant", "content": part}
    assert not talk._engine.busy
    assert said(talk.ask("two"))


def test_wishes_hold_from_the_next_answer_on(talk: Conversation) -> None:
    said(talk.ask("one"))
    used = talk.events[0].routes[1].experts[0]
    talk.wish = Wish(disabled={1: {used}}, forced={2: {7}}, shared=False)
    said(talk.retry())
    assert all(used not in event.routes[1].experts for event in talk.events)
    assert all(7 in event.routes[2].experts for event in talk.events)
    assert all(event.routes[1].shared is None for event in talk.events)


def test_what_cannot_be_said_leaves_the_conversation_as_it_was(talk: Conversation) -> None:
    with pytest.raises(ConfigError, match="say something first"):
        said(talk.retry())
    said(talk.ask("one"))
    known = list(talk.messages)
    talk.wish = Wish(active=9)
    with pytest.raises(ConfigError, match="8 experts left"):
        said(talk.ask("two"))
    assert talk.messages == known
    talk.wish = Wish()
    with pytest.raises(ConfigError, match="begin anew"):
        said(talk.ask("word " * 300))
    assert talk.messages == known


def test_a_system_message_stands_first(talk: Conversation) -> None:
    said(talk.ask("one"))
    talk.system = "Be brief."
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.system = None
    assert talk.messages[0]["role"] == "user"


def test_a_model_without_a_template_goes_on_with_the_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "writer", chat=False)
    talk = finemoe.chat(run, temperature=0, max_new_tokens=5)
    first = said(talk.ask("def "))
    said(talk.ask("return "))
    assert talk.events[0].sequence.prompt == tuple(talk.opened.encode(f"def {first}return "))
    with pytest.raises(ConfigError, match="no system message"):
        finemoe.chat(run, system="x")


def test_a_wish_that_changes_nothing_is_none(talk: Conversation) -> None:
    assert constrain(talk.opened.model, Wish()) is None
    found = constrain(talk.opened.model, Wish(active=1))
    assert found is not None
    assert set(found) == {1, 2}  # not the prediction module


def test_a_retry_that_cannot_be_leaves_what_was_said(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    said(talk.ask("one"))
    known, events = list(talk.messages), list(talk.events)
    talk.system = "word " * 300
    with pytest.raises(ConfigError, match="begin anew"):
        said(talk.retry())
    talk.system = None
    assert talk.messages == known
    assert talk.events == events

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(talk._engine, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            said(talk.ask("two"))
    assert talk.messages == known


def test_whether_the_prompt_ends_in_a_thought_is_known(talk: Conversation) -> None:
    said(talk.ask("one"))
    assert not talk.thinking
    said(talk.ask("I say <think>"))
    assert not talk.thinking
