"""Two models on the same tokens, against plain loops; intervals; what cannot be compared."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from finemoe.analysis.difference import pair, routing_difference
from finemoe.analysis.passages import Passages, read_passages
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError
from finemoe.core.statistics import PairedRates
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, moe_table, small_config

VOCAB = 300
TOKENIZER = Tokenizer.train(["one two three four five six seven\n"] * 5, vocab_size=280)


def opened(seed: int = 0, name: str = "model", tokenizer: Tokenizer = TOKENIZER, **changes: Any) -> LanguageModel:
    model = build(small_config(vocab_size=VOCAB, num_layers=3, **changes), seed).eval()
    return LanguageModel(model, tokenizer, Path(name), own=False, reach=None)


def passages() -> list[Passages]:
    """Two domains; the last window of each is filled up."""
    numbers = np.random.default_rng(3)
    made = []
    for domain, targets in (("words", 42), ("sums", 27)):
        windows = numbers.integers(0, VOCAB, (-(-targets // 8), 9)).astype(np.int32)
        made.append(Passages(domain, windows, targets))
    return made


def by_hand(a: LanguageModel, b: LanguageModel) -> dict[Any, Any]:
    """Lists over tokens of everything, by layer and domain, one window at a time."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for passage in passages():
        for number, window in enumerate(passage.windows.astype(np.int64)):
            tokens = torch.from_numpy(window[None, :-1])
            real = [number * 8 + i < passage.num_targets for i in range(8)]
            with torch.no_grad():
                outputs = [one.model(tokens, record=True) for one in (a, b)]
                logits = [
                    one.model.logits(out.hidden)[0].log_softmax(-1) for one, out in zip((a, b), outputs, strict=True)
                ]
            for i in range(8):
                if real[i]:
                    target = window[i + 1]
                    found["loss", passage.domain].append((
                        number, -logits[0][i, target].item(), -logits[1][i, target].item()
                    ))  # fmt: skip
            for layer in (1, 2):
                one, other = (out.routing[layer].decision for out in outputs)
                for i in range(8):
                    if not real[i]:
                        continue
                    first, second = one.expert_ids[i].tolist(), other.expert_ids[i].tolist()
                    gates = [
                        dict(zip(ids, made.gate_weights[i].tolist(), strict=True))
                        for ids, made in ((first, one), (second, other))
                    ]
                    sums = [sum(gate.values()) for gate in gates]
                    shift = sum(abs(gates[0].get(e, 0) / sums[0] - gates[1].get(e, 0) / sums[1]) for e in range(6)) / 2
                    row = {"window": number, "a": first, "b": second, "shift": shift, "sums": sums}
                    found[layer, passage.domain].append(row)
    return found


def test_flips_shifts_and_losses_are_those_of_a_loop():
    a, b = opened(0), opened(1)
    results, expected = routing_difference(a, b, passages(), rows=3), by_hand(a, b)
    for record in results["layers"]:
        for domain in ("words", "sums", "all"):
            names = ("words", "sums") if domain == "all" else (domain,)
            rows = [row for name in names for row in expected[record["layer"], name]]
            found = record["domains"][domain]

            def mean(value, rows=rows):
                return sum(value(row) for row in rows) / len(rows)

            assert found["flip_rate"]["mean"] == pytest.approx(mean(lambda r: 1 - len({*r["a"]} & {*r["b"]}) / 2))
            assert found["any_change"] == pytest.approx(mean(lambda r: {*r["a"]} != {*r["b"]}))
            assert found["top1_flip_rate"] == pytest.approx(mean(lambda r: r["a"][0] != r["b"][0]))
            assert found["gate_shift"] == pytest.approx(mean(lambda r: r["shift"]), abs=1e-6)
            assert found["gate_a"] == pytest.approx(mean(lambda r: r["sums"][0]), abs=1e-6)
            assert found["gate_b"] == pytest.approx(mean(lambda r: r["sums"][1]), abs=1e-6)
    for record in results["domains"][1:]:
        rows = expected["loss", record["domain"]]
        assert record["tokens"] == len(rows)
        assert record["loss_a"] == pytest.approx(np.mean([row[1] for row in rows]), abs=1e-5)
        assert record["loss_b"] == pytest.approx(np.mean([row[2] for row in rows]), abs=1e-5)
        assert record["difference"]["mean"] == pytest.approx(record["loss_b"] - record["loss_a"], abs=1e-9)


