"""Gate and token scores against loops over tokens (ESFT), selection, and the file that says what was selected."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.analysis.passages import Passages
from finemoe.analysis.relevance import (
    Relevance,
    expert_relevance,
    most_relevant,
    relevance_results,
    sample_length,
    select_experts,
)
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.checkpoint.selection import ExpertSelection, read_selection, router_fingerprint, write_selection
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from oracles.models import VOCAB, build, moe_table, small_config, v3_config

LENGTH = 6
CONFIGS = {"DeepSeekMoE": small_config(num_layers=3), "V3": v3_config(num_layers=3)}


def opened(config: ModelConfig, seed: int = 0, reach: int | None = LENGTH) -> LanguageModel:
    tokenizer: Any = SimpleNamespace(end_of_text_id=0, bos_id=None)
    return LanguageModel(build(config, seed).eval(), tokenizer, Path("somewhere"), True, reach)


def passages(windows: int = 5, filled: int = 2) -> list[Passages]:
    ids = np.random.default_rng(3).integers(0, VOCAB, (windows, LENGTH + 1), dtype=np.int32)
    return [Passages("task", ids, (windows - 1) * LENGTH + filled)]


@torch.no_grad()
def oracle(model: LanguageModel, text: list[Passages]) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Section 3.2 of the paper: 1/N_s sum_j 1/L_j sum_k of g, or of 1(g > 0)/K."""
    gate: dict[int, list[float]] = {}
    token: dict[int, list[float]] = {}
    left, windows = text[0].num_targets, text[0].windows.astype(np.int64)
    for window in windows:
        length = min(left, LENGTH)
        left -= length
        for layer, record in model.model(torch.tensor(window[None, :-1]), record=True).routing.items():
            ids, gates = record.decision.expert_ids.tolist(), record.decision.gate_weights.tolist()
            for k in range(length):
                for expert, weight in zip(ids[k], gates[k], strict=True):
                    gate.setdefault(layer, [0.0] * 6)[expert] += weight / length / len(windows)
                    token.setdefault(layer, [0.0] * 6)[expert] += (weight > 0) / len(ids[k]) / length / len(windows)
    return gate, token


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_loop(name: str, rows: int) -> None:
    model, text = opened(CONFIGS[name]), passages()
    found = expert_relevance(model, text, rows=rows, description=None)
    gate, token = oracle(model, text)
    assert set(found.gate) == set(found.token) == {1, 2}  # prediction modules are not the model's layers
    for layer in (1, 2):
        np.testing.assert_allclose(found.gate[layer], gate[layer], rtol=1e-5)
        np.testing.assert_allclose(found.token[layer], token[layer], rtol=1e-5)
        assert found.token[layer].sum() == pytest.approx(1)
    assert (found.samples, found.tokens) == (5, 4 * LENGTH + 2)


def test_shares_sum_to_one_over_the_experts_of_each_layer() -> None:
    found = expert_relevance(opened(CONFIGS["DeepSeekMoE"]), passages(), description=None)
    for score in ("gate", "token"):
        for layer, shares in found.shares(score).items():  # type: ignore[arg-type]
            assert shares.sum() == pytest.approx(1)
            np.testing.assert_allclose(shares, vars(found)[score][layer] / vars(found)[score][layer].sum())


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any), st.floats(0.01, 1))
def test_selection_is_the_smallest_set_of_the_best_that_reaches_p(counts: list[int], p: float) -> None:
    shares = np.array(counts) / sum(counts)
    chosen = most_relevant(shares, p)
    assert shares[chosen].sum() >= p - 1e-9
    assert shares[chosen[:-1]].sum() < p  # one less does not reach it
    outside = [e for e in range(len(shares)) if e not in chosen]
    assert all(shares[e] <= shares[chosen[-1]] for e in outside)
    assert chosen == sorted(chosen, key=lambda e: (-shares[e], e))


def test_sums_that_fall_short_by_rounding_reach_p() -> None:
    assert most_relevant(np.array([0.1] * 10), 0.3) == [0, 1, 2]
    assert most_relevant(np.array([0.1] * 10), 1.0) == list(range(10))


def selected(config: ModelConfig = CONFIGS["DeepSeekMoE"], **asked: Any) -> tuple[LanguageModel, ExpertSelection]:
    model = opened(config)
    return model, select_experts(model, expert_relevance(model, passages(), description=None), **asked)


def test_selection_counts_what_would_be_trained() -> None:
    model, selection = selected(score="token", p=0.5)
    chosen = sum(len(layer.experts) for layer in selection.layers)
    assert selection.trainable_parameters == chosen * 3 * 16 * 8
    total = sum(p.numel() for p in model.model.parameters())
    assert selection.trainable_share == pytest.approx(selection.trainable_parameters / total)
    for layer in selection.layers:
        assert sum(layer.scores) >= 0.5
        assert selection.experts[layer.layer] == layer.experts


