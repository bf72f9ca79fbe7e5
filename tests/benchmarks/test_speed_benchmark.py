"""The arithmetic of `make bench` on made-up timings, its processes, and one tiny row measured for real."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.speed import __main__ as bench
from benchmarks.speed import around, decoding, layers, memory, serving, shapes, steps
from benchmarks.speed.context import Context
from benchmarks.speed.growth import Fit, Growth, doubling
from benchmarks.speed.own import Own
from benchmarks.speed.peaks import Peaks
from benchmarks.speed.process import ROOT, Peer, PeerError, interpreter_with
from benchmarks.speed.progress import Watch
from benchmarks.speed.shapes import LayerShape
from benchmarks.speed.table import WIDTH, Measured, Row, quantity, show
from benchmarks.speed.timing import MOST, Contestant, Spread, calls_needed, fastest, interleave, ratios
from benchmarks.speed.training import batch_of, loss_of
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from finemoe.model.config import ModelConfig
from finemoe.model.size import measure, training_flops_per_token

TINY = LayerShape(hidden=16, tokens=32, experts=8, width=8, top_k=2)
PEAKS = {"gemm": Spread(200e9, 190e9, 210e9), "bandwidth": Spread(20e9, 19e9, 21e9)}


def tiny_model() -> ModelConfig:
    return shapes.model_config(
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_layers": 2,
            "attention": shapes.grouped_query(2, 1),
            "feed_forward": TINY.table(),
            "init_std": 0.3,
        }
    )


def context(repeats: int = 1) -> Context:
    peaks = Peaks(sizes=(8, 16), read_bytes=16_000)
    return Context(repeats, quick=True, threads=1, python=sys.executable, peaks=peaks)


# timing


def test_contestants_run_in_one_order_and_then_in_the_other() -> None:
    ran: list[str] = []

    def contestant(name: str, at_most: int | None = None) -> Contestant:
        def once() -> float:
            ran.append(name)
            return float(len(ran))

        return Contestant(name, once, at_most)

    samples = interleave([contestant("a"), contestant("b"), contestant("slow", 1)], 3)
    assert ran == ["a", "b", "a", "b", "slow", "b", "a", "a", "b"]
    assert samples == {"a": [3.0, 7.0, 8.0], "b": [4.0, 6.0, 9.0], "slow": [5.0]}


def test_a_budget_of_seconds_adds_repetitions_up_to_a_bound() -> None:
    samples = interleave([Contestant("a", lambda: 1.0)], 2, budget=1000.0)
    assert len(samples["a"]) == 2 * MOST


def test_ratios_are_of_the_same_round() -> None:
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0]) == [2.0, 3.0]
    assert fastest({"a": [1.0, 9.0, 9.0], "b": [5.0, 5.0, 5.0]}, ["a", "b"]) == "b"


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=20))
def test_spread_is_numpys_quartiles(samples: list[float]) -> None:
    spread = Spread.of(samples)
    expected = np.quantile(samples, [0.25, 0.5, 0.75])
    assert np.allclose([spread.low, spread.median, spread.high], expected)


def test_short_calls_are_repeated() -> None:
    assert calls_needed(lambda: None, seconds=1.0) == 1000
    assert calls_needed(lambda: None, seconds=0.0) == 1


# growth


@given(st.floats(-3, 3), st.floats(1e-6, 1e3))
def test_the_exponent_of_a_power_law_is_found(exponent: float, factor: float) -> None:
    sizes = doubling(128, 1024)
    fit = Fit.of(sizes, [factor * size**exponent for size in sizes])
    assert sizes == [128, 256, 512, 1024]
    assert (fit.exponent, fit.low, fit.high) == pytest.approx((exponent,) * 3, abs=1e-5)


def test_the_range_of_an_exponent_is_that_of_neighbouring_slopes() -> None:
    fit = Fit.of([1, 2, 4], [1.0, 2.0, 8.0])
    assert (fit.low, fit.high) == pytest.approx((1.0, 2.0))
    assert fit.exponent == pytest.approx(1.5)


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_no_power_law_through_what_has_none(values: list[float]) -> None:
    with pytest.raises(ValueError, match="no power law"):
        Fit.of([1, 2], values)


# FLOPs and bytes


def test_the_flops_of_a_layer_are_those_of_the_model_around_it() -> None:
    sizes = {
        experts: training_flops_per_token(shapes.expert_model(feed_forward, 1), 64)
        for experts, feed_forward in (("moe", shapes.moe(8, 24, 3)), ("none", shapes.dense(1)))
    }
    shape = LayerShape(hidden=512, tokens=10, experts=8, width=24, top_k=3)
    assert shape.flops == 10 * (sizes["moe"] - sizes["none"] + 6 * 3 * 512)
    assert shape.active_width == 4 * 24


def test_the_models_are_as_large_as_the_targets_say() -> None:
    step = measure(shapes.v3_model(), 512)
    assert 190e6 < step.total_parameters < 196e6
    assert 36e6 < step.active_parameters_without_embedding < step.active_parameters < 44e6
    for config in (shapes.llama_model(), shapes.v3_decoder()):
        assert 190e6 < measure(config, 512).active_parameters_without_embedding < 215e6
    moe, dense = shapes.moe(63, 344, 7), shapes.dense(64 * 344)
    total = [measure(shapes.expert_model(layer, 2), 512).expert_parameters for layer in (moe, dense)]
    assert total[0] == total[1]


def test_weights_that_are_gathered_are_counted() -> None:
    assert steps.gathered_bytes(tiny_model(), tokens=5) == 2 * 4 * 5 * 2 * (3 * 16 * 8)


# rows


@pytest.mark.parametrize(
    ("value", "higher", "met"),
    [(1.0, False, "stretch"), (1.1, False, "yes"), (1.2, False, "no"), (1.0, True, "no"), (1.3, True, "stretch")],
)
def test_targets_are_met_from_their_own_side(value: float, higher: bool, met: str) -> None:
    target, stretch = (1.1, 1.25) if higher else (1.15, 1.05)
    row = Row("p", "w", Measured("a", [1.0]), None, [value], higher=higher, target=target, stretch=stretch)
    assert row.met(PEAKS) == met
    assert Row("p", "w", Measured("a", [1.0]), None, [value]).met(PEAKS) == ""


def test_the_best_backend_is_the_peer_of_a_step() -> None:
    samples = {
        steps.OURS: [1.0, 1.2, 1.1],
        steps.TORCH: [2.0, 2.0, 2.0],
        "validation": [0.3, 0.3, 0.3],
        "grouped_mm": [2.0, 2.0, 2.2],
        "eager": [0.1],  # one repetition may be luck
    }
    rows = {row.what: row for row in steps.rows_of(samples, flops=110e9)}
    assert rows["training step / transformers grouped_mm"].figure(PEAKS).median == pytest.approx(0.5)
    assert rows["  / transformers eager"].values == [10.0]
    share = rows["training step, share of GEMM peak"]
    assert share.figure(PEAKS).median == pytest.approx(110 / 1.1 / 200)
    assert share.met(PEAKS) == "no"


def test_a_step_without_a_peer_still_has_its_share() -> None:
    samples = {steps.OURS: [1.0], steps.TORCH: [2.0], "validation": [0.3]}
    assert [row.peer is not None for row in steps.rows_of(samples, flops=1e9)] == [True, False, True]


def test_decoding_is_a_share_of_bandwidth_and_a_ratio_of_speeds() -> None:
    decoded = {"finemoe": [0.05, 0.05], "llama.cpp": [0.06, 0.06]}
    read = {"finemoe": [1.0, 1.0], "llama.cpp": [1.5, 1.5]}
    rows = {row.what: row for row in decoding.rows_of("d", "X", decoded, read, weight_bytes=800e6)}
    assert rows["decode X, share of bandwidth"].figure(PEAKS).median == pytest.approx(800e6 / 0.05 / 20e9)
    assert rows["decode X, speed / llama.cpp"].figure(PEAKS).median == pytest.approx(1.2)
    assert rows["decode X, speed / llama.cpp"].met(PEAKS) == "stretch"
    assert rows["prefill X, speed / llama.cpp"].figure(PEAKS).median == pytest.approx(1.5)
    assert not [what for what in rows if "transformers" in what]


def test_memory_is_compared_above_the_imports() -> None:
    rows = memory.rows_of({"finemoe": [(100, 600)], memory.HALVES: [(100, 350)], "transformers": [(200, 1200)]})
    assert [row.values for row in rows] == [[0.5], [0.25], [0.5]]
    assert [row.ours.samples for row in rows] == [[500], [250], [600]]
    assert memory.rows_of({"finemoe": [(100, 600)], memory.HALVES: [(100, 350)], "transformers": []})[0].peer is None


def test_stalls_are_of_checkpoints_in_the_background_and_writing_of_the_last() -> None:
    notes = [{"stall_seconds": stall, "write_seconds": write} for stall, write in ((0.1, 0.9), (0.3, 0.8), (0.5, 0.4))]
    stall, longer = around.stall_rows([notes], {"saving": [8.0], "not saving": [7.0]})
    assert stall.values == [pytest.approx(0.2 / 0.4)]
    assert longer.values == [pytest.approx(0.5 / 0.4)]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(3.146, "s", "3.15 s"), (0.0312, "s", "31.2 ms"), (19.5, "s", "19.5 s"), (2.5e9, "B", "2.50 GB")],
)
def test_quantities_have_three_digits(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


# output


def example() -> tuple[Context, list[Row]]:
    told = context()
    told.peaks.measure()
    told.note("one thing")
    told.growth.append(Growth("MoE layer", "width", (128, 256), ((1.0, 1.0), (4.0, 4.0)), (1.0, 4.0)))
    samples = {name: [0.5, 0.6] for name in ("native", "sorted_slices", layers.TORCH_DENSE, layers.OWN_DENSE)}
    return told, layers.rows_of("layer-512", samples, (1.15, 1.05))


def test_the_table_fits_and_has_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    told, rows = example()
    show(rows, told.growth, told.peaks.spreads(), told.notes, "title")
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= WIDTH
    assert all(any(row.what in line for line in printed) for row in rows)
    assert any("stretch" in line for line in printed)
    assert any(line.startswith("MoE layer") and "2.00" in line for line in printed)
    assert "- one thing" in printed


def test_the_json_has_every_sample_and_what_it_was_made_with() -> None:
    told, rows = example()
    results = json.loads(json.dumps(bench.to_json(told, rows, 12.3, ["--only", "layer-512"])))
    assert results["command"] == "python -m benchmarks.speed --only layer-512"
    assert results["environment"]["packages"]["torch"] == torch.__version__
    assert {"date", "peers", "threads", "notes", "checks"} <= set(results)
    first = results["rows"][0]
    assert first["ours"]["raw"] == [0.5, 0.6]
    assert first["figure"]["raw"] == [1.0, 1.0]
    assert (first["target"], first["stretch"], first["met"]) == (1.15, 1.05, "stretch")
    assert first["peer"]["name"] == "torch dense"
    assert results["growth"][0]["fit"]["exponent"] == pytest.approx(2.0)
    assert len(results["peaks"]["gemm"]["raw"]) == 1


def test_the_command_line() -> None:
    assert bench.arguments([]).repeats == 7
    assert bench.arguments(["--growth"]).only == ["growth"]
    assert bench.arguments(["--quick", "--only", "step"]).repeats == 3
    for wrong in (["--repeats", "0"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            bench.arguments(wrong)


def test_a_part_that_fails_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(told: Context) -> list[Row]:
        raise PeerError("it is gone")

    parts = {"bad": bench.Part("", fails, 1.0), "good": bench.Part("", lambda told: example()[1], 1.0)}
    monkeypatch.setattr(bench, "PARTS", parts)
    monkeypatch.setattr(bench, "Context", lambda *given: context())
    assert bench.main(["--threads", "1", "--out", str(tmp_path / "speed.json")]) == 1
    results = json.loads((tmp_path / "speed.json").read_text())
    assert "bad failed: it is gone" in results["notes"]
    assert len(results["rows"]) == 4
    assert len(results["peaks"]["gemm"]["raw"]) == 3
    assert "it is gone" in capsys.readouterr().out


def test_progress_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch({"first": 60.0, "second": 120.0})
    watch.part("first")
    watch.tell("at work")  # too soon after the line before
    watch.close()
    assert capsys.readouterr().err == "first, about 3 min left\n"


# processes

ECHO = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.speed.serving import serve
def add(a, b):
    print("said on stdout")
    return {{"seconds": a + b}}
def end():
    print("last words", file=sys.stderr)
    raise SystemExit(3)
serve({{"add": add, "end": end}}, versions={{"echo": "1"}})
"""