def test_load_changes_and_their_intervals_are_those_of_a_loop():
    a, b = opened(0), opened(1)
    results, expected = routing_difference(a, b, passages(), rows=2), by_hand(a, b)
    assert len(results["experts"]) == 12
    for record in results["experts"]:
        layer, expert = record["layer"], record["expert"]
        total, parts, tokens = 0.0, [], 0
        for domain in ("words", "sums"):
            windows: dict[int, list[int]] = defaultdict(list)
            for row in expected[layer, domain]:
                windows[row["window"]].append((expert in row["b"]) - (expert in row["a"]))
            ratio = sum(map(sum, windows.values())) / sum(map(len, windows.values()))
            assert record["domains"][domain] == pytest.approx(ratio)
            residual = sum((sum(changes) - ratio * len(changes)) ** 2 for changes in windows.values())
            parts.append((residual * len(windows) / (len(windows) - 1), len(windows) - 1))
            total += sum(map(sum, windows.values()))
            tokens += sum(map(len, windows.values()))
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / n for part, n in parts) if variance else 1
        half = stats.t.ppf(0.975, freedom) * math.sqrt(variance) / tokens
        assert record["change"] == pytest.approx(total / tokens)
        assert record["high"] - record["change"] == pytest.approx(half)
        assert record["change"] - record["low"] == pytest.approx(half)
        strict = stats.t.ppf(1 - 0.025 / 12, freedom) * math.sqrt(variance) / tokens
        word = "undecided" if abs(total / tokens) <= strict else "gained" if total > 0 else "lost"
        assert record["verdict"] == word


def test_a_model_does_not_differ_from_itself():
    a = opened(0)
    results = routing_difference(a, a, passages())
    for record in results["layers"]:
        found = record["domains"]["all"]
        assert found["flip_rate"] == {"mean": 0, "low": 0, "high": 0}
        assert [found[key] for key in ("any_change", "gate_shift", "flip_rate_router", "flip_rate_states")] == [0] * 4
    assert {record["verdict"] for record in results["experts"]} == {"undecided"}
    assert results["domains"][0]["difference"] == {"mean": 0, "low": 0, "high": 0}


def test_a_changed_router_and_changed_states_are_told_apart():
    a = opened(0)
    router = replace(a, model=copy.deepcopy(a.model))
    layers = router.model.moe_layers
    with torch.no_grad():
        layers[2].router.weight.copy_(layers[2].router.weight.roll(1, 0))
    found = {r["layer"]: r["domains"]["all"] for r in routing_difference(a, router, passages())["layers"]}
    assert found[1]["flip_rate"]["mean"] == 0
    assert found[2]["flip_rate_router"] == found[2]["flip_rate"]["mean"] > 0.5
    assert found[2]["flip_rate_states"] == 0
    states = replace(a, model=copy.deepcopy(a.model))
    with torch.no_grad():
        states.model.blocks[1].attention_norm.weight.mul_(3)
    found = {r["layer"]: r["domains"]["all"] for r in routing_difference(a, states, passages())["layers"]}
    assert found[1]["flip_rate_states"] == found[1]["flip_rate"]["mean"] > 0
    assert found[1]["flip_rate_router"] == 0


def pruned(a: LanguageModel, kept: list[int]) -> LanguageModel:
    """The model with only some of the experts of both its layers, in another order."""
    b = opened(5, "pruned", feed_forward=moe_table(num_routed_experts=len(kept)))
    weights = a.model.state_dict()
    for name, value in weights.items():
        if ".experts." in name or "router.weight" in name:
            weights[name] = value[kept]
    b.model.load_state_dict(weights)
    return b


def test_experts_that_pruning_left_are_matched_by_their_weights():
    a = opened(0)
    kept = [4, 0, 5, 2]
    b = pruned(a, kept)
    results = routing_difference(a, b, passages())
    verdicts = {(record["layer"], record["expert"]): record["verdict"] for record in results["experts"]}
    assert {expert for (_, expert), word in verdicts.items() if word == "removed"} == {1, 3}
    assert pair(a, b).experts[1].tolist() == kept
    assert "4 of 6" in results["notes"][0]
    for record in results["experts"]:
        if record["verdict"] == "removed":
            assert record["rate_b"] == 0
    # A token that used only experts that are left keeps them in the first layer that routes.
    expected = []
    for passage in passages():
        for number, window in enumerate(passage.windows.astype(np.int64)):
            decision = a.model(torch.from_numpy(window[None, :-1]), record=True).routing[1].decision
            real = min(8, passage.num_targets - 8 * number)
            expected += [len({1, 3} & {*row}) / 2 for row in decision.expert_ids.tolist()[:real]]
    assert results["layers"][0]["domains"]["all"]["flip_rate"]["mean"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feed_forward": moe_table(num_routed_experts=4)}, r"layer 1: 6 and 4 routed experts.* matched by number"),
        ({"feed_forward": moe_table(num_routed_experts=9)}, r"6 and 9 routed experts; give the model with more"),
        ({"feed_forward": moe_table(num_routed_experts=4, expert_hidden_size=10)}, "of other widths"),
        ({"leading": None}, r"layers 1, 2 of the one and 0, 1, 2 of the other"),
        ({"leading": {"count": 3, "feed_forward": {"kind": "dense", "ffn_hidden_size": 24}}}, "dense"),
    ],
)
def test_what_cannot_be_compared_is_said(changes, said):
    with pytest.raises(ConfigError, match=said):
        pair(opened(0), opened(1, "other", **changes))


