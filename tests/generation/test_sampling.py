"""`pick` against the distribution it promises, and what top-k and top-p may leave."""

import pytest
import torch
from pydantic import ValidationError

from finemoe.core import seeds
from finemoe.core.errors import CheckpointError
from finemoe.generation import SamplingConfig, pick

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.5])


def draws(count: int, **config: float) -> list[int]:
    stream = seeds.generator(0, "test")
    sampling = SamplingConfig(**config)
    return [int(pick(LOGITS[None], sampling, [stream])[0]) for _ in range(count)]


def test_greedy_takes_the_largest_and_logprobs_are_the_models_own() -> None:
    ids, logprobs = pick(torch.stack([LOGITS, LOGITS.flip(0)]), SamplingConfig(temperature=0.0, top_k=1), [])
    assert ids.tolist() == [0, 4]
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[[0, 0]])


@pytest.mark.parametrize("changes", [{"temperature": 0.4}, {"top_k": 2}, {"top_p": 0.3}], ids=str)
def test_logprobs_are_those_before_temperature_and_cuts(changes: dict[str, float]) -> None:
    ids, logprobs = pick(LOGITS[None], SamplingConfig(**changes), [seeds.generator(0, "test")])
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[ids])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    count = 4000
    frequencies = torch.bincount(torch.tensor(draws(count, temperature=temperature)), minlength=5) / count
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies - expected).abs().max() < 4 * 0.5 / count**0.5


def test_top_k_keeps_k_also_among_ties() -> None:
    drawn = set(draws(500, top_k=3))
    assert {0, 1} < drawn
    assert len(drawn) == 3


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = LOGITS.softmax(-1)
    assert probabilities[0] < 0.6 < probabilities[0] + probabilities[1]
    assert set(draws(300, top_p=0.6)) == {0, 1}
    assert set(draws(50, top_p=1e-9)) == {0}
    assert set(draws(300, top_p=0.6, top_k=1)) == {0}


def test_top_k_beyond_the_vocabulary_and_top_p_of_one_change_nothing() -> None:
    assert draws(100, top_k=50, top_p=1.0) == draws(100)


def cut_in_full(scores: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Top-k and top-p by sorting the whole vocabulary of one row."""
    order = scores.argsort(descending=True)
    kept = order[: top_k or len(order)]
    before = scores[kept].softmax(-1).cumsum(-1) - scores[kept].softmax(-1)
    kept = kept[before < (top_p or 1.0)] if len(kept) > 1 else kept
    return torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept])


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0], ids=["flat", "middling", "peaked"])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 0.9), (None, 0.999), (50, None), (50, 0.5), (200, 0.99), (None, None)]
)
def test_a_draw_is_the_best_of_what_is_kept_with_noise(spread: float, top_k: int | None, top_p: float | None) -> None:
    logits, config = spread * torch.randn(3, 5000), SamplingConfig(temperature=0.8, top_k=top_k, top_p=top_p)
    ids, _ = pick(logits, config, [seeds.generator(s, "x") for s in range(3)])
    for row in range(3):
        uniform = torch.rand(5000, generator=seeds.generator(row, "x"), dtype=torch.float64)
        noisy = cut_in_full(logits[row].double() / 0.8, top_k, top_p) - (-uniform.log()).log()
        assert ids[row] == noisy.argmax()


def test_each_row_uses_its_own_stream() -> None:
    alone = [pick(LOGITS[None], SamplingConfig(), [seeds.generator(s, "x")])[0].item() for s in range(8)]
    together = pick(LOGITS.expand(8, -1), SamplingConfig(), [seeds.generator(s, "x") for s in range(8)])[0]
    assert together.tolist() == alone


def test_logits_that_are_not_finite_are_named() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        pick(torch.tensor([[0.0, float("nan")]]), SamplingConfig(), [seeds.generator(0, "x")])


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"max_new_tokens": 0}]
)
def test_impossible_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**bad)
