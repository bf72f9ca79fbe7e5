"""Records in the forms that people have, and what is said of those that are in none."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.data.conversations.forms import FORMS, read, require_preference
from finemoe.data.conversations.messages import ROLES, FormError

ASKED = [{"role": "user", "content": "1 + 1?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "2"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]

CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": ANSWERED}, "messages"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?"}]},
                      ANSWERED[1]]},
        "messages",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}, "ShareGPT"
    ),
    "Alpaca": ({"instruction": "1 + 1?", "input": "", "output": "2"}, "instruction and output"),
    "Alpaca, all of it in the input": ({"instruction": "", "input": "1 + 1?", "output": "2"}, "instruction and output"),
    "question and answer": ({"question": "1 + 1?", "answer": "2"}, "instruction and output"),
    "Dolly": ({"instruction": "1 + 1?", "context": "", "response": "2"}, "instruction and output"),
    "texts": ({"prompt": "1 + 1?", "completion": "2"}, "prompt and completion"),
    "prompt and completion as messages": ({"prompt": ASKED, "completion": ANSWERED[1:]}, "prompt and completion"),
    "completion that repeats the prompt": ({"prompt": ASKED, "completion": ANSWERED}, "prompt and completion"),
}  # fmt: skip

PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "texts": ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "pairs"),
    "messages": (
        {"prompt": ASKED, "chosen": ANSWERED[1:], "rejected": [{"role": "assistant", "content": "3"}]}, "pairs"
    ),
    "whole conversations": (
        {"chosen": ANSWERED, "rejected": [*ASKED, {"role": "assistant", "content": "3"}]}, "pairs"
    ),
    "prompt beside whole conversations": (
        {"prompt": "1 + 1?", "chosen": ANSWERED, "rejected": [*ASKED, {"role": "assistant", "content": "3"}]}, "pairs"
    ),
    "Dolly with a worse answer": ({"instruction": "1 + 1?", "response": "2", "rejected": "3"}, "pairs"),
    "Alpaca's question with answers": (
        {"instruction": " ", "input": "1 + 1?", "chosen": "2", "rejected": "3"}, "pairs"
    ),
    "UltraFeedback": (
        {"instruction": "1 + 1?", "completions": [
            {"response": "3", "overall_score": 1.0}, {"response": "2", "overall_score": 9}, {"response": "4",
                                                                                             "overall_score": 2},
        ]},
        "scored answers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "form"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_one_conversation_in_many_forms(record: dict[str, Any], form: str) -> None:
    found = read(record)
    assert (found.form, found.kind) == (form, "conversation")
    assert found.conversation is not None
    assert list(found.conversation.messages) == ANSWERED


@pytest.mark.parametrize(("record", "form"), PAIRS.values(), ids=PAIRS)
def test_one_pair_in_many_forms(record: dict[str, Any], form: str) -> None:
    found = read(record)
    assert (found.form, found.kind) == (form, "pair")
    assert found.pair is not None
    assert list(found.pair.prompt.messages) == ASKED
    assert [one["content"] for one in found.pair.chosen] == ["2"]
    assert [one["content"] for one in found.pair.rejected] == ["3"]
    assert found.pair.margin == (8.0 if form == "scored answers" else None)


@pytest.mark.parametrize(
    "record", [{"prompt": "1 + 1?"}, {"question": "1 + 1?"}, {"messages": ASKED}, {"prompt": ASKED}], ids=str
)
def test_prompts_end_with_a_question(record: dict[str, Any]) -> None:
    found = read(record)
    assert found.kind == "prompt"
    assert found.conversation is not None
    assert list(found.conversation.messages) == ASKED


def test_what_belongs_to_a_message_stays_with_it() -> None:
    call = [{"type": "function", "id": "1", "function": {"name": "add", "arguments": "{}"}}]
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": call, "reasoning_content": "hm"},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "assistant", "content": "2", "train": True},
    ]
    found = read({"messages": turns, "tools": TOOLS}).conversation
    assert found is not None
    assert [one["role"] for one in found.messages] == ["system", "user", "assistant", "tool", "assistant", "assistant"]
    assert found.messages[2] == {"role": "assistant", "content": "", "tool_calls": call, "reasoning_content": "hm"}
    assert found.messages[3]["tool_call_id"] == "1"
    assert [one.get("train") for one in found.messages[4:]] == [False, True]
    assert list(found.tools) == TOOLS


def test_systems_inputs_and_histories() -> None:
    record = {
        "instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be brief.",
        "history": [["Hello", "Hi"]],
    }  # fmt: skip
    found = read(record).conversation
    assert found is not None
    assert [(one["role"], one["content"]) for one in found.messages] == [
        ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Add.\n\n1 and 1"),
        ("assistant", "2"),
    ]  # fmt: skip
    given = read({"conversations": [{"from": "system", "value": "own"}, {"from": "human", "value": "x"}],
                  "system": "beside"}).conversation  # fmt: skip
    assert given is not None
    assert [one["content"] for one in given.messages] == ["own", "x"]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "rejected", [[SYSTEM, *ASKED, {"role": "assistant", "content": "3"}], "3"], ids=["whole", "text"]
)
def test_a_system_message_that_answers_repeat_is_the_prompts(rejected: Any) -> None:
    pair = read({"prompt": "1 + 1?", "chosen": [SYSTEM, *ANSWERED], "rejected": rejected}).pair
    assert pair is not None
    assert list(pair.prompt.messages) == [SYSTEM, *ASKED]
    assert [one["content"] for one in (*pair.chosen, *pair.rejected)] == ["2", "3"]
    completed = read({"prompt": "1 + 1?", "completion": [SYSTEM, *ANSWERED]}).conversation
    assert completed is not None
    assert list(completed.messages) == [SYSTEM, *ANSWERED]


@pytest.mark.parametrize("other", [[], [{"role": "system", "content": "Be long."}]], ids=["none", "another"])
def test_two_prompts_in_one_pair_are_told(other: list[dict[str, str]]) -> None:
    wrong = [*other, *ASKED, {"role": "assistant", "content": "3"}]
    with pytest.raises(FormError, match="`chosen` and `rejected` repeat the prompt behind different system messages"):
        read({"prompt": "1 + 1?", "chosen": [SYSTEM, *ANSWERED], "rejected": wrong})
    with pytest.raises(FormError, match="begins with another system message than the prompt"):
        read({"prompt": "1 + 1?", "system": "Own.", "chosen": [SYSTEM, *ANSWERED], "rejected": "3"})


@pytest.mark.parametrize("beside", [{}, {"system": "Be brief."}])
@pytest.mark.parametrize("prompt", ["1 + 1?", "1 + 1? ", ASKED])
def test_answers_that_repeat_the_prompt_ask_it_once(beside: dict[str, Any], prompt: Any) -> None:
    wrong = [*ASKED, {"role": "assistant", "content": "3"}]
    pair = read({**beside, "prompt": prompt, "chosen": ANSWERED, "rejected": wrong}).pair
    assert pair is not None
    assert [one["role"] for one in pair.prompt.messages] == [*(["system"] if beside else []), "user"]
    assert [one["content"] for one in (*pair.chosen, *pair.rejected)] == ["2", "3"]


def test_scores_that_are_no_numbers_rank_nothing() -> None:
    answers = [{"response": "c", "score": math.nan}, {"response": "a", "score": 2}, {"response": "b", "score": 1}]
    pair = read({"prompt": "x", "completions": answers}).pair
    assert pair is not None
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"], pair.margin) == ("a", "b", 1)


def test_scores_may_be_texts_that_are_numbers() -> None:
    answers = [
        {"response": "a", "overall_score": "4.5"}, {"response": "b", "overall_score": " 10 "},
        {"response": "c", "overall_score": "N/A", "score": "1"}, {"response": "d", "overall_score": "nan"},
        {"response": "e", "overall_score": True},
    ]  # fmt: skip
    pair = read({"instruction": "x", "completions": answers}).pair
    assert pair is not None
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"], pair.margin) == ("b", "c", 9)
    pair = read({"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": "2.5", "score_rejected": 1}).pair
    assert pair is not None
    assert pair.margin == 1.5


def test_what_tables_of_the_hub_make_of_fields_is_understood() -> None:
    turns = [{"role": None, "from": "human", "value": "x"}, {"role": None, "from": "gpt", "value": "y"}]
    said = read({"conversations": turns, "tools": json.dumps(TOOLS)}).conversation
    assert said is not None
    assert ([one["role"] for one in said.messages], list(said.tools)) == (["user", "assistant"], TOOLS)
    said = read({"instruction": "x", "input": "", "context": "more", "output": "y"}).conversation
    assert said is not None
    assert said.messages[0]["content"] == "x\n\nmore"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"txt": "x", "id": 3}, "it is in no form of a conversation that is known; its fields are txt, id$"),
        ({"messages": []}, "`messages` must be a list of messages that is not empty"),
        ({"messages": "hello"}, "`messages` must be a list"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            r"`messages\[0\]` has the role 'narrator'; known are system",
        ),
        ({"messages": [{"content": "x"}]}, "has the role None"),
        ({"messages": [{"role": "user", "content": 3}]}, r"`messages\[0\].content` is int, and must be text"),
        ({"messages": [{"role": "user", "content": ""}, ANSWERED[1]]}, "is empty: a user message says something"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "a part of type 'image_url': only text",
        ),
        ({"messages": [{**ANSWERED[1], "train": "no"}]}, "write true or false"),
        ({"messages": ANSWERED, "tools": "add"}, "`tools` must be a list"),
        ({"chosen": "a", "rejected": "b"}, "no `prompt` that they answer"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": ANSWERED}, "`chosen` must end with what the assistant said"),
        ({"prompt": "x", "completions": [{"response": "a", "score": 1}]}, "two answers with a score each"),
        (
            {"prompt": "x", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 1}]},
            "have the score 1: none is better",
        ),
        ({"messages": [ASKED[0], {**ANSWERED[1], "weight": 0.5}]}, r"`messages\[1\].weight` is 0.5: write 0 or 1"),
        ({"prompt": "1 + 2?", "chosen": ANSWERED, "rejected": ANSWERED}, "`chosen` begins with another user message"),
        (
            {"prompt": "x", "completions": [{"response": "a", "score": math.nan}, {"response": "b", "score": 1}]},
            "two answers with a score each",
        ),
        ({"instruction": "x", "output": "y", "history": math.nan}, "`history` must be a list of questions and answers"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, r"`history\[0\]` must be a question and its answer"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(record: dict[str, Any], says: str) -> None:
    with pytest.raises(FormError, match=says):
        read(record)


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [("a", "a", "are the same"), ("", "a", "`chosen` is empty"), ("a", "", "`rejected` is empty")],
)
def test_who_wants_a_pair_gets_two_answers_that_differ(chosen: str, rejected: str, says: str) -> None:
    found = read({"prompt": "x", "chosen": chosen, "rejected": rejected})
    assert found.pair is not None
    with pytest.raises(FormError, match=says):
        require_preference(found.pair)


keys = st.sampled_from(["role", "content", "from", "value"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
    ),
    max_leaves=8,
)
names = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "output", "completions",
     "system", "tools", "input", "history", "response"]
)  # fmt: skip


@given(st.dictionaries(names, values, max_size=5))
def test_no_record_breaks_the_reader(record: dict[str, Any]) -> None:
    with contextlib.suppress(FormError):
        found = read(record)
        assert found.form in FORMS
        json.dumps([found.conversation and found.conversation.messages, found.kind], default=list)


def test_the_page_names_all_roles_and_forms() -> None:
    """docs/howto/adapt-a-model.md is where somebody looks when a file is refused."""
    page = (Path(__file__).parents[3] / "docs/howto/adapt-a-model.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (system|user|assistant|tool) \| (.*) \|$", page, re.MULTILINE))
    told = {name: role for role, names in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert told == ROLES
    for name in ("conversation", "query", "answers", "history", "context", "responses", "rating", "system_prompt"):
        assert f"`{name}`" in page
    for record, form in (
        ({"question": "?", "answer": "!"}, "instruction and output"),
        ({"instruction": "?", "response": "!"}, "instruction and output"),
        ({"query": "?"}, "prompts"),
    ):
        assert read(record).form == form
