"""What an accelerator must not be asked, without one: tensors of two devices at once, or numbers still to come.

On the meta device tensors have shapes and no contents, so that an operation that mixes devices or reads a value fails.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.transformer import Transformer
from oracles.models import VOCAB, moe_table, small_config, v3_config

META = torch.device("meta")
MODELS: dict[str, ModelConfig] = {
    "V3": v3_config(),
    "grouped-query": small_config(),
    "hash": small_config(feed_forward=moe_table("hash_layer")),
    "balance": small_config(feed_forward=moe_table(balance={"expert": 0.1, "z": 0.1})),
}


class NoAutocast(nullcontext[None]):
    """The meta device has none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def _meta_has_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_training_pass_in_bf16_never_waits_for_the_device(config: ModelConfig, recompute: bool) -> None:
    with META:
        model = Transformer(config, Kernels(experts="grouped_mm", recompute=recompute)).to(torch.bfloat16).train()
        ids, documents = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
        weights = torch.ones(ids.numel())
    output = model(ids, documents=documents, mtp=bool(model.mtp))
    states: list[Tensor] = [output.hidden, *output.mtp_hidden]
    loss = model.backend.cross_entropy_sum(output.hidden.flatten(0, 1), model.head_weight, ids.flatten(), weights)
    loss = loss + sum(model.logits(state).float().sum() for state in states)
    loss = loss + sum(sum(record.balance.values()) for record in output.routing.values())
    loss.backward()
    assert {parameter.grad.device for parameter in model.parameters() if parameter.grad is not None} == {META}
    assert {record.load.device for record in output.routing.values()} == {META}
    assert model.logits(output.hidden).shape == (2, 9, VOCAB)


def test_the_measure_sees_a_value_that_is_read() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device=META).tolist()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device=META) + torch.zeros(3)
