"""Expert cards of small models, against plain loops over the recorded decisions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finemoe.analysis.cards import CONTEXTS, expert_cards, visible
from finemoe.analysis.neighbours import centroid_likeness, matched, weight_likeness
from finemoe.analysis.passages import Passages, read_passages
from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.core.errors import ConfigError
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, moe_table, small_config

VOCAB = 300
TOKENIZER = Tokenizer.train(["one two three four five six seven\n"] * 5, vocab_size=280)
CONFIG = small_config(vocab_size=VOCAB, num_layers=3)


def opened(seed: int = 0, **changes: Any) -> LanguageModel:
    config = small_config(vocab_size=VOCAB, num_layers=3, **changes) if changes else CONFIG
    return LanguageModel(build(config, seed).eval(), TOKENIZER, Path("model"), own=False, reach=None)


def passages() -> list[Passages]:
    """Two domains of few distinct tokens, so that some come often; the last window of each is filled up."""
    numbers = np.random.default_rng(3)
    made = []
    for domain, targets, tokens in (("words", 83, (10, 22)), ("sums", 60, (18, 30))):
        windows = numbers.integers(*tokens, (-(-targets // 16), 17)).astype(np.int32)
        made.append(Passages(domain, windows, targets))
    return made


def assignments(model: LanguageModel) -> dict[int, list[dict[str, Any]]]:
    """By layer, one record for each token and expert it went to, window by window."""
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    place = 0
    for passage in passages():
        for number, window in enumerate(passage.windows.astype(np.int64)):
            with torch.no_grad():
                routing = model.model(torch.from_numpy(window[None, :-1]), record=True).routing
            for i in range(min(16, passage.num_targets - 16 * number)):
                for layer, record in routing.items():
                    made = record.decision
                    for expert, gate in zip(made.expert_ids[i].tolist(), made.gate_weights[i].tolist(), strict=True):
                        found[layer].append({
                            "place": place + 16 * number + i, "domain": passage.domain, "token": int(window[i]),
                            "expert": expert, "gate": gate, "after": window[i + 1 : 16], "before": window[:i],
                        })  # fmt: skip
        place += 16 * len(passage.windows)
    return found


def test_cards_are_those_of_a_loop():
    model = opened()
    results, expected = expert_cards(model, passages(), rows=3), assignments(model)
    text = {row["place"]: row for row in expected[1]}
    tokens = {name: sum(row["domain"] == name for row in text.values()) for name in ("words", "sums")}
    assert {each["domain"]: each["tokens"] for each in results["domains"]} == tokens == {"words": 83, "sums": 60}
    assert [(card["layer"], card["expert"]) for card in results["cards"]] == [(n, e) for n in (1, 2) for e in range(6)]
    for card in results["cards"]:
        mine = [row for row in expected[card["layer"]] if row["expert"] == card["expert"]]
        assert card["assignments"] == len(mine) > 0
        assert card["share"] == pytest.approx(len(mine) / (2 * 143))
        assert card["relative_load"] == pytest.approx(6 * len(mine) / (2 * 143))
        assert card["mean_gate"] == pytest.approx(np.mean([row["gate"] for row in mine]), abs=1e-6)
        for each in card["domains"]:
            taken = sum(row["domain"] == each["domain"] for row in mine)
            assert each["rate"] == pytest.approx(taken / tokens[each["domain"]])
            assert each["lift"] == pytest.approx(taken / len(mine) / (tokens[each["domain"]] / 143))
        weight = sum(row["gate"] for row in mine)
        for each in card["tokens"]:
            gates = [row["gate"] for row in mine if row["token"] == each["id"]]
            assert each["count"] == len(gates) >= 5
            share = sum(row["token"] == each["id"] for row in text.values()) / 143
            assert each["lift"] == pytest.approx(sum(gates) / weight / share, abs=1e-5)


def test_taken_together_is_over_chance_for_distinct_experts():
    """A loop over pairs; 1 is what drawing 2 of 6 distinct experts blindly gives, not 6 times 6 draws."""
    model = opened()
    results, expected = expert_cards(model, passages(), rows=3), assignments(model)
    seen = 0
    for card in results["cards"]:
        places: dict[int, set[int]] = {}
        for row in expected[card["layer"]]:
            places.setdefault(row["expert"], set()).add(row["place"])
        mine = places[card["expert"]]
        for near in card["nearest"]["coactivation"]:
            other = places[near["expert"]]
            both, blind = len(mine & other) / 143, (2 / 6 * 1 / 5) / (2 / 6) ** 2
            assert near["value"] == pytest.approx(both / (len(mine) / 143 * len(other) / 143) / blind)
            seen += 1
    assert seen > 12


def test_contexts_are_the_text_round_the_highest_gates():
    model = opened()
    results, expected = expert_cards(model, passages(), rows=2), assignments(model)
    for card in results["cards"]:
        mine = sorted(
            (row for row in expected[card["layer"]] if row["expert"] == card["expert"]),
            key=lambda row: (-row["gate"], row["place"]),
        )
        assert len(card["contexts"]) == min(CONTEXTS, len(mine))
        first = card["contexts"][0]
        assert first["gate"] == pytest.approx(mine[0]["gate"], abs=1e-6)
        assert first["domain"] == mine[0]["domain"]
        spelling = TOKENIZER.token_bytes
        assert first["token"] == visible(spelling[mine[0]["token"]])
        assert first["before"] == visible(b"".join(spelling[t] for t in mine[0]["before"][-12:].tolist()), " ")
        assert first["after"] == visible(b"".join(spelling[t] for t in mine[0]["after"][:8].tolist()), " ")
        gates = [context["gate"] for context in card["contexts"]]
        assert gates == sorted(gates, reverse=True)


def test_one_phrase_does_not_fill_every_context():
    windows = np.array([[10, 11] * 8 + [10], [12, 13, 14, 15] * 4 + [12]], dtype=np.int32)
    model, passage = opened(), Passages("text", windows, 32)
    results = expert_cards(model, [passage])
    decisions = model.model(torch.from_numpy(windows[:, :-1].astype(np.int64)), record=True).routing
    for card in results["cards"]:
        ids = decisions[card["layer"]].decision.expert_ids.view(2, 16, 2)
        taken = [windows[row, i] for row in range(2) for i in range(16) if card["expert"] in ids[row, i]]
        marked = {context["token"] for context in card["contexts"]}
        assert len(marked) == min(CONTEXTS, len(set(taken)))


def test_it_does_not_matter_how_many_windows_go_at_once():
    model = opened()
    one, many = (expert_cards(model, passages(), rows=rows) for rows in (1, 8))
    assert json.dumps(_rounded(one)) == json.dumps(_rounded(many))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def test_a_dense_model_has_no_cards():
    dense = opened(feed_forward={"kind": "dense", "ffn_hidden_size": 24}, leading=None)
    with pytest.raises(ConfigError, match="dense"):
        expert_cards(dense, passages())


def test_one_domain_and_hashed_experts():
    model = opened(feed_forward=moe_table("hash_layer"))
    results = expert_cards(model, passages()[:1])
    assert all(math.isnan(card["specialization"]) for card in results["cards"])
    assert all(card["nearest"]["router"] == [] for card in results["cards"])


def test_only_the_main_model_is_looked_at():
    results = expert_cards(opened(mtp_depth=1), passages())
    assert [layer["layer"] for layer in results["layers"]] == [1, 2]


# ---- over training ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints: of another seed, of the last one's weights, and the last."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    directory.mkdir()
    text = json.dumps({"model": CONFIG.model_dump(mode="json"), "data": {"sequence_length": 16}})
    (directory / "config.json").write_text(text)
    TOKENIZER.save(directory / "tokenizer.json")
    for step, seed in ((10, 1), (20, 0), (30, 0)):
        state = build(CONFIG, seed).state_dict()
        save(directory / "checkpoints", step, RunState(state, {}, {"step": step}, text), keep=3)
    return directory


def test_stability_is_the_overlap_with_earlier_checkpoints(run):
    results = expert_cards(open_language_model(run), passages())
    then, now = (assignments(opened(seed)) for seed in (1, 0))
    for card in results["cards"]:
        places = [
            {row["place"] for row in found[card["layer"]] if row["expert"] == card["expert"]} for found in (then, now)
        ]
        expected = len(places[0] & places[1]) / len(places[0] | places[1])
        assert [each["step"] for each in card["stability"]] == [10, 20]
        assert [each["overlap"] for each in card["stability"]] == [pytest.approx(expected), 1.0]
    for layer in results["layers"]:
        each = [card["stability"][0]["overlap"] for card in results["cards"] if card["layer"] == layer["layer"]]
        assert layer["stability"][0]["overlap"] == pytest.approx(np.mean(each))


def test_a_checkpoint_is_compared_with_those_before_it(run):
    results = expert_cards(open_language_model(run / "checkpoints" / "step-00000020"), passages())
    assert [each["step"] for each in results["cards"][0]["stability"]] == [10]
    alone = expert_cards(open_language_model(run), passages(), stability=False)
    assert alone["cards"][0]["stability"] == []


def test_a_damaged_checkpoint_is_left_out(run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with (copy / "checkpoints" / "step-00000020" / "model.safetensors").open("r+b") as file:
        file.write(b"damage")
    results = expert_cards(open_language_model(copy), passages())
    assert [each["step"] for each in results["cards"][0]["stability"]] == [10]


# ---- nearest experts ----


def _cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(axis=0)
    return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in rows] for a in rows])


def test_likeness_is_the_cosine_of_what_sets_experts_apart():
    moe = opened().model.moe_layers[1]
    parts = [moe.experts.gate_up_proj, moe.experts.down_proj]
    flat = torch.cat([part.detach().flatten(1) for part in parts], dim=1).double().numpy()
    for found, rows in ((weight_likeness(moe), flat), (centroid_likeness(moe), moe.router.weight.detach().numpy())):
        off = ~np.eye(6, dtype=bool)
        assert found[off] == pytest.approx(_cosines(rows)[off], abs=1e-5)
        assert np.isnan(np.diag(found)).all()


def test_a_copied_expert_is_the_nearest_of_its_original():
    model = opened()
    moe = model.model.moe_layers[2]
    with torch.no_grad():
        moe.experts.gate_up_proj[4] = moe.experts.gate_up_proj[1]
        moe.experts.down_proj[4] = moe.experts.down_proj[1]
        moe.router.weight[4] = moe.router.weight[1]
    cards = {(card["layer"], card["expert"]): card for card in expert_cards(model, passages())["cards"]}
    for kind in ("weights", "router"):
        assert cards[2, 4]["nearest"][kind][0] == {"expert": 1, "value": pytest.approx(1.0)}


def test_matching_finds_the_experts_that_are_left_and_refuses_others():
    moe, other = opened(0).model.moe_layers[1], opened(1).model.moe_layers[1]
    assert matched(moe, moe) == ([0, 1, 2, 3, 4, 5], pytest.approx(1.0))
    assert matched(moe, other)[0] == []


# ---- text ----


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the", "␣the"), (b"\n", "↵"), (b"\r\n\t", "␍↵⇥"), (b"    ", "␣×4"), (b"   x", "␣␣␣x"),
        (b"\xe6\x98", "\\xe6\\x98"), ("é".encode(), "é"), (b"\x1b[31m", "\\u001b[31m"),
        ("\u202eabc".encode(), "\\u202eabc"), (b"", ""),
    ],
)  # fmt: skip
def test_every_token_can_be_seen(token, shown):
    assert visible(token) == shown


def test_the_text_of_a_context_may_hold_anything():
    model = opened()
    text = read_passages(model, texts=["</script><img src=x onerror=alert(1)>\x00\u2028 \x1b]0;x\x07"], length=64)
    results = expert_cards(replace(model), text)
    everything = json.dumps(results, ensure_ascii=False)
    assert "\u2028" not in everything
    assert not any(char in text_of for char in "\x00\x1b\x07\n" for text_of in _texts(results))


def _texts(results: dict[str, Any]) -> list[str]:
    found = [token["text"] for card in results["cards"] for token in card["tokens"]]
    for card in results["cards"]:
        found += [context[key] for context in card["contexts"] for key in ("before", "token", "after")]
    return found