def test_defaults_are_the_papers() -> None:
    assert selected()[1].p == 0.1
    assert selected()[1].score == "gate"
    assert selected(score="token")[1].p == 0.2


def test_samples_are_as_long_as_the_model_and_at_most_the_papers() -> None:
    config = CONFIGS["DeepSeekMoE"]
    assert [sample_length(opened(config, reach=reach)) for reach in (None, 256, 131_072)] == [4096, 256, 4096]


@pytest.mark.parametrize(("asked", "message"), [({"p": 0.0}, "p 0.0"), ({"p": 1.5}, "p 1.5"), ({"score": "x"}, "'x'")])
def test_impossible_selections_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        selected(**asked)


def test_dense_models_are_refused() -> None:
    dense = small_config(feed_forward={"kind": "dense", "ffn_hidden_size": 8}, leading=None)
    with pytest.raises(ConfigError, match="dense"):
        expert_relevance(opened(dense), passages(), description=None)


# ---- the file ----


def test_selection_survives_its_file(tmp_path: Path) -> None:
    model, selection = selected()
    write_selection(tmp_path / "s.json", selection)
    assert read_selection(tmp_path / "s.json", model.model.config) == selection


def changed(selection: ExpertSelection, path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(selection.model_dump(mode="json") | changes))
    return path


LAYER = {"layer": 1, "experts": [0], "scores": [0.5]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [LAYER | {"layer": 0}]}, "layer 0 has no routed experts in this model; MoE layers: 1, 2"),
        ({"layers": [LAYER | {"experts": [6]}]}, "layer 1 has no expert 6: its 6 routed experts"),
        ({"layers": [LAYER | {"experts": [-1]}]}, r"layers.0.experts.0"),
        ({"layers": [LAYER | {"experts": [1, 1], "scores": [0.1, 0.1]}]}, "selected twice"),
        ({"layers": [LAYER | {"scores": []}]}, "1 experts and 0 scores"),
        ({"layers": [LAYER, LAYER]}, "layer 1 stands there twice"),
        ({"layers": []}, "selects no expert"),
        ({"schema_version": 2}, "schema_version 2 is not known"),
        ({"kind": "other"}, "not a selection of experts"),
        ({"colour": 1}, "unknown key `colour`"),
        ({"p": 2}, "`p`"),
    ],
)
def test_damaged_selections_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, selection = selected()
    path = changed(selection, tmp_path / "s.json", **changes)
    with pytest.raises(ConfigError, match=message):
        read_selection(path, model.model.config)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{"])
def test_files_that_are_no_selection_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"s\.json: not a"):
        read_selection(tmp_path / "s.json", CONFIGS["DeepSeekMoE"])
    with pytest.raises(ConfigError, match="no such selection"):
        read_selection(tmp_path / "missing.json", CONFIGS["DeepSeekMoE"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (small_config(num_layers=4), "num_layers 3, and this one has 4"),
        (small_config(num_layers=3, hidden_size=32), "hidden_size 16"),
        (small_config(num_layers=3, feed_forward=moe_table(num_routed_experts=8)), "other numbers of routed experts"),
    ],
)
def test_selections_of_other_models_are_refused(other: ModelConfig, message: str, tmp_path: Path) -> None:
    _, selection = selected()
    write_selection(tmp_path / "s.json", selection)
    with pytest.raises(ConfigError, match=message):
        read_selection(tmp_path / "s.json", other)


def test_fingerprint_tells_models_apart_and_not_what_tuning_changes() -> None:
    model, other = opened(CONFIGS["DeepSeekMoE"]), opened(CONFIGS["DeepSeekMoE"], seed=1)
    before = router_fingerprint(model.model)
    assert before != router_fingerprint(other.model)
    with torch.no_grad():
        model.model.moe_layers[1].experts.down_proj.add_(1)
    assert router_fingerprint(model.model) == before
    with torch.no_grad():
        model.model.moe_layers[1].router.weight[0, 0] += 1  # type: ignore[union-attr, operator, index]
    assert router_fingerprint(model.model) != before


def test_results_add_up_from_the_best_on() -> None:
    model = opened(CONFIGS["DeepSeekMoE"])
    found = Relevance({1: np.array([1.0, 3, 0, 4, 0, 0])}, {1: np.array([0.0, 0, 1, 0, 0, 0])}, 2, 12)
    made = relevance_results(found, select_experts(model, found, "gate", 0.5))
    assert made["cumulative"] == {"1": [0.5, 0.875, 1, 1, 1, 1]}
    assert made["selection"]["layers"] == [{"layer": 1, "experts": [3], "scores": [0.5]}]
    assert made["scores"]["token"]["1"][2] == 1
