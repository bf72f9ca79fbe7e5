"""Labelled text as windows: every token once, filling without weight, domains in order, nothing silent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.analysis.passages import MOST_DOMAINS, ReadAs, batches, observe, read_passages, require_experts, run_batch
from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.core.errors import ConfigError, DataError
from finemoe.model.config import ModelConfig
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, small_config

TOKENIZER = Tokenizer.train(["def main():\n    return 1\n"] * 5, vocab_size=290)


def opened(config: ModelConfig | None = None, *, isolated: bool = False, reach: int | None = 8) -> LanguageModel:
    model = build(config or small_config(vocab_size=300)).eval()
    return LanguageModel(model, TOKENIZER, Path("somewhere"), True, reach, isolated)


def corpus(folder: Path, **domains: list[str]) -> list[str]:
    """A JSON Lines file for each domain, as --corpus names them."""
    for name, texts in domains.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [f"{name}={folder / name}.jsonl" for name in domains]


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 60))
def test_every_token_is_a_target_once(texts: list[str], length: int, tokens: int) -> None:
    (passage,) = read_passages(opened(), texts=texts, tokens=tokens, length=length)
    end = TOKENIZER.end_of_text_id
    expected = [i for text in texts for i in (*TOKENIZER.encode(text), end)][:tokens]
    targets = passage.windows[:, 1:].reshape(-1)
    assert targets[: passage.num_targets].tolist() == expected
    width = min(length, len(expected))
    assert passage.windows.shape == (-(-len(expected) // width), width + 1), "no window is filling alone"
    assert passage.windows[0, 0] == end, "a run's documents follow the end of the one before"
    assert np.array_equal(passage.windows[1:, 0], passage.windows[:-1, -1]), "windows overlap by one"


def test_a_text_of_long_tokens_does_not_end_before_its_end() -> None:
    """A long text is cut before it is tokenised; where a token has many characters, farther behind."""
    dashes = Tokenizer.train(["-" * 256 + "\n"] * 20, vocab_size=300)
    model = replace(opened(), tokenizer=dashes)
    text = "-" * 40_000
    whole = dashes.encode(text)
    assert len(text) > 64 * len(whole)
    (passage,) = read_passages(model, texts=[text, "abc"], tokens=100, length=10)
    assert passage.windows[:, 1:].reshape(-1).tolist()[:100] == whole[:100]


def test_filling_has_no_weight(tmp_path: Path) -> None:
    model = opened()
    passages = read_passages(model, texts=["abcdefghijk"], length=4)
    total = sum(batch.weights.sum().item() for _, batch in batches(model, passages, rows=2))
    assert total == passages[0].num_targets
    assert total % 4, "the last window must be filled for this to say anything"


def test_labels_and_folders_are_domains_largest_first(tmp_path: Path) -> None:
    specs = corpus(tmp_path, small=["a"], large=["b" * 200])
    assert [passage.domain for passage in read_passages(opened(), corpora=specs)] == ["large", "small"]
    for name in ("x", "y"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "file.txt").write_text(name * 9)
    found = read_passages(opened(), corpora=[str(tmp_path / "tree")])
    assert {passage.domain for passage in found} == {"x", "y"}


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en" / "file.txt").write_text("def main")
    (passage,) = read_passages(opened(), corpora=[str(tmp_path / "lang=en" / "file.txt")])
    assert passage.num_targets > 1
    (passage,) = read_passages(opened(), corpora=[f"words={tmp_path / 'lang=en'}"])
    assert passage.domain == "words"
    for spec in ("=somewhere", "label="):
        with pytest.raises(ConfigError, match="LABEL=PATH"):
            read_passages(opened(), corpora=[spec])
    with pytest.raises(DataError):
        read_passages(opened(), corpora=["a" * 5000])


def test_small_domains_beyond_the_most_are_one(tmp_path: Path) -> None:
    names = {f"d{number:02}": [f"text {number:02} " * (40 - number)] for number in range(MOST_DOMAINS + 3)}
    found = read_passages(opened(), corpora=corpus(tmp_path, **names), tokens=5000)
    assert [passage.domain for passage in found] == [*list(names)[:MOST_DOMAINS], "other"]
    wanted = sum(len(TOKENIZER.encode(names[name][0])) + 1 for name in list(names)[MOST_DOMAINS:])
    assert found[-1].num_targets == wanted


def test_a_text_that_occurs_twice_is_read_once(tmp_path: Path) -> None:
    (passage,) = read_passages(opened(), corpora=corpus(tmp_path, twice=["same text", "same text"]))
    assert passage.num_targets == len(TOKENIZER.encode("same text")) + 1


def test_windows_do_not_see_each_other() -> None:
    """Each window alone gives the losses it has in a batch, positions from 0 in each."""
    model = opened()
    passages = read_passages(model, texts=["def main(): return 1" * 3], length=6)
    together = torch.cat([one.losses for one in observe(model, passages, rows=5, description=None)])
    alone = torch.cat([one.losses for one in observe(model, passages, rows=1, description=None)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_isolated_documents_do_not_see_each_other_either() -> None:
    """The second document's losses are the same whatever stands before it, for a model trained that way only."""
    for isolated in (True, False):
        model = opened(isolated=isolated, reach=64)
        losses = []
        for first in ("main", "1111"):
            passages = read_passages(model, texts=[first, "return 1"], length=64)
            (one,) = observe(model, passages, description=None)
            start = len(TOKENIZER.encode(first)) + 1
            losses.append(one.losses[0, start + 1 : start + 5])
        if isolated:
            torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        else:
            assert not torch.allclose(*losses, atol=1e-4)


