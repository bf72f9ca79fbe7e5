"""Traces against the decisions themselves, row by row; whole or not there; errors in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from finemoe.analysis import trace as module
from finemoe.analysis.passages import Passages, batches, observe, read_passages
from finemoe.analysis.trace import SCHEMA, entropy_of, read_trace, softmax_entropy, trace_info, write_trace
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import DataError, RunError
from finemoe.model.moe.decision import RoutingDecision
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, moe_table, small_config

TEXTS = {"prose": "the cat sat on the mat ünd the dög. " * 5, "numbers": "one two three four. " * 6}
_TWO_WIDTHS = moe_table(num_routed_experts=9, experts_per_token=3)


def opened_model(kind: str = "softmax_topk") -> LanguageModel:
    """Two MoE layers with different numbers of experts; byte tokens alone, so that some are no UTF-8."""
    config = small_config(
        vocab_size=300, num_layers=3, feed_forward=moe_table(kind), leading={"count": 1, "feed_forward": _TWO_WIDTHS}
    )
    tokenizer = Tokenizer.train(["the cat "] * 3, vocab_size=262)
    return LanguageModel(build(config).eval(), tokenizer, Path("model"), own=True, reach=16)


def passages_of(tmp_path: Path, opened: LanguageModel) -> list[Passages]:
    corpora = []
    for name, text in TEXTS.items():
        for half in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{half}.txt").write_text(text + str(half))
        corpora.append(f"{name}={tmp_path / name}")
    return read_passages(opened, corpora=corpora, tokens=333, length=16)


def traced(path: Path, opened: LanguageModel, passages: list[Passages], rows: int = 4, **about: Any) -> Path:
    for _ in write_trace(path, opened, passages, observe(opened, passages, rows=rows, description=None), about):
        pass
    return path


def expected(opened: LanguageModel, passages: list[Passages]) -> list[dict[str, Any]]:
    """Every row, from loops over one window at a time."""
    made = []
    for passage in passages:
        document = -1
        for number, window in enumerate(passage.windows.astype(np.int64)):
            output = opened.model(torch.from_numpy(window[None, :-1]), record=True)
            losses = -opened.model.logits(output.hidden)[0].log_softmax(dim=-1)
            for position, token in enumerate(window[:-1].tolist()):
                document += token == opened.tokenizer.end_of_text_id
                if number * passage.length + position >= passage.num_targets:
                    continue
                for layer, record in output.routing.items():
                    scores = record.decision.scores[position].double().tolist()
                    shares = [score / sum(scores) for score in scores]
                    made.append({
                        "domain": passage.domain, "document": document, "window": number, "position": position,
                        "token_id": token, "layer": layer,
                        "token": opened.tokenizer.token_bytes[token].decode(errors="backslashreplace"),
                        "expert_ids": record.decision.expert_ids[position].tolist(),
                        "gate_weights": pytest.approx(record.decision.gate_weights[position].tolist(), rel=1e-4),
                        "loss": pytest.approx(losses[position, window[position + 1]].item(), rel=1e-4),
                        "entropy": pytest.approx(-sum(p * math.log(p) for p in shares if p), rel=1e-4, abs=1e-6),
                    })  # fmt: skip
    return made


def by_place(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["domain"], row["window"], row["position"], row["layer"]))


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_biased", "hash_layer"])
def test_every_row_is_what_the_model_decided(kind: str, tmp_path: Path):
    opened = opened_model(kind)
    passages = passages_of(tmp_path, opened)
    path = traced(tmp_path / "t.parquet", opened, passages)
    found = [row for batch in read_trace(path) for row in batch.to_pylist()]
    wanted = expected(opened, passages)
    assert len(found) == len(wanted) == 3 * sum(passage.num_targets for passage in passages)
    assert max(row["document"] for row in found) == 1
    assert any("\\x" in row["token"] for row in found)
    for ours, theirs in zip(by_place(found), by_place(wanted), strict=True):
        assert ours == theirs


def test_row_groups_and_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = opened_model()
    passages = passages_of(tmp_path, opened)
    whole = traced(tmp_path / "whole.parquet", opened, passages, rows=64)
    monkeypatch.setattr(module, "_GROUP_TOKENS", 50)
    cut = traced(tmp_path / "cut.parquet", opened, passages, rows=1)
    assert pq.ParquetFile(cut).num_row_groups > pq.ParquetFile(whole).num_row_groups == 3
    one, other = ([row for b in read_trace(p) for row in b.to_pylist()] for p in (whole, cut))
    for ours, theirs in zip(by_place(one), by_place(other), strict=True):
        for name in ("gate_weights", "loss", "entropy"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), rel=1e-4)
        assert ours == theirs


def test_what_waits_is_bounded_by_the_choices_of_deep_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_GROUP_CHOICES", 16 * 7)
    opened = opened_model()
    path = traced(tmp_path / "t.parquet", opened, passages_of(tmp_path, opened), rows=1)
    file = pq.ParquetFile(path).metadata
    assert max(file.row_group(i).num_rows for i in range(file.num_row_groups)) < 2 * 16


def test_other_tools_read_it(tmp_path: Path):
    opened = opened_model()
    passages = passages_of(tmp_path, opened)
    path = traced(tmp_path / "t.parquet", opened, passages)
    table = pq.read_table(path, filters=[("layer", "=", 1), ("domain", "=", "numbers")])
    numbers = next(passage for passage in passages if passage.domain == "numbers")
    assert table.num_rows == numbers.num_targets
    ids = np.array(table["token_id"]).tolist()
    flat = numbers.windows[:, :-1].reshape(-1)[: numbers.num_targets]
    assert ids == flat.tolist()


def test_columns_and_layers_can_be_chosen(tmp_path: Path):
    opened = opened_model()
    path = traced(tmp_path / "t.parquet", opened, passages_of(tmp_path, opened))
    found = list(read_trace(path, columns=["layer", "expert_ids"], layers=[2]))
    assert {name for batch in found for name in batch.schema.names} == {"layer", "expert_ids"}
    assert {value for batch in found for value in batch["layer"].to_pylist()} == {2}
    with pytest.raises(DataError, match="no column 'gate'"):
        next(read_trace(path, columns=["gate"]))
    with pytest.raises(DataError, match=r"layer 7 .* it has \[0, 1, 2\]"):
        next(read_trace(path, layers=[7]))


def test_the_file_says_what_it_is(tmp_path: Path):
    opened = opened_model()
    passages = passages_of(tmp_path, opened)
    info = trace_info(traced(tmp_path / "t.parquet", opened, passages, command="finemoe trace"))
    assert info.metadata["version"] == 1
    assert info.metadata["tokenizer"] == opened.tokenizer.fingerprint()
    assert info.metadata["config"] == opened.model.config.model_dump(mode="json")
    assert info.metadata["domains"] == {passage.domain: passage.num_targets for passage in passages}
    assert info.metadata["command"] == "finemoe trace"
    assert info.domains == [passage.domain for passage in passages]
    assert info.rows == 3 * sum(info.metadata["domains"].values())


def test_a_trace_cut_short_leaves_nothing(tmp_path: Path):
    opened = opened_model()
    passages = passages_of(tmp_path, opened)
    out = tmp_path / "out" / "t.parquet"
    writing = write_trace(out, opened, passages, observe(opened, passages, rows=1, description=None), {})
    next(writing)
    assert not out.exists()
    assert [path.name[:11] for path in out.parent.iterdir()] == [".t.parquet."]
    writing.close()
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: object, batch: object) -> None:
        raise OSError(28, "No space left on device")

    opened = opened_model()
    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    with pytest.raises(RunError, match="the disk is full"):
        traced(tmp_path / "out" / "t.parquet", opened, passages_of(tmp_path, opened))
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_trace_is_refused(tmp_path: Path):
    opened = opened_model()
    good = traced(tmp_path / "t.parquet", opened, passages_of(tmp_path, opened)).read_bytes()
    half, other = tmp_path / "half.parquet", tmp_path / "other.parquet"
    half.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        trace_info(half)
    with pytest.raises(DataError, match="no such file"):
        next(read_trace(tmp_path / "missing.parquet"))
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(DataError, match="not made by `finemoe trace`"):
        trace_info(other)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"finemoe.trace": '{"version": 9}'}), other)
    with pytest.raises(DataError, match="version 9"):
        trace_info(other)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"finemoe.trace": '{"version": 1}'}), other)
    with pytest.raises(DataError, match="columns"):
        trace_info(other)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_short_way_to_a_softmax_entropy_is_exact(scale: float):
    logits = torch.randn(200, 63) * scale
    scores = logits.softmax(dim=-1)
    decision = RoutingDecision(scores.topk(7).indices, scores.topk(7).values, scores, logits)
    exact = torch.special.entr(logits.double().softmax(dim=-1)).sum(dim=-1)
    assert torch.allclose(softmax_entropy(decision).double(), exact, atol=2e-5)
    assert torch.allclose(entropy_of(scores).double(), exact, atol=2e-5)


def test_nothing_may_be_null():
    assert not any(field.nullable for field in SCHEMA)


def test_isolated_documents_count_no_separator(tmp_path: Path):
    base = opened_model()
    opened = LanguageModel(base.model, base.tokenizer, base.source, own=True, reach=16, isolated=True)
    passages = passages_of(tmp_path, opened)
    path = traced(tmp_path / "t.parquet", opened, passages)
    weight = sum(int(batch.weights.sum()) for _, batch in batches(opened, passages))
    assert trace_info(path).rows == 3 * weight
    ids = {value for batch in read_trace(path, columns=["token_id"]) for value in batch["token_id"].to_pylist()}
    assert opened.tokenizer.end_of_text_id not in ids
