"""What users bring: content decides how a file is read, and nothing that is no text is read as prose in silence."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, DataError
from finemoe.data import FilesCorpus, SkipReport
from finemoe.data.scan import scan_corpus

RECORDS = [{"text": f'Record {i}, with {{braces}}, a "quotation"\nand a line.', "id": i} for i in range(5)]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zstd": zstandard.ZstdCompressor().compress,
    "twice": lambda data: gzip.compress(bz2.compress(data)),
}


def corpus(*paths: Path, **fields: object) -> FilesCorpus:
    return parse(FilesCorpus, {"paths": [str(path) for path in paths], **fields}, "test")


def read(*paths: Path, **fields: object) -> tuple[list[str], SkipReport]:
    report = SkipReport()
    return [document.text for document in corpus(*paths, **fields).documents(report)], report


def refusal(*paths: Path, **fields: object) -> str:
    with pytest.raises(DataError) as caught:
        scan_corpus(corpus(*paths, **fields), 0.5, 0.01)
    return str(caught.value)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["x.json.gz", "x.json", "train.jsonl.bz2", "x.txt", "x", "x.gz", "x.jsonl.zstd"])
def test_json_lines_are_told_by_content_whatever_the_name(tmp_path: Path, packed: str, name: str) -> None:
    (tmp_path / name).write_bytes(PACK[packed](LINES))
    assert read(tmp_path) == (TEXTS, SkipReport())


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "\n".join(json.dumps(record, indent=1) for record in RECORDS),
        json.dumps({"version": 1, "data": RECORDS}),
        json.dumps({"version": 1, "data": RECORDS}, indent=2),
        json.dumps(TEXTS),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_of_records_is_read_as_records(
    tmp_path: Path, content: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.data.documents.formats._JSON_CHUNK", chunk)
    (tmp_path / "x.json").write_text(content)
    assert read(tmp_path) == (TEXTS, SkipReport())


def test_one_record_alone_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "only this"}')
    (tmp_path / "b.json").write_text('{\n  "text": "and this"\n}')
    assert read(tmp_path)[0] == ["only this", "and this"]


def test_json_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(RECORDS)[:-40])
    texts, report = read(tmp_path)
    assert texts == TEXTS[:4]
    assert "not JSON from here on" in report.skipped[0].reason


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".csv.gz", ",")])
def test_separated_values_are_records(tmp_path: Path, suffix: str, delimiter: str) -> None:
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *([record["id"], record["text"]] for record in RECORDS)])
        file.write("one cell alone\n")
    data = path.read_bytes()
    path.unlink()
    (tmp_path / f"table{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    texts, report = read(tmp_path)
    assert texts == TEXTS
    assert report.skipped[0].reason == "1 cells under 2 names"
    assert "no column body; it has id, text: set `data.corpus.text_field`" in refusal(tmp_path, text_field="body")


def test_a_cell_may_be_long_and_a_quotation_mark_may_stand_anywhere(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000 + "\n")
    (tmp_path / "b.tsv").write_text('text\tid\nfine\t1\n"never\t2\nmore "words"\t3\n"Hello" he said\t4\n"a\tb"\t5\n')
    (tmp_path / "c.csv").write_text(
        'text,id\na 6" pipe,1\n"Hello" he said,2\n"two\nlines, ""one""\n",3\n"a, b",4\n\nlast,5\n'
    )
    texts, report = read(tmp_path)
    assert texts[1:] == [
        *("fine", '"never', 'more "words"', '"Hello" he said', "a\tb"),
        *('a 6" pipe', '"Hello" he said', 'two\nlines, "one"\n', "a, b", "last"),
    ]
    assert (texts[0], report.num_skipped) == ("x" * 300_000, 0)


def test_marks_that_are_never_closed_swallow_nothing(tmp_path: Path) -> None:
    lines = "".join(f"text {number},{number}\n" for number in range(50))
    (tmp_path / "a.csv").write_text(f'text,id\nfirst,0\n"never closed,1\n{lines}')
    texts, report = read(tmp_path)
    assert texts == ["first", '"never closed', *(f"text {number}" for number in range(50))]
    assert report.num_skipped == 0
    (tmp_path / "a.csv").write_text(f'text,id\nfirst,0\n"never closed,1\nno row,2,3\n"x" y,3\n{lines}')
    texts, report = read(tmp_path)
    assert texts[:4] == ["first", '"never closed', '"x" y', "text 0"]
    assert [one.reason for one in report.skipped] == ["quotation marks do not match"]


def test_a_table_beside_the_texts_is_left_out_and_one_of_theirs_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metadata.csv").write_text("file,author\none.txt,somebody\n")
    assert "no column text; it has file, author" in refusal(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} " * 300)
    with caplog.at_level(logging.WARNING, "finemoe"):
        scan = scan_corpus(corpus(tmp_path), 0.5, 0.01)
    assert (scan.skips.kept, scan.skips.num_set_aside) == (3, 1)
    assert "metadata.csv (a table without the column of the text)" in caplog.text
    for name in ("a.csv", "z.csv"):  # before it and behind it
        (tmp_path / name).write_text("id,text\n1,a text of a table\n")
        assert "metadata.csv: no column text" in refusal(tmp_path)
        (tmp_path / name).unlink()


def test_a_saved_dataset_is_read_and_its_side_files_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pa.Table.from_pylist(RECORDS)
    stream, file = tmp_path / "data-00000-of-00002.arrow", tmp_path / "data-00001-of-00002.arrow"
    with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table[:3])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table[3:])
    (tmp_path / "state.json").write_text('{\n  "_data_files": [{"filename": "x.arrow"}]\n}')
    (tmp_path / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    (tmp_path / "README.md").write_text("# About this data set")
    (tmp_path / "LICENSE").write_text("Permission is granted")
    with caplog.at_level(logging.WARNING, "finemoe"):
        scan = scan_corpus(corpus(tmp_path), 0.5, 0.01)
    assert scan.skips.kept == 5
    assert (scan.skips.num_set_aside, scan.skips.num_skipped) == (4, 0)
    assert "left out, as no text of the corpus: LICENSE (about the data), README.md (about the data)" in caplog.text
    assert len(scan.report()["set_aside"]) == 4
    assert "no column body" in refusal(tmp_path, text_field="body")


def test_a_readme_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A text")
    (tmp_path / "notes.md").write_text("# Notes")
    assert read(tmp_path / "README.md")[0] == ["# A text"]
    assert read(tmp_path / "*.md")[0] == ["# A text", "# Notes"]
    assert read(tmp_path)[0] == ["# Notes"]


BESIDE = {
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "paper.pdf": b"%PDF-1.4\n%\xe2\xe3",
    "page.html": b"<!doctype html><html><p>Words</p></html>",
    "part.htm": b"<p>Words of a fragment</p>",
    "feed.xml": b"<?xml version='1.0'?><feed/>",
    "program": b"\x7fELF\x02" + bytes(30),
    "book.docx": b"PK\x03\x04" + bytes(30),
    "model.gguf": b"GGUF\x03" + bytes(30),
    "odd.dat": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_no_text_is_counted_beside_texts_and_refused_by_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BESIDE[name])
    assert f"1 of 1 files are no text to train on: {name}" in refusal(tmp_path)
    assert f"corpus file {tmp_path / name}: is " in refusal(tmp_path / name)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    texts, report = read(tmp_path)
    assert texts == ["text 0", "text 1", "text 2"]
    assert [Path(one.name).name for one in report.set_aside] == [name]


def test_mostly_web_pages_are_refused(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.html").write_text(f"<html>{i}</html>")
    (tmp_path / "robots.txt").write_text("User-agent: *")
    assert "5 of 6 files are no text to train on: 0.html (an HTML page)" in refusal(tmp_path)


def test_pointers_and_archives_are_called_by_their_names(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 999\n"
    (tmp_path / "train.jsonl").write_bytes(pointer)
    assert "is a Git LFS pointer, not the file itself (999 bytes): run `git lfs pull`" in refusal(tmp_path)
    assert "Git LFS pointer" in refusal(tmp_path / "train.jsonl")
    (tmp_path / "inner.txt").write_text("text")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "inner.txt", "inner.txt")
    assert "is a tar archive: unpack it first" in refusal(tmp_path / "all.tar.gz")
    (tmp_path / "x.parquet").write_text("this is no table")
    assert "its name says .parquet, but it is text of another kind" in refusal(tmp_path / "x.parquet")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str, name: str) -> None:
    content = {
        "a.txt": "é 床",
        "a.jsonl": '{"text": "é 床"}\n',
        "a.json": '[{"text": "é 床"}]',
        "a.csv": "text\né 床\n",
    }
    (tmp_path / name).write_bytes(content[name].encode(encoding))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content[name].encode(encoding)))
    assert read(tmp_path) == (["é 床", "é 床"], SkipReport())


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Le café très agréable à l’été\n"),
        ("gb18030", "我们的国家是一个很大的国家，人们都在这里。\n"),
        ("koi8-r", "Привет, это обычный русский текст.\n"),
        ("utf-16-le", "Words without a mark.\n"),
        ("utf-32-le", "Words without a mark.\n"),
        ("utf-32-be", "Words without a mark.\n"),
    ],
)
def test_an_encoding_is_named_and_can_be_set(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode(encoding))
    said = refusal(tmp_path / "a.txt")
    assert f'`data.corpus.encoding = "{encoding}"`' in said
    assert "a.txt: " in said
    assert read(tmp_path, encoding=encoding) == ([text, text], SkipReport())


def test_the_first_byte_that_does_not_decode_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 300_000 + b"\xff and more")
    assert "a.txt: not UTF-8 (byte 300000): set `data.corpus.encoding`" in refusal(tmp_path)
    assert "a.txt: not ascii (byte 300000)" in refusal(tmp_path, encoding="ascii")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    assert "a.jsonl:2: not a JSON line: not UTF-8 (byte 26)" in refusal(tmp_path)
    for name in ("rot13", "hex", "punycode", "idna", "latin-99"):
        with pytest.raises(ConfigError, match="no encoding of text that Python knows"):
            corpus(tmp_path, encoding=name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_an_encoding_that_names_no_order_of_bytes_is_the_usual_one_without_a_mark(
    tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "a.txt").write_bytes("Words without a mark.\n".encode(f"{encoding}-le"))
    (tmp_path / "b.txt").write_bytes("\ufeffWords with one.\n".encode(f"{encoding}-be"))
    assert read(tmp_path, encoding=encoding) == (["Words without a mark.\n", "Words with one.\n"], SkipReport())


def test_what_a_link_is_called_counts_not_what_it_leads_to(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, where names lead to hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot):
        folder.mkdir()
    (blobs / "0a1b").write_text("text,label\none,1\ntwo,2\n")
    (blobs / "2c3d").write_text("# About the data\n")
    for name, blob in (("train.csv", "0a1b"), ("again.csv", "0a1b"), ("README.md", "2c3d")):
        (snapshot / name).symlink_to(blobs / blob)
    found, report = read(snapshot)
    assert (found, report.num_set_aside) == (["one", "two"], 1)


def test_a_wrong_field_names_what_is_there_and_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": i, "title": "a", "content": f"Some longer words {i}"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING, "finemoe"):
        said = refusal(tmp_path)
    assert "30 of 30 records have no field `text`; their fields are content, title, id" in said
    assert "set `data.corpus.text_field` to the one that holds the text, such as 'content'" in said
    assert r"`data.corpus.template`, such as '{title}\n{content}'" in said  # in the order of the record
    assert "max_skipped_share" not in said
    assert caplog.text.count("no field `text`") == 1
    assert read(tmp_path, text_field="content")[0] == [row["content"] for row in rows]
    for row in rows:
        (tmp_path / f"{row['id']}.json").write_text(json.dumps(row))
    (tmp_path / "a.jsonl").unlink()
    assert "have no field `text`; their fields are content, title, id" in refusal(tmp_path)


def test_conversations_are_told_honestly(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert "`messages` holds conversations, and a corpus is plain text" in refusal(tmp_path)
    template = "{messages[0][content]} / {messages.1.content}"
    assert read(tmp_path, template=template)[0] == ["hi / hello"]


def test_a_few_papers_beside_one_long_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a long text " * 1000)
    for name in ("a.pdf", "b.html"):
        (tmp_path / name).write_bytes(BESIDE["paper.pdf" if name == "a.pdf" else "page.html"])
    scan = scan_corpus(corpus(tmp_path), 0.5, 0.01)
    assert (scan.skips.kept, scan.skips.num_set_aside) == (1, 2)


def test_the_only_list_of_an_object_is_its_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": "1.0", "articles": [{"text": "one"}, {"text": "two"}]}))
    (tmp_path / "b.json").write_text(json.dumps({"files": [{"name": "x"}], "version": 2}))  # no text of the corpus
    texts, report = read(tmp_path)
    assert (texts, report.num_set_aside) == (["one", "two"], 1)
    assert "their fields are name" in refusal(tmp_path / "b.json")


def test_prose_that_begins_with_a_list_is_prose(tmp_path: Path) -> None:
    for number, text in enumerate(["[]\nis an empty list", "[1, 2] and more", "[x] done"]):
        (tmp_path / f"{number}.txt").write_text(text)
    assert read(tmp_path)[0] == ["[]\nis an empty list", "[1, 2] and more", "[x] done"]
