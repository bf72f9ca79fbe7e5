"""Records to tokens: any form, any file, each side of the split, and what cannot be used is told."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemoe.core.errors import DataError
from finemoe.data.config import DataConfig
from finemoe.data.conversations.forms import Kind
from finemoe.data.conversations.prepare import PreparedConversations, overlap, prepare_conversations
from finemoe.data.corpora import FilesCorpus, StdlibCorpus
from finemoe.text import ChatTemplate, Tokenizer
from finemoe.text.turns import encode_all, encode_turns

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

END = "<|end_of_text|>"
ANSWERS = {f"{word}!{END}" for word in WORDS}
"""An answer ends with the token that stops: a model that never saw it would never end."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["User: Assistant:\none and two is three. " * 40], vocab_size=300)


def prepared(
    tokenizer: Tokenizer, folder: Path, files: Sequence[Path], want: Kind = "conversation", **changes: Any
) -> PreparedConversations:
    corpus = FilesCorpus(paths=tuple(map(str, files)), **changes.pop("corpus", {}))
    config = DataConfig(corpus=corpus, cache_dir=str(folder / "cache"), **{"validation_share": 0.3, **changes})
    return prepare_conversations(config, want, tokenizer, ChatTemplate.plain(tokenizer.end_of_text))


def lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def talks(count: int = 10) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": f"{word}!"}]}
            for word in WORDS[:count]]  # fmt: skip


def pairs(count: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"{word}?", "chosen": f"{word}!", "rejected": "no"} for word in WORDS[:count]]


def texts(found: PreparedConversations) -> set[str]:
    """What is learnt, of all segments of both sides."""
    learnt = set()
    for side in found.sides.values():
        for number in range(len(side.starts) - 1):
            ids, trained = side.segment(number)
            learnt.add(found.tokenizer.decode(ids[trained].tolist()))
    return learnt


def as_csv(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def as_parquet(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(records)), path)
    return path


def as_array(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def under_a_key(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"version": 1, "data": records}))
    return path


FILES = {
    "JSON Lines": (lines, "talks.jsonl", talks()),
    "a JSON list": (as_array, "talks.json", talks()),
    "a list under a key": (under_a_key, "talks.json", talks()),
    "Parquet": (as_parquet, "talks.parquet", talks()),
    "CSV": (as_csv, "talks.csv", [{"instruction": f"{word}?", "output": f"{word}!"} for word in WORDS]),
}


@pytest.mark.parametrize("kind", FILES)
def test_records_of_any_file_are_read_whole(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    write, name, records = FILES[kind]
    found = prepared(tokenizer, tmp_path, [write(tmp_path / name, records)])  # type: ignore[operator]
    assert texts(found) == ANSWERS
    sides = {side: len(stored) for side, stored in found.sides.items()}
    assert sum(sides.values()) == 10
    assert min(sides.values()) > 0
    assert found.report["items"] == sides


def test_a_single_conversation_is_a_record_and_no_table(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = []
    for number, record in enumerate(talks()):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(record))
    assert texts(prepared(tokenizer, tmp_path, files)) == ANSWERS


def test_a_pair_is_two_answers_to_one_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = prepared(tokenizer, tmp_path, [lines(tmp_path / "pairs.jsonl", pairs())], "pair")
    side = found.sides["train"]
    assert side.segments_per_item == 2
    (better, first), (worse, second) = side.segment(0), side.segment(1)
    upto = int(np.flatnonzero(first)[0])
    assert better[:upto].tolist() == worse[:upto].tolist()
    assert not second[:upto].any()
    assert tokenizer.decode(worse[second].tolist()) == f"no{END}"


def test_the_better_half_of_a_pair_is_a_conversation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = prepared(tokenizer, tmp_path, [lines(tmp_path / "pairs.jsonl", pairs())])
    assert texts(found) == ANSWERS


def test_a_conversation_is_no_pair_and_the_fields_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no record can be used as a pair: .*`messages`, which holds one answer"):
        prepared(tokenizer, tmp_path, [lines(tmp_path / "talks.jsonl", talks())], "pair")
    with pytest.raises(DataError, match="no form of a conversation that is known; its fields are a, b"):
        prepared(tokenizer, tmp_path, [lines(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}] * 2)])


