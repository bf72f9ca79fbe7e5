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