def test_a_peer_answers_refuses_and_ends() -> None:
    with Peer("echo", [sys.executable, "-c", ECHO]) as peer:
        assert peer.ready["versions"] == {"echo": "1"}
        assert peer.ready["resident"] > 0
        assert peer.ask("add", a=1, b=2) == {"seconds": 3}
        assert peer.timer("add", a=2, b=2)() == 4.0
        with pytest.raises(PeerError, match="TypeError"):
            peer.ask("add", a=1)
        assert peer.ask("add", a=1, b=1) == {"seconds": 2}
        with pytest.raises(PeerError, match="echo: ended with 3: last words"):
            peer.ask("end")


def test_a_peer_that_cannot_start_says_why() -> None:
    with pytest.raises(PeerError, match="ZeroDivisionError"):
        Peer("broken", [sys.executable, "-c", "1 / 0"])
    assert interpreter_with("json", ["/nowhere/python", sys.executable]) == sys.executable
    assert interpreter_with("no_such_module", [sys.executable]) is None


def test_memory_is_of_this_process_alone() -> None:
    own = serving.memory()
    assert own["peak"] >= own["resident"] > 10_000_000
    with Peer("echo", [sys.executable, "-c", ECHO]) as peer:  # a fork of a large process, for a moment
        assert peer.ready["peak"] < own["resident"] / 2


