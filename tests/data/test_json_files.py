"""JSON and tables as other programs write them, whatever the file is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import DataError
from finemoe.data.corpora import FilesCorpus, read_corpus
from finemoe.data.documents.document import SkipReport

TEXTS = [f"text {n}, with a comma" for n in range(4)]
RECORDS = [{"text": text, "id": n} for n, text in enumerate(TEXTS)]


def texts_of(path: Path, **settings: Any) -> list[str]:
    report = SkipReport(quiet=True)
    found = [one.document.text for one in read_corpus(FilesCorpus(paths=(str(path),), **settings), 0.0, report)]
    report.check(0.0, "max_skipped_share")
    return found


def lines(records: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(record) + end for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.jsonl", json.dumps(RECORDS, indent=2)),
        ("list-in-a-line.jsonl", json.dumps(RECORDS) + "\n"),
        ("lists.json", lines([RECORDS[:2], RECORDS[2:]])),
        ("commas.json", ",\n".join(json.dumps(record) for record in RECORDS)),
        ("marks.jsonl", "\ufeff".join(("", lines(RECORDS[:2]), lines(RECORDS[2:])))),
        ("columns.json", json.dumps({"text": {str(n): t for n, t in enumerate(TEXTS)}, "id": dict.fromkeys("0123")})),
        ("lists-of-cells.json", json.dumps({"text": TEXTS, "id": [1, 2, 3, 4]})),
        ("split.json", json.dumps({"columns": ["id", "text"], "data": [[n, t] for n, t in enumerate(TEXTS)]})),
        ("index.json", json.dumps({str(n): record for n, record in enumerate(RECORDS)})),
    ],
)
def test_records_are_found_however_they_are_kept(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert texts_of(tmp_path / name) == TEXTS
    assert texts_of(tmp_path) == TEXTS


def test_an_object_whose_text_is_a_text_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "alone", "notes": ["a"]}))
    assert texts_of(tmp_path) == ["alone"]


def test_lists_that_are_no_column_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": [["a", "b"]], "id": [1]}))
    with pytest.raises(DataError, match="holds no text"):
        texts_of(tmp_path)


def test_several_lists_are_named_and_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": RECORDS, "test": RECORDS[:1]}))
    with pytest.raises(DataError, match="`train` and `test` hold lists of records: write the one to train on"):
        texts_of(tmp_path / "a.json")


def test_what_follows_a_list_and_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS) + '{"text": "x"}')
    with pytest.raises(DataError, match="there is more after the end of the list"):
        texts_of(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.dat", "a", "a.psv"])
@pytest.mark.parametrize("mark", ["|", "\t", ";"])
def test_a_table_is_known_by_its_first_row(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text("".join(f"{a}{mark}{b}\n" for a, b in [("id", "text"), *enumerate(TEXTS)]))
    assert texts_of(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "text",
    [
        "text, and more of it\nin two lines, as prose is\n",
        "id,text\nwhat follows is prose\nand no row\n",
        "import text, re\nimport os, sys\n",
        "title,body\na,b\n",
    ],
)
def test_prose_with_commas_is_no_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert texts_of(tmp_path) == [text]


def test_excel_names_its_separator_first(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\r\ntext;id\r\nhello, world;1\r\n")
    assert texts_of(tmp_path) == ["hello, world"]


def test_a_table_without_names_is_told_to_need_them(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("hello\tworld\nfoo\tbar\n")
    with pytest.raises(DataError, match="the first row must hold the names of the columns"):
        texts_of(tmp_path / "a.tsv")


def test_a_notebook_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "source": []}], "nbformat": 4}))
    with pytest.raises(DataError, match="is a notebook: take the text out of its cells first"):
        texts_of(tmp_path / "a.ipynb")
