"""The choice of kernels: by what the timer says, remembered, and without a trace in the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from finemoe.model import backends, native
from finemoe.model.backends import EXPERT_KERNELS
from finemoe.model.config import Kernels, ModelConfig
from finemoe.runs.calibration import Candidates, choose, seconds_of
from oracles.models import moe_table, small_config

CPU = torch.device("cpu")


class FakeTimer:
    """Says how long each candidate takes, after running it once."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[list[str]] = []

    def __call__(self, candidates: Candidates, device: torch.device) -> Mapping[str, float]:
        self.asked.append(sorted(candidates))
        for run in candidates.values():
            run()
        return {name: self.seconds.get(name, 1.0) for name in candidates}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    native.available()  # before the cache moves: it would be compiled again
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path))
    return tmp_path / "kernels.json"


def chosen(timer: FakeTimer, kernels: Kernels | None = None, config: ModelConfig | None = None) -> Kernels:
    config = config or small_config(feed_forward=moe_table())
    return choose(config, kernels or Kernels(), tokens=64, device=CPU, bf16=False, timer=timer).kernels


@pytest.mark.parametrize("fastest", ["loop", "sorted_slices", "grouped_mm"])
def test_the_fastest_wins(fastest: str) -> None:
    timer = FakeTimer(**{fastest: 0.1})
    assert chosen(timer).experts == fastest
    expected = set(EXPERT_KERNELS) - {"auto"} - (set() if native.available() else {"native"})
    assert set(timer.asked[-1]) == expected


@pytest.mark.skipif(not native.available(), reason="no C++ compiler: plain torch runs")
def test_products_are_measured_too() -> None:
    assert chosen(FakeTimer(torch=0.1)).products == "torch"


@pytest.mark.skipif(not native.available(), reason="no C++ compiler: plain torch runs")
def test_native_may_win() -> None:
    found = chosen(FakeTimer(native=0.1))
    assert (found.experts, found.products) == ("native", "native")


@pytest.mark.skipif(not native.available(), reason="no C++ compiler: plain torch runs")
def test_products_are_judged_by_all_that_they_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SwiGLU alone may be faster in torch where norms, attention and loss make the whole slower."""
    operations = ("linear", "rms_norm", "swiglu", "rotate", "attention", "cross_entropy_sum")
    called: list[str] = []
    for name in operations:
        original = vars(backends)[f"native_{name}"]
        monkeypatch.setattr(
            backends, f"native_{name}", lambda *args, name=name, run=original: called.append(name) or run(*args)
        )

    def timer(candidates: Candidates, device: torch.device) -> Mapping[str, float]:
        if set(candidates) == {"native", "torch"}:
            candidates["torch"]()
            assert called == []
            candidates["native"]()
            assert set(called) == set(operations)
        return dict.fromkeys(candidates, 1.0)

    choose(small_config(feed_forward=moe_table()), Kernels(), tokens=64, device=CPU, bf16=False, timer=timer)
    assert called


def test_measured_once_and_again_for_another_shape_or_thread_count(cache: Path) -> None:
    first = FakeTimer(loop=0.1)
    chosen(first)
    entries = len(json.loads(cache.read_text()))
    again = FakeTimer(sorted_slices=0.1)
    assert chosen(again).experts == "loop"
    assert again.asked == []
    chosen(again, config=small_config(feed_forward=moe_table(expert_hidden_size=24)))
    assert again.asked
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert chosen(FakeTimer(sorted_slices=0.1)).experts == "sorted_slices"
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads(cache.read_text())) > entries


@pytest.mark.parametrize("damage", ["", "[1, 2]", '{"a": 3}', '{"a": {"loop": "x"}}'])
def test_a_damaged_cache_costs_another_measurement(cache: Path, damage: str) -> None:
    cache.write_text(damage)
    assert chosen(FakeTimer(loop=0.1)).experts == "loop"
    assert "loop" in cache.read_text()


def test_an_unwritable_cache_is_no_error(cache: Path) -> None:
    cache.mkdir()
    assert chosen(FakeTimer(loop=0.1)).experts == "loop"


def test_what_the_recipe_names_is_kept_and_not_measured() -> None:
    timer = FakeTimer()
    given = Kernels(experts="loop", products="torch", recompute=True)
    assert chosen(timer, given) == given
    assert timer.asked == []


def test_a_dense_model_has_no_experts_to_measure() -> None:
    dense = {"kind": "dense", "ffn_hidden_size": 24}
    timer = FakeTimer(torch=0.1)
    found = chosen(timer, config=small_config(feed_forward=dense, leading=None))
    assert found.products == "torch"
    assert all("loop" not in names for names in timer.asked)


def test_random_state_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    chosen(FakeTimer())
    assert torch.equal(torch.get_rng_state(), before)


def test_in_bf16_native_kernels_are_no_candidates() -> None:
    timer = FakeTimer(grouped_mm=0.1)
    found = choose(small_config(feed_forward=moe_table()), Kernels(), tokens=64, device=CPU, bf16=True, timer=timer)
    assert (found.kernels.experts, found.kernels.products) == ("grouped_mm", "torch")
    assert all("native" not in names for names in timer.asked)


def test_reason_names_every_candidate_fastest_first() -> None:
    config = small_config(feed_forward=moe_table())
    timer = FakeTimer(loop=0.001, sorted_slices=0.002)
    reason = choose(config, Kernels(products="torch"), tokens=64, device=CPU, bf16=False, timer=timer).reason
    assert reason.startswith("experts: loop 1 ms, sorted_slices 2 ms, ")


def test_the_real_timer_takes_turns_and_gives_a_positive_median_to_each() -> None:
    order: list[str] = []
    found = seconds_of({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU)
    assert order[:4] == ["a", "b", "a", "b"]
    assert set(found) == {"a", "b"}
    assert all(seconds > 0 for seconds in found.values())


def test_a_layer_too_large_to_measure_is_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from finemoe.runs import calibration

    monkeypatch.setattr(calibration, "_MOST_WEIGHTS", 3 * 16 * 8 * 2)
    built: list[int] = []

    def timer(candidates: Candidates, device: torch.device) -> Mapping[str, float]:
        for name, run in candidates.items():
            cells = run.__closure__ or ()
            modules = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, torch.nn.Module)]
            built.extend(len(p) for m in modules for n, p in m.named_parameters() if n == "down_proj")
            assert name
        return dict.fromkeys(candidates, 1.0)

    config = small_config(feed_forward=moe_table(num_routed_experts=8, expert_hidden_size=8))
    choose(config, Kernels(products="torch"), tokens=64, device=CPU, bf16=False, timer=timer)
    assert set(built) == {2}