# what is measured


def test_the_loss_is_that_of_every_token_with_one_after_it() -> None:
    config = tiny_model()
    model = shapes.build(config).eval()
    tokens = shapes.token_ids(config, 2, 12)
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits = model.logits(model(ids).hidden)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss_of(model, batch_of(tokens)) == pytest.approx(expected.item(), rel=1e-5)


def test_finemoe_answers_what_is_asked_of_it(tmp_path: Path) -> None:
    config, own = tiny_model(), Own()
    own.open(str(shapes.write_run(config, tmp_path, 12)))
    prompt = shapes.token_ids(config, 1, 5)[0]
    generated = own.generate(prompt, 3)
    assert len(generated["ids"]) == 4
    assert generated["ids"][0] == int(np.argmax(own.logits(prompt)["logits"]))
    assert own.prefill(prompt)["seconds"] > 0
    kernels: dict[str, Any] = {"default": None, "torch": shapes.PURE_TORCH.model_dump()}
    used = own.train(shapes.token_ids(config, 2, 12), kernels)["kernels"]
    assert used["torch"]["experts"] == "sorted_slices"
    before = {name: own.loss(name)["loss"] for name in kernels}
    assert before["default"] == pytest.approx(before["torch"], rel=1e-5)
    for name in kernels:
        assert own.step(name)["seconds"] > 0
    assert own.loss("torch")["loss"] == pytest.approx(own.loss("default")["loss"], rel=1e-5)  # one set of weights
    assert own.loss("torch")["loss"] < before["torch"]
    assert own.validate("default")["seconds"] > 0


