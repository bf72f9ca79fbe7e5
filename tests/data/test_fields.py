"""The text of a record: a field, one within another, or several joined by a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.data import DataConfig, FilesCorpus, SkipReport
from finemoe.data.documents.fields import NoTextError, TextFields

RECORD: dict[str, Any] = {
    "text": "plain",
    "question": "What is {answer}?",
    "answer": "A {brace} and a %s, \\n too",
    "a.b": "by its own name",
    "a": {"b": "nested", "c": ["zero", "one"]},
    "number": 3,
    "none": None,
    "empty": "",
}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (TextFields(), "plain"),
        (TextFields("a.b"), "by its own name"),
        (TextFields("a.c[1]"), "one"),
        (TextFields("a.c.0"), "zero"),
        (TextFields(template="{question}\n{answer}"), "What is {answer}?\nA {brace} and a %s, \\n too"),
        (TextFields(template="Q: {question}\\n\\tA: {text}"), "Q: What is {answer}?\n\tA: plain"),
        (TextFields(template="{{{text}}} {a[c][0]} {number}"), "{plain} zero 3"),
        (TextFields(template="{empty}{text}"), "plain"),
        (TextFields(template="only {empty}, no words"), ""),
        (TextFields("empty"), ""),
    ],
)
def test_text_of_a_record(fields: TextFields, text: str) -> None:
    assert fields.text_of(RECORD) == text


@pytest.mark.parametrize(
    ("fields", "says", "absent"),
    [
        (TextFields("body"), "no field `body` (it has text, question, answer", True),
        (TextFields("a.d"), "no field `a.d`", True),
        (TextFields("a.c[2]"), "no field", True),
        (TextFields("number"), "field `number` holds no text", False),
        (TextFields(template="{text} {none}"), "field `none` holds no text", False),
        (TextFields(template="{text} {a}"), "field `a` holds no text", False),
    ],
)
def test_a_record_without_the_text(fields: TextFields, says: str, absent: bool) -> None:
    with pytest.raises(NoTextError) as caught:
        fields.text_of(RECORD)
    assert says in str(caught.value)
    assert caught.value.absent is absent


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{question", "expected '}'"),
        ("no names", "it names no field"),
        ("{}", "names no field"),
        ("{a!r}", "without `:` or `!`"),
        ("{a:>10}", "without `:` or `!`"),
    ],
)
def test_a_template_that_cannot_work_is_refused(template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"`corpus\.template`") as caught:
        parse(DataConfig, {"corpus": {"kind": "files", "paths": ["x"], "template": template}}, "test")
    assert says in str(caught.value)


def test_a_configuration_says_one_thing_and_comes_back() -> None:
    both = {"corpus": {"kind": "files", "paths": ["x"], "template": "{a}", "text_field": "b"}}
    with pytest.raises(ConfigError, match="both say what the text is"):
        parse(DataConfig, both, "test")
    config = parse(DataConfig, {"corpus": {"kind": "files", "paths": ["x"], "template": "{a}"}}, "test")
    assert DataConfig.model_validate_json(config.model_dump_json()) == config


def test_a_template_joins_the_fields_of_every_format(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"q": f"q{i}", "a": {"text": f"a{i}"}} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    corpus = FilesCorpus(paths=(str(tmp_path),), template="{q} -> {a.text}")
    assert [d.text for d in corpus.documents(SkipReport())] == [f"q{i} -> a{i}" for i in range(3)] * 2
