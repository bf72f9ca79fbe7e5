"""Records of evaluation sets: every container and compression, and that nothing is left out silently."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from finemoe.core.errors import DataError
from finemoe.data.documents.document import SkipReport
from finemoe.data.documents.hub_rows import config_names, rows
from finemoe.evaluation.records import Record, Unreadable, choice_of, read_records, text_of, texts_of

ROWS = [{"text": "eins", "n": 1}, {"text": "zwei\u2028drei", "n": 2}]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def parquet(path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(ROWS), path / "made")
    return (path / "made").read_bytes()


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def read(path: Path, header: bool = True) -> tuple[list[Record], SkipReport]:
    report = SkipReport()
    return list(read_records(path, path.name, report, header)), report


@pytest.mark.parametrize("outer", COMPRESS)
@pytest.mark.parametrize("inner", [".jsonl", ".json", ".list.json", ".data.json", ".parquet"])
def test_every_container_and_compression(inner: str, outer: str, tmp_path: Path) -> None:
    made = {
        ".jsonl": lambda: lines(ROWS),
        ".json": lambda: lines(ROWS),  # JSON Lines under another name
        ".list.json": lambda: json.dumps(ROWS).encode(),
        ".data.json": lambda: json.dumps({"version": 1, "examples": ROWS}).encode(),
        ".parquet": lambda: parquet(tmp_path),
    }
    path = tmp_path / f"set{inner}{outer}"
    path.write_bytes(COMPRESS[outer](made[inner]()))
    records, report = read(path)
    assert [record.value for record in records] == ROWS
    assert [record.name for record in records] == [f"{path.name}:1", f"{path.name}:2"]
    assert records[0].stem == "set"
    assert report.num_skipped == 0


def test_csv_with_and_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text('\ufeffquestion,answer\n"one, or\ntwo",B\n\nshort\n', encoding="utf-8")
    records, report = read(path)
    assert [record.value for record in records] == [{"question": "one, or\ntwo", "answer": "B"}]
    assert [skipped.reason for skipped in report.skipped] == ["1 cells under 2 columns"]
    records, _ = read(path, header=False)
    assert [record.value["cells"] for record in records] == [["question", "answer"], ["one, or\ntwo", "B"], ["short"]]


def test_a_single_object_and_a_text_are_one_record(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"problem": "p"}', encoding="utf-8")
    (tmp_path / "one.txt").write_text("two\nlines\n", encoding="utf-8")
    assert [record.value for record in read(tmp_path / "one.json")[0]] == [{"problem": "p"}]
    assert [record.value for record in read(tmp_path / "one.txt")[0]] == [{"text": "two\nlines\n"}]


def test_what_is_unreadable_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"a": 1}\nnot json\n[1]\n\xff\xfe\n{"a": 2}\n')
    monkeypatch.setattr(logging.getLogger("finemoe"), "propagate", True)
    with caplog.at_level(logging.WARNING, "finemoe"):
        records, report = read(path)
    assert [record.value for record in records] == [{"a": 1}, {"a": 2}]
    assert [Path(skipped.name).name for skipped in report.skipped] == ["set.jsonl:2", "set.jsonl:3", "set.jsonl:4"]
    assert "set.jsonl:3: not an object with named fields but list" in caplog.text


@pytest.mark.parametrize("outer", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_breaks_off_gives_what_came_before(outer: str, tmp_path: Path) -> None:
    noise = [{"text": "".join(chr(33 + (i * i * 7 + j * 31) % 90) for j in range(60)), "n": i} for i in range(3000)]
    data = COMPRESS[outer](lines(noise))
    path = tmp_path / f"set.jsonl{outer}"
    path.write_bytes(data[: len(data) - 40])
    records, report = read(path)
    assert len(records) < len(noise)
    assert records == read(path)[0]
    assert report.num_skipped >= 1
    assert "damaged or unreadable" in report.skipped[-1].reason


def test_damaged_parquet_and_csv(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(tmp_path)[:100])
    (tmp_path / "b.csv").write_bytes(b"question\n\xff\n")
    for name in ("a.parquet", "b.csv"):
        records, report = read(tmp_path / name)
        assert (records, report.num_skipped) == ([], 1)


def test_fields_say_what_is_missing() -> None:
    record = Record({"a": " ", "b": "text", "c": ["x", 1], "d": ["x", "y"]}, "set:1", "set", 1)
    assert text_of(record, "a", "b") == "text"
    assert texts_of(record, "c", "d") == ("x", "y")
    with pytest.raises(Unreadable, match=r"no text in field a or z \(fields: a, b, c, d\)"):
        text_of(record, "a", "z")
    with pytest.raises(Unreadable, match="no list of texts in field c"):
        texts_of(record, "c")


@pytest.mark.parametrize(
    ("value", "first", "index"), [(0, 0, 0), ("2", 0, 2), (1, 1, 0), ("2", 1, 1), ("B", 0, 1), (" d ", 0, 3)]
)
def test_choices_are_numbers_or_letters(value: object, first: int, index: int) -> None:
    assert choice_of(value, 4, first) == index


@pytest.mark.parametrize("value", [4, -1, "", "E", None, True, 0.0, "AB", "²", "Ä"])
def test_a_choice_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(Unreadable, match="none of the 4 options"):
        choice_of(value, 4)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, Any]]:
        if split == "missing":
            raise ValueError("no such split")
        return [{"name": name, "config": config, "split": split, "revision": revision}]

    hub = SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda name: ["x", "y"])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert list(rows("a/b", "c", "test", "r")) == [{"name": "a/b", "config": "c", "split": "test", "revision": "r"}]
    assert config_names("a/b") == ["x", "y"]
    with pytest.raises(DataError, match="a/b, split missing: cannot be loaded: no such split"):
        list(rows("a/b", None, "missing", None))
    monkeypatch.setitem(sys.modules, "datasets", None)
    for call in (lambda: list(rows("a/b", None, "test", None)), lambda: config_names("a/b")):
        with pytest.raises(DataError, match=r"pip install 'finemoe\[hf\]'"):
            call()
