"""Corpora: what is read, what is left out, and that nothing is left out silently."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import TypeAdapter

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, DataError
from finemoe.data import DataConfig, FilesCorpus, HuggingFaceCorpus, MixtureCorpus, MixturePart, StdlibCorpus
from finemoe.data.corpora import CORPORA, CorpusConfig, SplitDocument, read_corpus
from finemoe.data.documents.document import SkipReport, falls_within
from finemoe.data.scan import scan_corpus

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def files(*paths: Path | str, **fields: object) -> FilesCorpus:
    return FilesCorpus.model_validate({"paths": [str(path) for path in paths], **fields})


def read(corpus: CorpusConfig, share: float = 0.0) -> tuple[list[SplitDocument], SkipReport]:
    report = SkipReport()
    return list(read_corpus(corpus, share, report)), report


def texts(corpus: CorpusConfig) -> list[str]:
    return [item.document.text for item in read(corpus)[0]]


def json_lines(*values: object) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def parquet(path: Path, **columns: list[object]) -> bytes:
    pq.write_table(pa.table(columns), path)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture(scope="module")
def stdlib() -> list[SplitDocument]:
    return read(StdlibCorpus(), 0.05)[0]


def test_stdlib_is_ordered_split_by_file_and_free_of_duplicates(stdlib: list[SplitDocument]) -> None:
    names = [item.document.name for item in stdlib]
    assert names == sorted(names)
    assert len(set(names)) == len(names) > 300
    assert len({item.document.text for item in stdlib}) == len(stdlib)
    assert not any(part in name.split("/") for name in names for part in ("test", "site-packages", "__pycache__"))
    domains = {item.document.name: item.document.domain for item in stdlib}
    assert domains["json/decoder.py"] == "json"
    assert domains["os.py"] == "os"
    assert 0.02 < sum(item.side == "validation" for item in stdlib) / len(stdlib) < 0.1


def test_a_split_depends_on_the_name_alone(stdlib: list[SplitDocument]) -> None:
    sides = {item.document.name: item.side for item in stdlib}
    small = read(StdlibCorpus(max_bytes=1_000_000), 0.05)[0]
    assert 0 < len(small) < len(stdlib)
    assert len({item.document.domain for item in small}) > 20  # drawn over the packages, not their beginning
    assert sum(len(item.document.text.encode()) for item in small) <= 1_000_000
    assert all(sides[item.document.name] == item.side for item in small)
    assert all((item.side == "validation") == falls_within(0.05, "validation", item.document.name) for item in small)


def test_stdlib_tests_are_read_on_request() -> None:
    names = [item.document.name for item in read(StdlibCorpus(include_tests=True, max_bytes=20_000_000))[0]]
    plain = [item.document.name for item in read(StdlibCorpus())[0]]
    assert len(names) > len(plain)
    # Test folders are there in every build that installs them; where they are, they are read.
    assert any("test" in name.split("/")[:-1] or "tests" in name.split("/")[:-1] for name in names) or names == plain


@pytest.mark.parametrize("compression", COMPRESS)
def test_every_format_and_compression(tmp_path: Path, compression: str) -> None:
    contents = {
        "a.txt": b"one\r\ntwo\r",
        "b.md": "# naïve\n".encode(),
        "c.jsonl": json_lines(
            {"text": "first\u2028still first\u0085\r\n", "lang": "x"}, {"text": "second", "lang": "y"}
        ),
        "d.parquet": parquet(tmp_path / "p", text=["third", "fourth"], lang=["x", "y"]),
        "e": b"no suffix",
    }
    for name, data in contents.items():
        (tmp_path / (name + compression)).write_bytes(COMPRESS[compression](data))
    expected = [
        "one\r\ntwo\r",
        "# naïve\n",
        "first\u2028still first\u0085\r\n",
        "second",
        "third",
        "fourth",
        "no suffix",
    ]
    assert texts(files(tmp_path)) == expected
    assert read(files(tmp_path))[1] == SkipReport(kept=7)
    records = read(files(tmp_path / f"c.jsonl{compression}", tmp_path / f"d.parquet{compression}", domain_field="lang"))
    assert [item.document.domain for item in records[0]] == ["x", "y", "x", "y"]


def test_zstd_frames_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(COMPRESS[".zst"](b"one ") + COMPRESS[".zst"](b"x" * 1_000_000) + COMPRESS[".zst"](b" three"))
    assert texts(files(path)) == ["one " + "x" * 1_000_000 + " three"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_truncated_files_are_skipped_and_named(
    tmp_path: Path, compression: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"text": f"{i} {i * 7919 % 10_007} {i * 104_729 % 65_537}"} for i in range(20_000)]
    for name, data in {"lines.jsonl": json_lines(*lines), "text.txt": json_lines(*lines)}.items():
        packed = COMPRESS[compression](data)
        (tmp_path / (name + compression)).write_bytes(packed[: len(packed) * 9 // 10])
    (tmp_path / "whole.txt").write_text("fine")
    with caplog.at_level(logging.WARNING, "finemoe"):
        documents, report = read(files(tmp_path))
    assert "text.txt" + compression in caplog.text
    assert report.num_skipped == 2
    assert all("damaged" in skipped.reason for skipped in report.skipped)
    assert documents[-1].document.text == "fine"
    assert all(item.document.text == lines[i]["text"] for i, item in enumerate(documents[:-1]))


def test_malformed_records_are_skipped_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    bad = [
        b'{"text": "cut',
        b"[1]",
        b'{"text": 3}',
        b"{}",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
    ]
    good = b'\xef\xbb\xbf{"text": "first"}\n\n' + b"\n".join(bad) + b'\n{"text": "last"}'
    path.write_bytes(good)
    with caplog.at_level(logging.WARNING, "finemoe"):
        documents, report = read(files(path))
    assert [item.document.text for item in documents] == ["first", "last"]
    assert documents[-1].document.name == "a.jsonl:10"
    assert [skipped.name for skipped in report.skipped] == [f"{path}:{number}" for number in range(3, 10)]
    assert report.num_skipped == 7
    assert f"{path}:3" in caplog.text
    with pytest.raises(DataError, match=r"7 of 9 documents cannot be read .*a\.jsonl:3.*max_skipped_share"):
        scan_corpus(files(path), 0.5, 0.01)


def test_parquet_rows_without_text_or_domain_are_skipped_one_by_one(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array([b"first", b"\xff\xfe", None, b"no domain", b"last"], pa.binary()).view(pa.string()),
            "lang": ["x", "x", "x", None, "y"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    documents, report = read(files(tmp_path / "a.parquet", domain_field="lang"))
    assert [(item.document.text, item.document.domain) for item in documents] == [("first", "x"), ("last", "y")]
    reasons = {skipped.name.rpartition(":")[2]: skipped.reason for skipped in report.skipped}
    assert reasons == {"2": "not UTF-8", "3": "field `text` holds no text", "4": "field `lang` holds no domain"}


def test_undecodable_file_counts_against_the_threshold(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    assert scan_corpus(files(tmp_path), 0.5, 0.1).skips.num_skipped == 1
    with pytest.raises(DataError, match=r"1 of 10 documents .*bad\.txt: not UTF-8 \(byte 3\)"):
        scan_corpus(files(tmp_path), 0.5, 0.09)


def test_log_names_the_first_skips_and_the_report_counts_all(caplog: pytest.LogCaptureFixture) -> None:
    report = SkipReport()
    with caplog.at_level(logging.WARNING, "finemoe"):
        for i in range(1500):
            report.skip(f"file{i}", "broken")
    assert report.num_skipped == 1500
    assert len(report.skipped) == 1000
    assert "file19:" in caplog.text
    assert "file20:" not in caplog.text


def test_duplicates_and_empty_documents_are_counted(tmp_path: Path) -> None:
    for name, text in {"a": "same", "b": "same", "c": "", "d": "other"}.items():
        (tmp_path / name).write_text(text)
    documents, report = read(files(tmp_path))
    assert [item.document.name.split("/")[-1] for item in documents] == ["a", "d"]
    assert (report.kept, report.duplicates, report.empty, report.num_skipped) == (2, 1, 1, 0)


def test_no_text_is_on_both_sides_or_in_two_parts(tmp_path: Path) -> None:
    train, validation, other = (tmp_path / name for name in ("train.jsonl", "validation.jsonl", "other.jsonl"))
    train.write_bytes(json_lines(*({"text": f"t{i}"} for i in range(20))))
    validation.write_bytes(json_lines({"text": "t3"}, {"text": "v"}))
    other.write_bytes(json_lines({"text": "t4"}, {"text": "o"}))
    corpus = MixtureCorpus(
        parts=(
            MixturePart(corpus=files(train, validation_paths=[str(validation)]), weight=1),
            MixturePart(corpus=files(other), weight=1),
        )
    )
    documents, report = read(corpus)
    found = [item.document.text for item in documents]
    assert len(found) == len(set(found)) == 22
    assert [item.document.text for item in documents if item.side == "validation"] == ["t3", "v"]
    assert {item.part for item in documents if item.document.text == "t4"} == {0}
    assert report.duplicates == 2


def test_folders_globs_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("books/poems/b.txt", "books/a.txt", "books/.hidden/x.txt", "books/.y.txt", "single.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    documents = [item.document for item in read(files("books", "single.txt", "books/a.txt"))[0]]
    assert [(d.name, d.domain) for d in documents] == [
        ("books/a.txt", "books"),
        ("books/poems/b.txt", "poems"),
        ("single.txt", "single"),
    ]
    assert texts(files("books/**/*.txt")) == ["books/a.txt", "books/poems/b.txt"]
    # Moving the data must not move documents across the split.
    absolute = [item.document.name for item in read(files(tmp_path / "books"))[0]]
    assert absolute == [item.document.name for item in read(files("books"))[0]]


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pattern matches no file"):
        read(files(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"no such file or folder"):
        read(files(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match=r"corpus of kind `files` is empty"):
        scan_corpus(files(tmp_path), 0.5, 0.01)


def test_a_few_words_are_refused_with_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("the only text")
    with pytest.raises(
        DataError, match=r"the one document holds 13 bytes of text, which is too little.*64 \+ 1 tokens.* some 1,040"
    ):
        scan_corpus(files(tmp_path), 1e-9, 0.01, 64)


def test_parquet_without_the_column_is_a_mistake_not_a_skip(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(tmp_path / "p", body=["x"]))
    with pytest.raises(DataError, match=r"no column text.*body"):
        read(files(tmp_path))
    assert texts(files(tmp_path, text_field="body")) == ["x"]


def test_damaged_parquet_is_skipped(tmp_path: Path) -> None:
    data = parquet(tmp_path / "p", text=["x"] * 10)
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.parquet").write_bytes(parquet(tmp_path / "p", text=["y", None]))
    documents, report = read(files(tmp_path))
    assert [item.document.text for item in documents] == ["y"]
    assert [Path(skipped.name).name for skipped in report.skipped] == ["a.parquet", "b.parquet:2"]


def test_hugging_face_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'finemoe\[hf\]'"):
        read(HuggingFaceCorpus(name="someone/something"))


def test_hugging_face_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, str | None]]:
        if split == "missing":
            raise ValueError("no such split")
        text = f"{name} {config} {split} {revision}"
        return [{"body": text, "lang": "en"}, {"body": None, "lang": "en"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = HuggingFaceCorpus(
        name="a/b", config="c", revision="r", validation_split="dev", text_field="body", domain_field="lang"
    )
    documents, report = read(corpus)
    assert [(i.side, i.document.name, i.document.domain, i.document.text) for i in documents] == [
        ("validation", "a/b/dev:1", "en", "a/b c dev r"),
        ("train", "a/b/train:1", "en", "a/b c train r"),
    ]
    assert report.num_skipped == 2
    with pytest.raises(DataError, match="a/b, split missing: cannot be loaded: no such split"):
        read(HuggingFaceCorpus(name="a/b", split="missing"))


def test_configurations_round_trip_and_suggest() -> None:
    assert set(CORPORA) == {"stdlib", "interpreter", "problems", "files", "huggingface", "mixture"}
    data = {
        "corpus": {
            "kind": "mixture",
            "parts": [
                {"weight": 3, "corpus": {"kind": "stdlib"}},
                {"weight": 1, "corpus": {"kind": "files", "paths": ["x"]}},
            ],
        }
    }
    config = parse(DataConfig, data, "test")
    assert isinstance(config.corpus, MixtureCorpus)
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
    assert TypeAdapter(DataConfig).json_schema()
    with pytest.raises(ConfigError, match="did you mean `text_field`"):
        parse(DataConfig, {"corpus": {"kind": "files", "paths": ["x"], "text_feild": "y"}}, "test")
    with pytest.raises(ConfigError, match="validation_share"):
        parse(DataConfig, {"validation_share": 0}, "test")
