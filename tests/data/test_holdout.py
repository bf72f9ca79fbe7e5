"""Few documents: the tail of the text is held out, said in one line, and nothing is on both sides."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.documents import document
from finemoe.core.errors import DataError
from finemoe.data import DataConfig, FilesCorpus, MixtureCorpus, MixturePart, SkipReport, held_out, prepare, read_corpus
from finemoe.data.documents.document import falls_within
from finemoe.data.holdout import Tail, divided
from finemoe.data.scan import scan_corpus

LENGTH = 16


def text(number: int, lines: int = 40) -> str:
    return "".join(document(number * 1000 + line, 8) for line in range(lines))


def write(folder: Path, count: int, lines: int = 40) -> FilesCorpus:
    folder.mkdir()
    for number in range(count):
        (folder / f"part{number}.txt").write_text(text(number, lines))
    return FilesCorpus(paths=(str(folder),))


def config(corpus: FilesCorpus | MixtureCorpus, tmp_path: Path, **more: object) -> DataConfig:
    fields = {"vocab_size": 300, "sequence_length": LENGTH, "cache_dir": str(tmp_path / "cache"), **more}
    return DataConfig.model_validate({"corpus": corpus.model_dump(), **fields})


@pytest.mark.parametrize("count", [1, 2, 6, 7, 10])
def test_few_documents_are_trained_on(tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture) -> None:
    corpus = write(tmp_path / "few", count)
    with caplog.at_level(logging.INFO, "finemoe"):
        data = prepare(config(corpus, tmp_path))
    drawn = [falls_within(0.05, "validation", f"few/part{i}.txt") for i in range(count)]
    tail = not any(drawn) or all(drawn)
    assert ("is kept for validation" in caplog.text) is tail
    assert data.report["held_out"] == ("the tail of the text" if tail else "whole documents")
    train, validation = (
        data.tokenizer.decode(side.sources[0].tokens.tolist()) for side in (data.train, data.validation)
    )
    for number in range(count):
        lines = text(number).splitlines()
        assert all((line in train) != (line in validation) for line in lines)
        assert not tail or lines[0] in train
    assert not tail or text(count - 1).splitlines()[-1] in validation
    assert 0.02 < data.validation.num_tokens / (data.train.num_tokens + data.validation.num_tokens) < 0.45
    held = list(held_out(corpus, 0.05, LENGTH, SkipReport()))
    assert sum(len(one.text.encode()) for one in held) == data.report["bytes"]["validation"]


def test_long_documents_give_their_tails_and_short_ones_are_held_out_whole(tmp_path: Path) -> None:
    names = [name for name in (f"d{i}" for i in range(200)) if not falls_within(0.05, "validation", f"{name}.txt")][:6]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(text(len(name), 400) + name)
    long = FilesCorpus(paths=tuple(str(tmp_path / f"{name}.txt") for name in names))
    scan = scan_corpus(long, 0.05, 0.01, LENGTH)
    assert [scan.totals[side].documents for side in ("train", "validation")] == [6, 6]
    assert scan.totals["validation"].num_bytes == pytest.approx(0.05 * scan.totals["train"].num_bytes / 0.95, rel=0.2)
    rows = [{"text": document(i, 12)} for i in range(400)]
    path = tmp_path / "rows.jsonl"
    chosen = [row for i, row in enumerate(rows, 1) if not falls_within(0.05, "validation", f"rows.jsonl:{i}")][:40]
    names = [f"rows.jsonl:{i}" for i in range(1, 41)]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    if any(falls_within(1e-6, "validation", name) for name in names):
        pytest.skip("a draw of one in a million")
    scan = scan_corpus(FilesCorpus(paths=(str(path),)), 1e-6, 0.01, LENGTH)
    assert scan.totals["train"].documents + scan.totals["validation"].documents in (40, 41)
    assert scan.totals["validation"].documents < 5


def test_documents_that_all_fall_on_the_validation_side_are_trained_on(tmp_path: Path) -> None:
    corpus = write(tmp_path / "few", 4)
    data = prepare(config(corpus, tmp_path, validation_share=0.999999))
    assert data.report["documents"] == {"train": 4, "validation": 4}
    assert data.train.num_tokens > LENGTH


def test_the_two_ways_to_split_have_caches_of_their_own(tmp_path: Path) -> None:
    corpus = write(tmp_path / "few", 3)
    first, wider = prepare(config(corpus, tmp_path)), prepare(config(corpus, tmp_path, validation_share=0.3))
    assert first.report["corpus_sha256"] != wider.report["corpus_sha256"]
    again = prepare(config(corpus, tmp_path))
    assert again.validation.sources[0].tokens.tolist() == first.validation.sources[0].tokens.tolist()
    assert len([p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]) == 2


def test_where_documents_do_nothing_changes(tmp_path: Path) -> None:
    corpus = write(tmp_path / "many", 60, 5)
    plain = list(read_corpus(corpus, 0.2, SkipReport()))
    scan = scan_corpus(corpus, 0.2, 0.01, LENGTH)
    assert scan.tails == {}
    assert {side: scan.totals[side].documents for side in scan.totals} == {
        side: sum(found.side == side for found in plain) for side in ("train", "validation")
    }


def test_a_part_of_one_file_does_not_stop_a_mixture(tmp_path: Path) -> None:
    named = write(tmp_path / "many", 40, 5)
    single = write(tmp_path / "single", 1, 50)
    mixture = MixtureCorpus(parts=(MixturePart(corpus=named, weight=1), MixturePart(corpus=single, weight=1)))
    data = prepare(config(mixture, tmp_path, validation_share=0.2))
    assert data.report["held_out"] == "whole documents"  # the first part has what validation needs
    alone = MixtureCorpus(
        parts=(MixturePart(corpus=single, weight=1), MixturePart(corpus=write(tmp_path / "b", 1), weight=2))
    )
    both = prepare(config(alone, tmp_path, max_skipped_share=0.5))
    assert all(source.num_windows(LENGTH) for source in both.validation.sources[:1])


def test_little_text_holds_out_what_a_sequence_needs_and_too_little_says_so(tmp_path: Path) -> None:
    corpus = write(tmp_path / "few", 1, 10)
    data = prepare(config(corpus, tmp_path, sequence_length=64))
    assert data.validation.sources[0].num_windows(64) >= 1
    (tmp_path / "words.txt").write_text("a few words")
    with pytest.raises(
        DataError, match=r"the one document holds 11 bytes of text, which is too little: one sequence of 64 \+ 1 tokens"
    ):
        prepare(config(FilesCorpus(paths=(str(tmp_path / "words.txt"),)), tmp_path, sequence_length=64))


def test_documents_drawn_for_validation_that_make_no_sequence_are_no_reason_to_stop(tmp_path: Path) -> None:
    corpus = write(tmp_path / "few", 20, 5)
    plain = scan_corpus(corpus, 0.2, 0.01)
    drawn = plain.totals["validation"].num_bytes
    assert plain.tails == {}
    length = drawn // 2  # fewer tokens than that, although more bytes
    data = prepare(config(corpus, tmp_path, validation_share=0.2, sequence_length=length))
    assert data.report["held_out"] == "the tail of the text"
    assert data.validation.sources[0].num_windows(length) >= 1
    held = list(held_out(corpus, 0.2, length, SkipReport()))
    assert sum(len(one.text.encode()) for one in held) == data.report["bytes"]["validation"]


@given(
    st.lists(st.text("ab \né床", min_size=1, max_size=60), min_size=1, max_size=6), st.floats(0.01, 0.5), st.booleans()
)
def test_tails_lose_and_double_nothing(texts: list[str], share: float, of_each: bool) -> None:
    tail, before, train, validation = Tail(share, sum(map(len, texts)), of_each), 0, [], []
    for one in texts:
        pieces = list(divided(one, tail, before))
        assert "".join(piece for _, piece in pieces) == one
        assert [aside for aside, _ in pieces] == sorted(aside for aside, _ in pieces)
        train += [piece for aside, piece in pieces if not aside]
        validation += [piece for aside, piece in pieces if aside]
        before += len(one)
    if not of_each:
        assert "".join([*train, *validation]) == "".join(texts)
        assert sum(map(len, validation)) <= share * tail.total + 1