def test_other_tokenizers_are_refused():
    other = Tokenizer.train(["completely other words here\n"] * 5, vocab_size=280)
    with pytest.raises(ConfigError, match="tokenizers differ"):
        pair(opened(0), opened(0, tokenizer=other))


def test_fewer_experts_a_token_count_as_choices_no_longer_made():
    a = opened(0)
    b = opened(0, "one", feed_forward=moe_table(experts_per_token=1))
    b.model.load_state_dict(a.model.state_dict())
    results = routing_difference(a, b, passages())
    found = results["layers"][0]["domains"]["all"]
    assert found["flip_rate"]["mean"] == pytest.approx(0.5)
    assert found["top1_flip_rate"] == 0
    assert "2 experts a token before, 1 after" in results["notes"][0]


def test_with_equal_windows_the_interval_is_the_paired_t_interval():
    numbers = np.random.default_rng(1)
    values = numbers.normal(0.3, 1, 9)
    rates = PairedRates(1, (1,))
    for part in (values[:4], values[4:]):
        rates.add(0, 16 * part[:, None], np.full(len(part), 16.0))
    low, high = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
    assert rates.rate()[0] == pytest.approx(values.mean())
    assert rates.half_interval()[0] == pytest.approx((high - low) / 2)


def test_the_interval_holds_as_often_as_it_says():
    numbers = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        rates = PairedRates(2, (1,))
        for domain, mean in enumerate((1.0, -2.0)):
            tokens = numbers.integers(4, 9, 10).astype(float)
            noise = numbers.normal(0, 2, 10)
            rates.add(domain, (mean * tokens + noise)[:, None], tokens)
        share = rates._tokens / rates._tokens.sum()
        truth = share[0] * 1.0 + share[1] * -2.0
        held += abs(rates.rate()[0] - truth) <= rates.half_interval()[0]
    assert 0.92 <= held / 400 <= 0.98


def test_a_small_domain_that_scatters_most_is_not_trusted_as_if_it_were_large():
    """Two windows that differ wildly, and many that do not: the interval is that of two windows."""
    rates = PairedRates(2, (1,))
    rates.add(0, np.tile([[0.0], [0.001]], (20, 1)), np.ones(40))
    rates.add(1, np.array([[-1.0], [1.0]]), np.ones(2))
    half = rates.half_interval()[0]
    assert half == pytest.approx(stats.t.ppf(0.975, 1) * math.sqrt(2 * 2) / 42, rel=1e-3)


def test_a_domain_of_one_window_is_a_stratum_with_the_others():
    rates, whole = PairedRates(2, (1,)), PairedRates(1, (1,))
    values = np.array([[1.0], [2.0], [5.0]])
    rates.add(0, values[:2], np.ones(2))
    rates.add(1, values[2:], np.ones(1))
    whole.add(0, values, np.ones(3))
    assert rates.half_interval() == pytest.approx(whole.half_interval())
    assert rates.half_interval(1) is None


def test_no_domain_can_be_taken_for_all_of_them():
    mine = [Passages("all", passages()[0].windows, 42), passages()[1]]
    with pytest.raises(ConfigError, match="cannot be called `all`"):
        routing_difference(opened(0), opened(1), mine)


def test_a_model_of_another_width_is_refused():
    with pytest.raises(ConfigError, match="hidden sizes are 16 and 32"):
        pair(opened(0), opened(1, "wide", hidden_size=32))


def test_both_read_documents_as_the_first_does():
    """A model that keeps documents apart, and the same one as if imported, which says nothing of how it was trained."""
    apart = replace(opened(0, "apart"), own=True, isolated=True)
    text = read_passages(apart, texts=["one two three four", "five six seven one two"], length=8)
    results = routing_difference(apart, replace(apart, isolated=False), text)
    assert results["domains"][0]["difference"]["mean"] == 0
    assert all(record["domains"]["all"]["flip_rate"]["mean"] == 0 for record in results["layers"])


def test_a_single_window_has_no_interval():
    text = read_passages(opened(0), texts=["one two three"], length=16)
    results = routing_difference(opened(0), opened(1), text)
    assert results["domains"][0]["difference"]["low"] is None
    assert {record["verdict"] for record in results["experts"]} == {"undecided"}
