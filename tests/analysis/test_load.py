"""Load figures against loops and counters in plain Python; filling never counts; series over checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.analysis import usage
from finemoe.analysis.load import Stage, Tally, figures, history, stages, study_load, tally
from finemoe.analysis.passages import Passages, batches, read_passages
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from finemoe.model.moe.balance import max_violation
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, moe_table, small_config

TEXTS = ["the cat sat on the mat and the dog sat on the cat. " * 3, "one two three four five six seven. " * 4]
LOADS = st.lists(st.integers(0, 1000), min_size=2, max_size=30)


def opened_model(config: ModelConfig | None = None, seed: int = 0, source: Path = Path("m")) -> LanguageModel:
    """A random model with routers of weight, and a tokenizer of 300."""
    model = build(config or small_config(vocab_size=300), seed).eval()
    return LanguageModel(model, Tokenizer.train(TEXTS * 4, vocab_size=290), source, own=True, reach=16)


def two_domains(tmp_path: Path, opened: LanguageModel, length: int = 16) -> list[Passages]:
    for name, text in zip(("first", "second"), TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    corpora = [f"{name}={tmp_path / name}.txt" for name in ("first", "second")]
    return read_passages(opened, corpora=corpora, tokens=1000, length=length)


@given(LOADS)
def test_figures_of_a_load_are_those_of_a_loop(load: list[int]):
    found = usage.load_figures(load)
    total, mean = sum(load), sum(load) / len(load)
    shares = [c / total for c in load if c] if total else []
    entropy = -sum(p * math.log(p) for p in shares)
    assert found["max_vio"] == pytest.approx((max(load) - mean) / mean if total else 0)
    assert found["max_vio"] == pytest.approx(max_violation(torch.tensor(load)))  # as training reports it
    assert found["entropy"] == pytest.approx(entropy / math.log(len(load)), abs=1e-9)
    assert found["effective_experts"] == pytest.approx(math.exp(entropy) if total else 0)
    assert found["variation"] == pytest.approx(statistics.pstdev(load) / mean if total else 0)
    assert found["dead"] == load.count(0)
    assert found["starved"] == sum(c < mean / 10 for c in load)
    json.dumps(found)


def choices(tokens: int, experts: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = rng.random(experts) ** 2
    return np.stack([rng.choice(experts, k, replace=False, p=weights / weights.sum()) for _ in range(tokens)])


@pytest.mark.parametrize(("experts", "k"), [(5, 2), (12, 4), (9, 1)])
def test_pairs_and_their_lift_are_those_of_a_counter(experts: int, k: int):
    ids = choices(300, experts, k, seed=k)
    pairs = usage.pair_counts(ids, experts)
    single = Counter(ids.flatten().tolist())
    double = Counter(pair for row in ids.tolist() for pair in itertools.permutations(row, 2))
    lifts = usage.lift(pairs, 300, k)
    chance = (k - 1) / k * experts / (experts - 1)
    for a, b in itertools.product(range(experts), repeat=2):
        assert pairs[a, b] == (single[a] if a == b else double[a, b])
        if a == b or k == 1 or not single[a] or not single[b]:
            assert math.isnan(lifts[a, b])
        else:
            together = (double[a, b] / 300) / ((single[a] / 300) * (single[b] / 300))
            assert lifts[a, b] == pytest.approx(together / chance)
    strongest = usage.strongest_pairs(pairs, 300, k, most=3)
    assert [pair["lift"] for pair in strongest] == sorted((pair["lift"] for pair in strongest), reverse=True)
    assert bool(strongest) == (k > 1)


def test_lift_is_1_where_choice_is_even_and_blind():
    ids = np.array(list(itertools.permutations(range(7), 3)))
    lifts = usage.lift(usage.pair_counts(ids, 7), len(ids), 3)
    assert np.allclose(lifts[~np.eye(7, dtype=bool)], 1)


def test_a_tally_counts_text_and_no_filling(tmp_path: Path):
    opened = opened_model()
    passages = two_domains(tmp_path, opened)
    assert any(passage.num_targets % passage.length for passage in passages)  # there is filling
    counted = tally(opened, passages, rows=2, description=None)
    layer = opened.model.moe_layers[1]
    load: dict[str, Counter[int]] = {}
    violations = []
    for domain, batch in batches(opened, passages, rows=2):
        decision = opened.model(batch.tokens, record=True).routing[1].decision
        assert decision is not None
        chosen = [
            expert
            for row, weight in zip(decision.expert_ids.tolist(), batch.weights.flatten().tolist(), strict=True)
            if weight
            for expert in row
        ]
        one = Counter(chosen)
        load[domain] = load.get(domain, Counter()) + one
        mean = len(chosen) / layer.config.num_routed_experts
        violations.append((len(chosen), (max(one.values()) - mean) / mean))
    total = sum(load.values(), Counter())
    found = figures(opened, counted)["layers"]["1"]
    assert found["load"] == [total[expert] for expert in range(6)]
    for domain, counts in load.items():
        assert found["domains"][domain]["load"] == [counts[expert] for expert in range(6)]
    assert counted.tokens == {passage.domain: passage.num_targets for passage in passages}
    assert sum(found["load"]) == 2 * sum(counted.tokens.values())
    mean = sum(total.values()) / 6
    assert found["max_vio"] == pytest.approx((max(total.values()) - mean) / mean)
    full = [value for size, value in violations if size >= 0.9 * max(size for size, _ in violations)]
    assert found["max_vio_batch"] == pytest.approx(sum(full) / len(full))


def test_losses_are_per_token_of_text(tmp_path: Path):
    opened = opened_model()
    passages = two_domains(tmp_path, opened)
    found = figures(opened, tally(opened, passages, rows=3, description=None))["loss"]
    for passage in passages:
        total = 0.0
        for number, window in enumerate(torch.from_numpy(passage.windows.astype(np.int64))):
            logits = opened.model.logits(opened.model(window[None, :-1]).hidden)[0]
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            total += losses[: max(0, passage.num_targets - number * passage.length)].sum().item()
        assert found[passage.domain] == pytest.approx(total / passage.num_targets, rel=1e-5)


def test_the_batch_size_changes_nothing_but_the_batch_figure(tmp_path: Path):
    opened = opened_model()
    passages = two_domains(tmp_path, opened)
    one, many = (tally(opened, passages, rows=rows, description=None) for rows in (1, 16))
    assert (one.total(1) == many.total(1)).all()
    assert (one.total_together(1) == many.total_together(1)).all()
    assert one.tokens == many.tokens


def test_pairs_of_a_domain_are_those_of_it_alone(tmp_path: Path):
    """Reading one domain by itself finds the same pairs that reading both finds of it."""
    opened = opened_model()
    passages = two_domains(tmp_path, opened)
    both = tally(opened, passages, description=None)
    for passage in passages:
        alone = tally(opened, [passage], description=None)
        for number in both.together:
            assert (both.together[number][passage.domain] == alone.total_together(number)).all()
    first, second = (both.together[1][passage.domain] for passage in passages)
    assert (first != second).any(), "two domains alike would show nothing"
    layer = figures(opened, both)["layers"]["1"]
    assert set(layer["domain_pairs"]) == {passage.domain for passage in passages}


def test_without_pairs_the_load_is_the_same(tmp_path: Path):
    from finemoe.analysis.passages import observe

    opened = opened_model()
    passages = two_domains(tmp_path, opened)
    with_pairs = tally(opened, passages, description=None)
    plain = Tally(with_pairs.layers, pairs=False)
    for one in observe(opened, passages, description=None):
        plain.add(one)
    assert (plain.total(1) == with_pairs.total(1)).all()
    assert plain.together == {}


def test_a_dense_model_is_refused(tmp_path: Path):
    opened = opened_model(small_config(vocab_size=300, feed_forward={"kind": "dense", "ffn_hidden_size": 8}))
    with pytest.raises(ConfigError, match="dense"):
        tally(opened, two_domains(tmp_path, opened), description=None)


def collapsed_model() -> LanguageModel:
    """Its router sees nothing of the tokens: every score alike, and ties go to the same two experts."""
    opened = opened_model()
    layer = opened.model.moe_layers[1]
    with torch.no_grad():
        opened.model.blocks[1].feed_forward_norm.weight.zero_()  # every score alike; ties go to the first experts
    assert layer.config.experts_per_token == 2
    return opened


def test_a_collapsed_layer_is_told_in_the_words_of_training(tmp_path: Path):
    opened = collapsed_model()
    (tmp_path / "long.txt").write_text(" ".join(f"{word} cat" for word in range(400)))
    passages = read_passages(opened, corpora=[f"x={tmp_path / 'long.txt'}"], tokens=1000, length=16)
    found = figures(opened, tally(opened, passages, description=None))
    assert found["dead"] == 4
    (alert,) = found["alerts"]
    assert alert["level"] == "collapsed"
    assert alert["message"].startswith("layer 1, collapsed: 4 of 6 experts get less than a tenth")
    assert "model.feed_forward.balance.expert" in alert["message"]


def test_an_uneven_hash_table_gets_a_note_and_no_alert(tmp_path: Path):
    router = {"kind": "hash_layer", "table": "random"}
    opened = opened_model(small_config(vocab_size=300, feed_forward=moe_table(router=router, num_routed_experts=12)))
    (tmp_path / "same.txt").write_text("cat " * 900)
    passages = read_passages(opened, corpora=[f"x={tmp_path / 'same.txt'}"], tokens=800, length=16)
    (alert,) = figures(opened, tally(opened, passages, description=None))["alerts"]
    assert alert["level"] == "note"
    assert '"balanced"' in alert["message"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints and the records of two validations and one alert."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    config = small_config(vocab_size=300)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 16}})
    (folder / "config.json").write_text(text)
    for step in (10, 20, 30):
        state = RunState(build(config, seed=step).state_dict(), {}, {"step": step}, text)
        save(folder / "checkpoints", step, state, keep=9)
    Tokenizer.train(TEXTS * 4, vocab_size=290).save(folder / "tokenizer.json")
    loads = [[60, 0, 0, 0, 0, 0], [10, 10, 10, 10, 10, 10]]
    lines = [
        {
            "kind": "validation",
            "step": 5 * n,
            "tokens": 50 * n,
            "seconds": 1.0,
            "validation_loss": 3.0,
            "load": {"1": load},
        }
        for n, load in enumerate(loads, 1)
    ]
    alert = {"kind": "alert", "step": 7, "layer": 1, "level": "collapsed", "message": "layer 1", "knob": "k"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, alert]))
    return folder


def test_a_run_stands_for_its_sound_checkpoints_oldest_first(run: Path, tmp_path: Path):
    assert [stage.name for stage in stages([run])] == ["step 10", "step 20", "step 30"]
    assert [stage.step for stage in stages([run], last=True)] == [30]
    one = run / "checkpoints" / "step-00000020"
    assert [(stage.name, stage.step) for stage in stages([one])] == [("step 20", 20)]
    assert [stage.name for stage in stages([one, run], last=True)] == ["step-00000020 step 20", "small step 30"]


def test_a_series_is_each_model_on_its_own(run: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    arguments = {"corpora": [f"a={tmp_path / 'a.txt'}"], "tokens": 60, "length": 16}
    whole = study_load([run], **arguments).results
    assert [one["step"] for one in whole["series"]] == [10, 20, 30]
    alone = study_load([run / "checkpoints" / "step-00000020"], **arguments).results["series"][0]
    assert alone["layers"] == whole["series"][1]["layers"]
    assert whole["series"][0]["layers"] != whole["series"][1]["layers"]
    assert [point["max_vio"] for point in whole["history"]] == pytest.approx([5.0, 0.0])
    assert whole["alerts_in_training"] == [{"step": 7, "layer": 1, "level": "collapsed", "message": "layer 1"}]
    json.dumps(whole, allow_nan=False)


def test_of_an_earlier_checkpoint_only_its_own_past_is_told(run: Path):
    assert [point["step"] for point in history(run, 6)["history"]] == [5]
    assert history(run, 6)["alerts_in_training"] == []
    assert history(run, 10)["alerts_in_training"]


def test_a_folder_that_only_sounds_like_a_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sounds = tmp_path / "step-by-step"
    shutil.copytree(run, sounds, ignore=shutil.ignore_patterns("checkpoints"))
    assert stages([sounds]) == [Stage("step-by-step", sounds, None)]
    monkeypatch.chdir(run / "checkpoints" / "step-00000020")
    assert stages([Path()]) == [Stage("step 20", Path(), 20)]


def test_batches_of_documents_that_stand_alone_count_although_no_two_are_alike(tmp_path: Path):
    opened = replace(opened_model(), isolated=True)
    texts = [" ".join(f"{word} cat" for word in range(100)), *(f"cat {word} dog and more" for word in range(9))]
    passages = read_passages(opened, texts=texts, tokens=600, length=16)
    counted = tally(opened, passages, rows=4, description=None)
    sizes = [count for count, _ in counted.batch_max_vio[1]]
    assert len(set(sizes)) > 2
    full = [value for count, value in counted.batch_max_vio[1] if count >= 0.9 * max(sizes)]
    assert len(full) > sizes.count(max(sizes))
    assert counted.mean_batch_max_vio(1) == pytest.approx(sum(full) / len(full))


def test_what_is_no_run_has_no_history():
    assert history(None) == {"history": [], "alerts_in_training": []}