def test_few_bad_records_are_skipped_and_many_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = {"messages": [{"role": "wizard", "content": "?"}]}
    file = lines(tmp_path / "talks.jsonl", [*talks(), bad])
    with pytest.raises(
        DataError, match=r"1 of 11 records cannot be used as a conversation \(.*'wizard'.*max_skipped_sh"
    ):
        prepared(tokenizer, tmp_path, [file])
    found = prepared(tokenizer, tmp_path, [file], max_skipped_share=0.2)
    assert found.report["num_skipped"] == 1
    assert "wizard" in found.report["skipped"][0]["reason"]
    assert sum(found.report["items"].values()) == 10


def test_a_plain_text_is_no_conversation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time.")
    with pytest.raises(DataError, match=r"it is a text, and not a record with fields"):
        prepared(tokenizer, tmp_path, [tmp_path / "a.txt"])
    config = DataConfig(corpus=StdlibCorpus(), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"`stdlib` holds plain texts, and conversations are records"):
        prepare_conversations(config, "conversation", tokenizer, ChatTemplate.plain(tokenizer.end_of_text))


def test_questions_that_are_on_both_sides_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held = talks(3)
    train = [{"messages": [*talk["messages"][:1], {"role": "assistant", "content": "other"}]} for talk in talks(2)]
    files = lines(tmp_path / "train.jsonl", [*train, *talks()[5:]]), lines(tmp_path / "held.jsonl", held)
    found = prepared(tokenizer, tmp_path, files[:1], corpus={"validation_paths": (str(files[1]),)})
    assert {side: len(stored) for side, stored in found.sides.items()} == {"train": 7, "validation": 3}
    assert overlap(found) == 2


def test_an_empty_side_says_what_to_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"validation side of the split: add more, raise `data.validation_share`"):
        prepared(tokenizer, tmp_path, [lines(tmp_path / "talks.jsonl", talks(2))], validation_share=0.001)


def test_what_was_read_once_comes_from_the_cache_and_damage_is_mended(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lines(tmp_path / "talks.jsonl", talks())
    first = prepared(tokenizer, tmp_path, [file])
    assert texts(first) == ANSWERS
    tokens = next((tmp_path / "cache").rglob("train/tokens.npy"))
    with monkeypatch.context() as patch:
        patch.setattr("finemoe.data.conversations.prepare.encode_items", None)
        assert prepared(tokenizer, tmp_path, [file]).report == first.report
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\x07")
    assert texts(prepared(tokenizer, tmp_path, [file])) == ANSWERS
    lines(file, [*talks(9), {"prompt": "ten?", "completion": "Ten!"}])
    assert f"Ten!{END}" in texts(prepared(tokenizer, tmp_path, [file]))


def test_rendered_together_is_rendered_alone_and_one_that_fails_fails_alone(tokenizer: Tokenizer) -> None:
    refuses = "{% if messages[0].content == 'two?' %}{{ raise_exception('no two') }}{% endif %}"
    template = ChatTemplate.of(refuses + ChatTemplate.plain(tokenizer.end_of_text).sources["default"])
    messages = [talk["messages"] for talk in talks(4)]
    found = encode_all(template, tokenizer, messages)
    assert isinstance(found[1], DataError)
    for number in (0, 2, 3):
        assert found[number] == encode_turns(template, tokenizer, messages[number])


def test_calls_that_the_template_cannot_write_are_no_silence_to_learn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    silent = [{"messages": [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "tool_calls": call}]}
              for word in WORDS]  # fmt: skip
    with pytest.raises(DataError, match="writes no `tool_calls`"):
        prepared(tokenizer, tmp_path, [lines(tmp_path / "calls.jsonl", silent)])
    with pytest.raises(DataError, match="writes no `tools`"):
        prepared(tokenizer, tmp_path, [lines(tmp_path / "tools.jsonl", [{**one, "tools": call} for one in talks()])])


EMPTY = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": " "}]}


