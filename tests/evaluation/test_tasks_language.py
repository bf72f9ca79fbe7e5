"""LAMBADA and bits per byte: what is asked of each form of data, and how answers are judged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from finemoe.core.errors import ConfigError, DataError
from finemoe.evaluation.task import LogLikelihood, Rolling, Scored
from finemoe.evaluation.tasks import TASKS, read_as


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record", [{"text": "He said\n hello world"}, {"context": "He said\n hello", "continuation": "world"}]
)
def test_lambada(record: dict[str, str], tmp_path: Path) -> None:
    task = TASKS["lambada"]
    items, _ = task.items(write(tmp_path / "lambada.jsonl", json.dumps(record)), None, None)
    assert items[0].requests == (LogLikelihood("He said\n hello", " world"),)
    assert task.judge(items[0], [Scored(-1.5, 2, True)]).scores == {"accuracy": 1.0, "loss": 1.5}
    assert task.judge(items[0], [Scored(-0.5, 2, False)]).scores == {"accuracy": 0.0, "loss": 0.5}
    assert task.judge(items[0], [Scored(math.nan, 2, False)]).outcome == "error"
    with pytest.raises(ConfigError, match="no worked examples"):
        task.items(tmp_path, 3, None)


def test_bits_per_byte_are_those_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "abc")
    write(tmp_path / "b.txt", "äöü!")
    write(tmp_path / "c.txt", "")
    (tmp_path / "d.txt").write_bytes(b"\xff")
    items, skipped = TASKS["text"].items(tmp_path, None, None)
    assert ([item.requests for item in items], skipped) == ([(Rolling("abc"),), (Rolling("äöü!"),)], 1)
    nats = [2.0, 5.0]
    found = [TASKS["text"].judge(item, [Scored(-value, 1, False)]) for item, value in zip(items, nats, strict=True)]
    assert [one.weight for one in found] == [3.0, 7.0]
    mean = sum(one.scores["bits_per_byte"] * one.weight for one in found) / 10
    assert mean == pytest.approx(7.0 / math.log(2) / 10)
    with pytest.raises(DataError, match="needs a text"):
        TASKS["text"].items(None, None, None)


def test_a_limit_gives_every_domain_its_share(tmp_path: Path) -> None:
    for domain in ("books", "code"):
        (tmp_path / domain).mkdir()
        write(tmp_path / domain / "part.jsonl", "".join(json.dumps({"text": f"{domain} {n}"}) + "\n" for n in range(5)))
    items, _ = TASKS["text"].items(tmp_path, None, 4)
    assert [item.requests[0].text for item in items] == ["books 0", "books 1", "code 0", "code 1"]
    alone, _ = TASKS["text"].items(tmp_path / "books" / "part.jsonl", None, 2)
    assert [item.requests[0].text for item in alone] == ["books 0", "books 1"]
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"limit is {limit}"):
            TASKS["text"].items(tmp_path, None, limit)


def test_a_folder_of_something_else_is_not_scored_by_the_few_texts_in_it(tmp_path: Path) -> None:
    (tmp_path / "sets.jsonl").write_text('{"question": "1 + 1?"}\n' * 9 + '{"text": "one text"}\n')
    with pytest.raises(DataError, match="right folder"):
        TASKS["text"].items(tmp_path, None, None)


def test_text_is_read_from_the_fields_that_are_named(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}?", "answer": f"a{i}."} for i in range(3)]
    source = write(tmp_path / "qa.json", json.dumps(rows))
    with pytest.raises(
        DataError, match=r"right folder.*3 of 3 records have no field `text`.*question, answer.*set --text-field"
    ):
        TASKS["text"].items(source, None, None)
    (task,) = read_as([TASKS["text"]], {"template": "{question} {answer}"})
    items, skipped = task.items(source, None, None)
    assert ([item.requests for item in items], skipped) == ([(Rolling(f"q{i}? a{i}."),) for i in range(3)], 0)
    with pytest.raises(ConfigError, match="names no field"):
        read_as([TASKS["text"]], {"template": "no names"})[0].items(source, None, None)
    with pytest.raises(ConfigError, match="text_field is of the task `text`"):
        read_as([TASKS["lambada"]], {"text_field": "body"})
