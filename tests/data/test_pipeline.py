"""prepare: from files to batches through a cache that is never stale, half written or trusted blindly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.documents import document
from finemoe.core.errors import DataError
from finemoe.data import DataConfig, FilesCorpus, PreparedData, StdlibCorpus, prepare
from finemoe.data.cache import open_or_build
from finemoe.data.shards import TokenWriter
from finemoe.text import END_OF_TEXT, Tokenizer


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    lines = [{"text": document(i), "topic": f"topic{i % 3}"} for i in range(120)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataConfig(
        corpus=FilesCorpus(paths=(str(path),), domain_field="topic"),
        vocab_size=300,
        sequence_length=16,
        validation_share=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def token_folder(config: DataConfig) -> Path:
    (folder,) = [path for path in (Path(str(config.cache_dir)) / "tokens").iterdir() if path.is_dir()]
    return folder


def streams(data: PreparedData) -> list[list[int]]:
    return [s.tokens.tolist() for side in (data.train, data.validation) for s in side.sources]


def test_every_document_arrives_once_and_ended(config: DataConfig) -> None:
    data = prepare(config)
    found = []
    for side in (data.train, data.validation):
        text = data.tokenizer.decode(side.sources[0].tokens.tolist())
        parts = text.split(END_OF_TEXT)
        assert parts.pop() == ""
        found.append(parts)
    assert sorted(found[0] + found[1]) == sorted(document(i) for i in range(120))
    report = data.report
    assert report["documents"] == {"train": len(found[0]), "validation": len(found[1])}
    assert report["bytes"]["train"] == sum(len(text.encode()) for text in found[0])
    assert report["tokens"] == {"train": data.train.num_tokens, "validation": data.validation.num_tokens}
    assert sum(sum(sides.values()) for sides in report["domains"].values()) == 120
    assert set(report["domains"]) == {"topic0", "topic1", "topic2"}
    assert (report["duplicates"], report["empty"], report["num_skipped"], report["skipped"]) == (0, 0, 0, [])
    assert json.loads(json.dumps(report)) == report


def test_a_second_run_tokenises_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config)
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    monkeypatch.setattr(Tokenizer, "train", None)
    second = prepare(config)
    assert streams(first) == streams(second)
    assert first.report == second.report
    assert first.tokenizer.fingerprint() == second.tokenizer.fingerprint()


def test_a_changed_corpus_or_tokenizer_gets_its_own_tokens(config: DataConfig) -> None:
    first = prepare(config)
    other = prepare(config.model_copy(update={"vocab_size": 280}))
    assert streams(first) != streams(other)
    assert isinstance(config.corpus, FilesCorpus)
    with open(config.corpus.paths[0], "a") as file:
        file.write(json.dumps({"text": "one more document", "topic": "topic0"}) + "\n")
    more = prepare(config)
    assert sum(more.report["documents"].values()) == 121
    assert "one more document" in more.tokenizer.decode([i for stream in streams(more) for i in stream])


def test_an_existing_tokenizer_is_used(config: DataConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([document(1)], 270)
    tokenizer.save(tmp_path / "tokenizer.json")
    data = prepare(config.model_copy(update={"tokenizer": str(tmp_path)}))
    assert data.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert not (tmp_path / "cache" / "tokenizers").exists()


@pytest.mark.parametrize("damage", ["size", "content", "meta", "missing"])
def test_damaged_tokens_are_built_again(config: DataConfig, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    before = streams(prepare(config))
    folder = token_folder(config)
    path = folder / "0-train.bin"
    content = bytearray(path.read_bytes())
    if damage == "size":
        path.write_bytes(content[:-2])
    elif damage == "content":
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING, "finemoe"):
        assert streams(prepare(config)) == before
    assert "cache is damaged" in caplog.text
    caplog.clear()
    prepare(config)
    assert "damaged" not in caplog.text


def test_a_damaged_tokenizer_is_trained_again(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    before = prepare(config).tokenizer.fingerprint()
    path = next((Path(str(config.cache_dir)) / "tokenizers").glob("*/tokenizer.json"))
    facts = json.loads(path.read_text())
    facts["model"]["merges"].pop()
    path.write_text(json.dumps(facts))
    assert prepare(config).tokenizer.fingerprint() == before
    assert "recorded hash" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "gone", "no record", "record of nothing"])
def test_a_tokenizer_that_cannot_be_read_is_trained_again(config: DataConfig, damage: str) -> None:
    before = prepare(config).tokenizer.fingerprint()
    path = next((Path(str(config.cache_dir)) / "tokenizers").glob("*/tokenizer.json"))
    record = path.with_name("fingerprint.txt")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_bytes(b"\xff")
    assert prepare(config).tokenizer.fingerprint() == before
    assert record.read_text() == before


def test_killed_between_write_and_rename(config: DataConfig) -> None:
    code = (
        "import os, sys, finemoe.data.cache as cache\n"
        "from finemoe.data import DataConfig, prepare\n"
        "rename = os.replace\n"
        "cache.os.replace = lambda a, b: os._exit(9) if str(b).find('/tokens/') > 0 else rename(a, b)\n"
        "prepare(DataConfig.model_validate_json(sys.argv[1]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, config.model_dump_json()], check=False)
    assert run.returncode == 9
    (left,) = [path for path in (Path(str(config.cache_dir)) / "tokens").iterdir() if path.is_dir()]
    assert left.name.endswith(".partial")
    data = prepare(config)
    assert not token_folder(config).name.endswith(".partial")
    assert data.report["tokens"]["train"] == data.train.num_tokens > 0


def test_an_error_while_building_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert not [path for path in (Path(str(config.cache_dir)) / "tokens").iterdir() if path.is_dir()]
    prepare(config)


def test_of_two_builders_one_builds(tmp_path: Path) -> None:
    builds = []
    barrier = threading.Barrier(4)

    def build(folder: Path) -> None:
        builds.append(folder)
        time.sleep(0.05)
        (folder / "x").write_text("done")

    def work() -> None:
        barrier.wait()
        results.append(open_or_build(tmp_path / "key", lambda folder: (folder / "x").read_text(), build))

    results: list[str] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["done"] * 4
    assert len(builds) == 1


def test_unwritable_cache_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set `cache_dir`"):
        prepare(config.model_copy(update={"cache_dir": str(tmp_path / "file")}))


def test_a_corpus_that_changes_while_it_is_read(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(config.corpus, FilesCorpus)
    path = Path(config.corpus.paths[0])
    add = TokenWriter.add

    def meddle(writer: TokenWriter, name: str, text: str) -> None:
        add(writer, name, text)
        path.write_text(json.dumps({"text": "different", "topic": "x"}) + "\n" * 100)

    monkeypatch.setattr(TokenWriter, "add", meddle)
    path.write_text("".join(json.dumps({"text": document(i, 3000), "topic": "x"}) + "\n" for i in range(40)))
    with pytest.raises(DataError, match="changed while it was being read"):
        prepare(config)


def test_too_little_text_is_refused_before_anything_is_trained(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"training tokens are fewer than one sequence of 1000000 \+ 1"):
        prepare(config.model_copy(update={"sequence_length": 1_000_000}))
    data = prepare(config)
    (tmp_path / "short.txt").write_text(document(1000))
    corpus = config.corpus.model_copy(update={"validation_paths": (str(tmp_path / "short.txt"),)})
    with pytest.raises(DataError, match=r"validation tokens are fewer than one sequence"):
        prepare(config.model_copy(update={"corpus": corpus, "sequence_length": data.validation.num_tokens}))
    available = data.train_loader(0).sequences_per_epoch
    data.require_batch(available)
    with pytest.raises(
        DataError, match=rf"{available} training sequences of 16 tokens, one batch takes {available + 1}"
    ):
        data.require_batch(available + 1)


def test_frequencies_count_the_training_tokens(config: DataConfig) -> None:
    data = prepare(config)
    frequencies = data.token_frequencies()
    assert frequencies.shape == (data.tokenizer.vocab_size,)
    assert frequencies.sum() == data.train.num_tokens
    assert frequencies[data.tokenizer.end_of_text_id] == data.report["documents"]["train"]


def test_frequencies_are_of_all_parts_and_of_the_whole_stream(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.data.pipeline._COUNT_BLOCK", 100)
    (tmp_path / "other.txt").write_text("other words " * 300)
    (tmp_path / "held.txt").write_text("held out " * 30)
    other = {"kind": "files", "paths": [str(tmp_path / "other.txt")], "validation_paths": [str(tmp_path / "held.txt")]}
    parts = [{"weight": 1, "corpus": config.corpus.model_dump()}, {"weight": 1, "corpus": other}]  # type: ignore[union-attr]
    data = prepare(DataConfig.model_validate({**config.model_dump(), "corpus": {"kind": "mixture", "parts": parts}}))
    tokens = np.concatenate([source.tokens for source in data.train.sources])
    assert len(data.train.sources) == 2
    assert np.array_equal(data.token_frequencies(), np.bincount(tokens, minlength=data.tokenizer.vocab_size))


def test_validation_is_fixed_bounded_and_drawn_evenly(config: DataConfig) -> None:
    data = prepare(config.model_copy(update={"max_validation_tokens": 160}))
    rows = torch.cat([batch.tokens for batch in data.validation_batches(3)])
    assert rows.shape == (10, 16)
    assert torch.equal(rows, torch.cat([batch.tokens for batch in data.validation_batches(10)]))
    tokens = data.validation.sources[0].tokens
    windows = [tokens[i : i + 16].tolist() for i in range(0, len(tokens) - 16, 16)]
    places = [windows.index(row) for row in rows.tolist()]
    gaps = np.diff(places)
    assert gaps.min() >= len(windows) // 10
    assert gaps.max() <= -(-len(windows) // 10)
    everything = prepare(config)
    assert sum(batch.num_sequences for batch in everything.validation_batches(7)) == len(windows)


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_bytes_per_token_is_that_of_the_predicted_text(config: DataConfig, packing: str) -> None:
    data = prepare(config.model_copy(update={"packing": packing}))
    num_bytes = num_targets = 0
    for batch in data.validation_batches(1):
        for target, weight in zip(batch.targets[0].tolist(), batch.weights[0].tolist(), strict=True):
            num_targets += int(weight)
            if weight and target != data.tokenizer.end_of_text_id:
                num_bytes += len(data.tokenizer.token_bytes[target])
    assert data.validation_bytes_per_token == pytest.approx(num_bytes / num_targets)


def test_isolated_documents_are_the_documents(config: DataConfig) -> None:
    data = prepare(config.model_copy(update={"packing": "isolate", "sequence_length": 128}))
    batch = data.train_loader(0).batch(0, 4)
    ends = batch.tokens == data.tokenizer.end_of_text_id
    assert ends.any()
    assert torch.equal(batch.weights == 0, ends)
    assert torch.equal(batch.documents[:, -1], ends[:, :-1].sum(1))


def test_mixtures_keep_their_parts_apart(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"text": f"床前明月光 {i} " * 20}) + "\n" for i in range(60))
    )
    mixture = {
        "kind": "mixture",
        "parts": [
            {"weight": 1, "corpus": config.corpus.model_dump()},  # type: ignore[union-attr]
            {"weight": 3, "corpus": {"kind": "files", "paths": [str(tmp_path / "other.jsonl")]}},
        ],
    }
    data = prepare(DataConfig.model_validate({**config.model_dump(), "corpus": mixture}))
    chinese = [("月" in data.tokenizer.decode(row.tolist())) for row in data.train_loader(5).batch(0, 400).tokens]
    assert 280 <= sum(chinese) <= 300
    assert ["月" in data.tokenizer.decode(source.tokens.tolist()) for source in data.train.sources] == [
        False,
        True,
    ]


def test_a_part_too_short_to_validate_on_is_said_and_left_out(
    config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in {"train": "one " * 400, "validation": "two"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    short = {"paths": [str(tmp_path / "train.txt")], "validation_paths": [str(tmp_path / "validation.txt")]}
    mixture = {
        "kind": "mixture",
        "parts": [
            {"weight": 1, "corpus": config.corpus.model_dump()},  # type: ignore[union-attr]
            {"weight": 1, "corpus": {"kind": "files", **short}},
        ],
    }
    with caplog.at_level(logging.WARNING, "finemoe"):
        data = prepare(DataConfig.model_validate({**config.model_dump(), "corpus": mixture}))
    assert "too little text to validate on in: 1-files" in caplog.text
    rows = torch.cat([batch.tokens for batch in data.validation_batches(8)])
    assert not any("two" in data.tokenizer.decode(row.tolist()) for row in rows)


def test_sampling_the_tokenizer_text(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(config.corpus, FilesCorpus)
    path = Path(config.corpus.paths[0])
    path.write_text("".join(json.dumps({"text": document(i, 6000), "topic": "x"}) + "\n" for i in range(40)))
    sizes = []
    train = Tokenizer.train

    def measure(texts: list[str], vocab_size: int, splitting: str) -> Tokenizer:
        texts = list(texts)
        sizes.append(sum(len(text.encode()) for text in texts))
        return train(texts, vocab_size, splitting)

    monkeypatch.setattr(Tokenizer, "train", measure)
    data = prepare(config.model_copy(update={"tokenizer_sample_bytes": 200_000}))
    assert data.report["bytes"]["train"] > 1_000_000
    assert 100_000 < sizes[0] < 300_000


def test_the_default_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path))
    data = prepare(DataConfig(corpus=StdlibCorpus(max_bytes=400_000), vocab_size=512, sequence_length=64))
    assert os.listdir(tmp_path / "tokens")
    assert data.tokenizer.vocab_size == 512
    assert data.train_loader(0).batch(0, 8).tokens.shape == (8, 64)
    assert 1.5 < data.validation_bytes_per_token < 5


def test_control_tokens_in_documents_are_text_and_said_unless_tokens_are_asked_for(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(config.corpus, FilesCorpus)
    prepare(config)
    assert "control tokens" not in caplog.text
    with open(config.corpus.paths[0], "a") as file:
        file.writelines(json.dumps({"text": f"one{END_OF_TEXT}two {i}", "topic": "topic0"}) + "\n" for i in range(3))
    data = prepare(config)
    assert data.report["control_tokens"] == {"read_as": "text", "documents": {END_OF_TEXT: 3}}
    assert f"{END_OF_TEXT} in 3" in caplog.text
    assert 'data.control_tokens = "tokens"' in caplog.text
    asked = prepare(config.model_copy(update={"control_tokens": "tokens"}))
    ends = [
        sum(stream.count(i) for stream in streams(d))
        for d, i in [(d, d.tokenizer.end_of_text_id) for d in (data, asked)]
    ]
    assert ends == [123, 126]
    assert prepare(config).report == data.report


def test_a_few_thousand_tokens_do_not_read_as_none(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "finemoe"):
        report = prepare(config).report
    train, held = (report["tokens"][side] for side in ("train", "validation"))
    (said,) = [one for one in caplog.messages if one.startswith("corpus: ")]
    assert f" {train:,} + {held:,} tokens to train and validate on" in said