def test_an_answer_that_says_nothing_is_not_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="message 2 is an answer that says nothing"):
        prepared(tokenizer, tmp_path, [lines(tmp_path / "empty.jsonl", [EMPTY])])
    context = {"messages": [EMPTY["messages"][0], {**EMPTY["messages"][1], "train": False}, *talks(1)[0]["messages"]]}
    found = prepared(tokenizer, tmp_path, [lines(tmp_path / "talks.jsonl", [context, *talks()])])
    assert texts(found) == ANSWERS


def test_an_empty_system_message_is_none_and_a_response_is_an_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty = [{"messages": [{"role": "system", "content": ""}, *talk["messages"]]} for talk in talks(5)]
    answered = [{"prompt": f"{word}?", "response": f"{word}!"} for word in WORDS[5:]]
    found = prepared(tokenizer, tmp_path, [lines(tmp_path / "talks.jsonl", [*empty, *answered])])
    assert texts(found) == ANSWERS
    assert found.report["forms"] == {"messages": 5, "instruction and output": 5}


def test_many_bad_records_in_front_are_told_as_what_they_are(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [{"a": number} for number in range(70)]
    with pytest.raises(DataError, match="none of the first 64 records can be used as a conversation") as error:
        prepared(tokenizer, tmp_path, [lines(tmp_path / "talks.jsonl", [*bad, *talks()])])
    assert caplog.text == ""  # the error says it all, once
    assert str(error.value).count("its fields are a") == str(error.value).count("Known are messages: ") == 1


def test_a_bad_record_among_good_ones_is_one_short_line(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    prepared(tokenizer, tmp_path, [lines(tmp_path / "a.jsonl", [*talks(), {"a": 1}])], max_skipped_share=0.2)
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert line.startswith("1 record left out, of 10: ")
    assert line.endswith("it is in no form of a conversation that is known; its fields are a")


@pytest.mark.parametrize("rejected", ["", "one!"])
def test_a_worse_answer_that_nobody_asks_for_need_not_be_one(
    tmp_path: Path, tokenizer: Tokenizer, rejected: str
) -> None:
    odd = [{**pairs()[0], "rejected": rejected}, *pairs()[1:]]
    file = lines(tmp_path / "pairs.jsonl", odd)
    assert texts(prepared(tokenizer, tmp_path, [file])) == ANSWERS
    assert sum(prepared(tokenizer, tmp_path, [file], "prompt").report["items"].values()) == 10
    found = prepared(tokenizer, tmp_path, [file], "pair", max_skipped_share=0.2)
    assert sum(found.report["items"].values()) == 9


TOOL_TEMPLATE = ChatTemplate.of(
    "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{{ m.tool_calls | tojson }}{{ '<|end_of_text|>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


def calling(tool: str, argument: str, value: Any) -> dict[str, Any]:
    """A conversation with a tool of one argument, which is called."""
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    call = {"type": "function", "function": {"name": tool, "arguments": {"also": {argument: [value]}, argument: value}}}
    return {
        "tools": [{"type": "function", "function": {"name": tool, "parameters": parameters}}],
        "messages": [{"role": "user", "content": f"{tool}?"}, {"role": "assistant", "tool_calls": [call]}],
    }


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tools_of_tables_are_those_of_the_records(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    """Columns have a field for every argument of every tool; a model must not read of those of others."""
    records = [calling("weather", "city", "Ulm"), calling("time", "zone", "CET"), *(calling(w, w, w) for w in WORDS)]
    table = pa.Table.from_pylist(records)
    assert table.to_pylist() != records
    path = tmp_path / f"calls{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    both = []
    for file in (path, lines(tmp_path / "calls.jsonl", records)):
        config = DataConfig(
            corpus=FilesCorpus(paths=(str(file),)), cache_dir=str(tmp_path / "cache"), validation_share=0.3
        )
        found = prepare_conversations(config, "conversation", tokenizer, TOOL_TEMPLATE)
        both.append({
            found.tokenizer.decode(side.segment(number)[0].tolist())
            for side in found.sides.values()
            for number in range(len(side.starts) - 1)
        })  # fmt: skip
    assert both[0] == both[1]
    assert len(both[0]) == len(records)