def test_losses_are_those_of_the_logits() -> None:
    model = opened()
    for _, batch in batches(model, read_passages(model, texts=["def main"], length=5)):
        output, losses = run_batch(model, batch)
        logits = model.model.logits(output.hidden).detach()
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": [""]}, None, ""),
        ({"texts": ["a"], "tokens": 0}, ConfigError, "tokens 0"),
        ({"texts": ["a"], "length": -1}, ConfigError, "length -1"),
        ({"texts": ["a"], "length": 0}, ConfigError, "length 0"),
        ({"corpora": ["x=/nowhere/at/all"]}, DataError, "no such file"),
        ({"texts": ["a", "caf\udce9"]}, DataError, "text 2 is not valid Unicode"),  # bytes of another encoding
    ],
)
def test_what_cannot_be_read_is_said(arguments: dict[str, object], error: type[Exception] | None, message: str) -> None:
    if error is None:
        assert read_passages(opened(), **arguments)[0].num_targets == 1  # type: ignore[arg-type]
        return
    with pytest.raises(error, match=message):
        read_passages(opened(), **arguments)  # type: ignore[arg-type]


def test_documents_that_stand_alone_need_a_token_to_go_on_from() -> None:
    """Under `isolate` nothing predicts a document's first token, so a domain of nothing else has no loss at all."""
    alone = opened(isolated=True)
    for arguments in ({"texts": [""]}, {"texts": ["def main"], "tokens": 1}):
        with pytest.raises(DataError, match="reads them apart"):
            read_passages(alone, **arguments)  # type: ignore[arg-type]
    (passage,) = read_passages(alone, texts=["def main"], tokens=2)
    assert sum(batch.weights.sum().item() for _, batch in batches(alone, [passage])) == 1


def test_windows_beyond_the_models_length_are_said(caplog: pytest.LogCaptureFixture) -> None:
    read_passages(opened(reach=8), texts=["def main"], length=8)
    assert not caplog.records
    read_passages(opened(reach=8), texts=["def main"], length=9)
    assert "longer than the 8" in caplog.text


def test_a_dense_model_has_no_experts() -> None:
    dense = small_config(vocab_size=300, feed_forward={"kind": "dense", "ffn_hidden_size": 8})
    with pytest.raises(ConfigError, match="dense"):
        require_experts(opened(dense))
    require_experts(opened())


def test_a_run_says_how_it_was_trained(tmp_path: Path) -> None:
    """Length and packing come from the run's configuration, its checkpoints' included."""
    from finemoe.checkpoint.run_state.state import RunState, save

    config = small_config(vocab_size=300)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 24, "packing": "isolate"}})
    (tmp_path / "config.json").write_text(text)
    save(tmp_path / "checkpoints", 1, RunState(build(config).state_dict(), {}, {"step": 1}, text), keep=1)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for source in (tmp_path, tmp_path / "checkpoints" / "step-00000001"):
        found = open_language_model(source)
        assert (found.own, found.reach, found.isolated) == (True, 24, True)
        assert found.first_id == TOKENIZER.end_of_text_id
    for damaged in ("long", -3, None, [24], True):
        table = {**json.loads(text), "data": {"sequence_length": damaged, "packing": "isolate"}}
        (tmp_path / "config.json").write_text(json.dumps(table))
        found = open_language_model(tmp_path)
        assert (found.reach, found.isolated) == (None, True), "only a hint is lost"


def test_no_setting_is_named_that_a_verb_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"text": "one"}\n{"no text": 1}\n')
    with pytest.raises(DataError, match="mend or remove them") as error:
        read_passages(opened(), corpora=[str(tmp_path / "odd.jsonl")])
    assert "max_skipped_share" not in str(error.value)


def test_fields_and_encodings_of_a_corpus_are_those_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_bytes("question,answer\nWas?,Käse\n".encode("cp1252"))
    options = {"template": "{question} {answer}", "encoding": "cp1252"}
    (passage,) = read_passages(opened(), corpora=[ReadAs(f"qa={tmp_path / 'qa.csv'}", options)])
    assert passage.domain == "qa"
    ids = passage.windows[:, 1:].reshape(-1)[: passage.num_targets - 1]
    assert TOKENIZER.decode(ids.tolist()) == "Was? Käse"
    with pytest.raises(DataError, match=r"no column text; it has question, answer.*--text-field"):
        read_passages(opened(), corpora=[ReadAs(str(tmp_path / "qa.csv"), {"encoding": "cp1252"})])
    with pytest.raises(ConfigError, match="--corpus x: `encoding`"):
        read_passages(opened(), corpora=[ReadAs("x", {"encoding": "klingon"})])


def test_a_run_that_held_out_a_tail_is_read_on_that_tail(tmp_path: Path) -> None:
    from finemoe.checkpoint.run_state.state import RunState, save
    from finemoe.data import DataConfig, prepare

    (tmp_path / "one.txt").write_text("".join(f"line {i} of the only text\n" for i in range(300)))
    corpus = {"kind": "files", "paths": [str(tmp_path / "one.txt")]}
    data = {"corpus": corpus, "sequence_length": 8, "vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
    held = prepare(DataConfig.model_validate(data)).report["bytes"]["validation"]
    config = small_config(vocab_size=300)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": data})
    (tmp_path / "config.json").write_text(text)
    save(tmp_path / "checkpoints", 1, RunState(build(config).state_dict(), {}, {"step": 1}, text), keep=1)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (passage,) = read_passages(open_language_model(tmp_path), tokens=1_000_000)
    ids = passage.windows[:, 1:].reshape(-1)[: passage.num_targets - 1]
    assert len(TOKENIZER.bytes_of(ids.tolist())) == held
