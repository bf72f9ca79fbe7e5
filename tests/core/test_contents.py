"""First bytes: what a file is called when it is not what its name says, and that text is never mistaken for it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors.torch import save_file

from finemoe.core.contents import HEAD_BYTES, JSON, contents_of, explain, explanation
from finemoe.core.encodings import decode_text, likely_encoding, mark_of

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4302376912\n"

KINDS: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(b"x"), "compressed with gzip"),
    "bzip2": (bz2.compress(b"x"), "compressed with bzip2"),
    "xz": (lzma.compress(b"x"), "compressed with xz"),
    "zstd": (zstandard.ZstdCompressor().compress(b"x"), "compressed with zstd"),
    "pointer": (POINTER, "a Git LFS pointer, not the file itself (4302376912 bytes)"),
    "weights": (pickle.dumps({"a": 1}), "a Python pickle"),
    "gguf": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "a GGUF file"),
    "document": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
    "media": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "a picture (PNG)"),
    "markup": (b"<!DOCTYPE html>\n<html><body>Access denied</body></html>", "an HTML page"),
    "program": (b"\x7fELF\x02\x01\x01" + bytes(9), "a program or library"),
    "table": (b"SQLite format 3\x00" + bytes(20), "an SQLite database"),
    "binary": (bytes(range(256)) * 4, "no text"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_told_by_its_first_bytes(kind: str) -> None:
    head, words = KINDS[kind]
    found = contents_of(head)
    assert found.kind == kind
    assert words in found.sentence


def test_files_that_libraries_write_are_told(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    pq.write_table(table, tmp_path / "parquet")
    feather.write_feather(table, tmp_path / "arrow", compression="uncompressed")
    with pa.OSFile(str(tmp_path / "arrow-stream"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    save_file({"a": torch.zeros(2)}, tmp_path / "safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "archive")
    np.save(tmp_path / "table", np.zeros(3))
    (tmp_path / "table.npy").rename(tmp_path / "table")
    for path in tmp_path.iterdir():
        assert contents_of(path.read_bytes()[:HEAD_BYTES]).kind == path.name
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    assert "ZIP archive" in str(explanation(tmp_path / "a.docx", frozenset()))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', "json-lines"),
        ('\n\n  {"text": "a"}\n{"te', "json-lines"),
        ('{"text": "a"}', "json"),
        ('{\n  "data": [{"text": "a"}]\n}', "json"),
        ('[{"text": "a"},\n {"text": "b"}]', "json"),
        ('["a", "b"]', "json"),
        ('{"text": "' + "x" * 2 * HEAD_BYTES, "json-lines"),
        ('[{"text": "' + "x" * 2 * HEAD_BYTES, "json"),
        ("[Applause] Thank you.\n", "text"),
        ("[1] A footnote, and more.", "text"),
        ("{{Infobox|a=b}} is a template.", "text"),
        ('{"a": 1, or so they say}', "text"),
        ("{ block }\n", "text"),
        ("<p align='center'>A title in Markdown</p>\n\n# More", "text"),
        ("< 5 is what it should be", "text"),
        ("GGUF is a format, and PAR1 as well", "text"),
        ("ORCs and PARENTS, ID3 and GIF89a: words", "text"),
        ("PARENTS of ORCs", "text"),
        ("ID3 is an algorithm", "text"),
        ("BM is a word", "text"),
        ("MZ is a word", "text"),
        ("ID number 3", "text"),
        ("version https://example.org/spec/v1\n", "text"),
        ("a\x00b is text with a zero byte in it, as test data may have", "text"),
        ("plain\r\n\f text\n", "text"),
        ("<?xml version='1.0'?>\n<TEI>", "markup"),
        ("<?xml version='1.0'?>\n<svg xmlns=''>", "media"),
    ],
)
def test_wording_is_told_from_prose(text: str, kind: str) -> None:
    assert contents_of(text.encode()[:HEAD_BYTES]).kind == kind


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_believed_and_taken_away(encoding: str) -> None:
    data = '{"text": "é"}\n{"text": "床"}\n'.encode(encoding)
    found = contents_of(data)
    assert (found.kind, found.encoding) == ("json-lines", (mark_of(data) or ("", 0))[0])
    assert decode_text(data).startswith('{"text"')


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["Hello, world!\n", "Привет, мир! Это текст.\n", "Grüße\n"])
def test_wide_text_without_a_mark_is_named(encoding: str, text: str) -> None:
    found = contents_of(text.encode(encoding))
    assert (found.kind, found.encoding) == ("wide", encoding)
    assert contents_of(text.encode(encoding), encoding).kind == "text"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Le café est très agréable à l’été, déjà vu."),
        ("cp1252", "Grüße aus München, schöne Straße"),
        ("cp1250", "Zażółć gęślą jaźń"),
        ("cp1251", "Привет, мир! Это обычный русский текст."),
        ("koi8-r", "Привет, мир! Это обычный русский текст."),
        ("cp1253", "Αυτό είναι ένα κείμενο"),
        ("gb18030", "我们的国家是一个很大的国家，人们都在这里生活。"),
        ("big5", "我們的國家是一個很大的國家，人們都在這裡生活。"),
        ("utf-16-le", "我们的国家是一个很大的国家，人们都在这里生活。"),
        ("cp932", "これは日本語の文章です。今日は天気がいい。"),
        ("euc_jp", "これは日本語の文章です。今日は天気がいい。"),
        ("cp949", "이것은 한국어 문장입니다."),
    ],
)
def test_the_likely_encoding_is_named(encoding: str, text: str) -> None:
    assert likely_encoding(text.encode(encoding)) == encoding


def test_no_encoding_is_named_on_a_guess() -> None:
    rng = np.random.default_rng(0)
    assert likely_encoding(rng.integers(128, 256, 4000, dtype=np.uint8).tobytes()) is None


def test_what_a_reader_wants_is_not_explained_to_it() -> None:
    valid = json.dumps({"a": 1}).encode()
    assert explain(valid, JSON) is None
    assert explain(valid, frozenset()) == "is a JSON file: convert it"
    assert explain(b"ordinary words", frozenset()) is None
    assert explanation(Path("/no/such/file"), frozenset()) is None
