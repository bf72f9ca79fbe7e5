"""Log-probabilities in chunks against one softmax over everything."""

from __future__ import annotations

import pytest
import torch

from finemoe.model import logprobs
from finemoe.model.logprobs import token_logprobs
from oracles.models import VOCAB, build, small_config


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 21])
@pytest.mark.parametrize("shape", [(2, 7), (5,), (0,)])
def test_chunks_change_nothing(chunk: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk)
    model = build(small_config())
    hidden = torch.randn(*shape, model.config.hidden_size)
    targets = torch.randint(VOCAB, shape)
    found, greedy = token_logprobs(model, hidden, targets)
    whole = torch.log_softmax((hidden @ model.head_weight.T).double(), dim=-1)
    torch.testing.assert_close(found.double(), whole.gather(-1, targets[..., None])[..., 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy, whole.argmax(dim=-1) == targets)
    assert found.dtype == torch.float32
    assert found.shape == shape
