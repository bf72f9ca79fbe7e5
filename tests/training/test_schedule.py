"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.training.schedule import (
    SCHEDULES,
    CosineConfig,
    MultiStepConfig,
    WarmupStableDecayConfig,
    learning_rate_factor,
)


def factors(config: object, total: int) -> list[float]:
    return [learning_rate_factor(config, step, total) for step in range(total)]


def test_multi_step_drops_at_eighty_and_ninety_percent() -> None:
    found = factors(MultiStepConfig(warmup_share=0.2), 10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 0.316, 0.316**2])


@pytest.mark.parametrize(("total", "first"), [(10, 8), (100, 80), (35, 28), (3, 3), (7, 6)])
def test_a_milestone_is_met_on_its_step_in_spite_of_rounding(total: int, first: int) -> None:
    config = MultiStepConfig(warmup_share=0, milestones=(0.8,))
    assert factors(config, total) == [1.0] * first + [0.316] * (total - first)


def test_paper_warm_up_of_two_thousand_steps() -> None:
    config = MultiStepConfig(warmup_share=0.02)
    assert learning_rate_factor(config, 0, 100_000) == pytest.approx(1 / 2000)
    assert learning_rate_factor(config, 999, 100_000) == pytest.approx(0.5)
    assert learning_rate_factor(config, 1999, 100_000) == 1.0


def test_cosine() -> None:
    found = factors(CosineConfig(warmup_share=0.2, final_share=0.1), 10)
    # after warm-up: 0.1 + 0.9 (1 + cos(pi x)) / 2 at x = 0, 1/8 ... 7/8
    after = [1.0, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]
    assert found == pytest.approx([0.5, 1.0, *after], abs=1e-6)


def test_warmup_stable_decay() -> None:
    found = factors(WarmupStableDecayConfig(warmup_share=0.1, decay_share=0.4, final_share=0.2), 10)
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_no_warm_up_when_its_share_is_less_than_a_step() -> None:
    assert learning_rate_factor(MultiStepConfig(warmup_share=0.05), 0, 10) == 1.0


@given(
    kind=st.sampled_from(sorted(SCHEDULES)),
    warmup=st.floats(0, 0.5),
    total=st.integers(1, 300),
)
def test_every_schedule_rises_on_a_line_and_never_again(kind: str, warmup: float, total: int) -> None:
    config = SCHEDULES[kind][0](warmup_share=warmup)  # type: ignore[call-arg]
    found = factors(config, total)
    rising = int(warmup * total)
    assert all(0 < factor <= 1 for factor in found)
    assert found[:rising] == pytest.approx([(step + 1) / (warmup * total) for step in range(rising)])
    assert all(later <= earlier + 1e-9 for earlier, later in zip(found[rising:], found[rising + 1 :], strict=False))


def test_milestones_must_rise() -> None:
    with pytest.raises(ConfigError, match="must rise"):
        parse(MultiStepConfig, {"milestones": [0.9, 0.8]}, "recipe")