def test_different_losses_end_the_comparison() -> None:
    class Fake:
        def __init__(self, loss: float) -> None:
            self.loss = loss

        def ask(self, do: str, **request: Any) -> dict[str, float]:
            return {"loss": self.loss}

    told = context()
    steps._same_loss(told, Fake(9.0), Fake(9.00001))  # type: ignore[arg-type]
    assert told.checks["largest difference of losses before training"] == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(PeerError, match="differ by more"):
        steps._same_loss(told, Fake(9.0), Fake(9.001))  # type: ignore[arg-type]


def test_a_tiny_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "calls_needed", lambda function: 1)
    samples = layers.measure(TINY, context(repeats=2))
    assert {"loop", "sorted_slices", layers.PURE, layers.TORCH_DENSE, layers.OWN_DENSE} <= set(samples)
    assert all(len(times) == 2 and min(times) > 0 for times in samples.values())
    rows = layers.rows_of("layer-16", samples, (1.15, 1.05))
    assert len(rows) == len(samples)
    assert rows[0].peer is not None
    assert rows[0].peer.name == layers.TORCH_DENSE


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = layers.moe_call

    def wrong(shape: LayerShape, kernels: Any) -> Any:
        call = honest(shape, kernels)
        return (lambda: call() * 1.01) if kernels == shapes.PURE_TORCH else call

    monkeypatch.setattr(layers, "moe_call", wrong)
    with pytest.raises(RuntimeError, match="pure torch is off"):
        layers.moe_calls(TINY, context())
