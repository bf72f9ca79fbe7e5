"""Expert kernels on a CUDA device, in float32 and bf16. Run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from finemoe.model.backends import EXPERT_KERNELS, backend_for
from finemoe.model.config import Kernels
from finemoe.model.moe.dispatch import LocalDispatch
from finemoe.model.moe.experts import GroupedExperts
from finemoe.model.moe.layer import routed_output
from oracles.models import decision_of


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("chosen", [16, 1], ids=["spread over all", "all on one expert"])
def test_values_and_gradients_are_those_of_the_loop_on_the_cpu(
    kernel: str, chosen: int, dtype: torch.dtype, tolerance: float
) -> None:
    expert_ids = torch.rand(512, chosen).topk(min(2, chosen)).indices
    states, gates = torch.randn(512, 64), torch.rand(expert_ids.shape)
    results = []
    for device, name, kind in (("cpu", "loop", torch.float32), ("cuda", kernel, dtype)):
        experts = GroupedExperts(16, 64, 32, backend_for(Kernels.model_validate({"experts": name})))
        for seed, parameter in enumerate(experts.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
        experts.to(device)
        inputs = [tensor.to(device, kind).requires_grad_() for tensor in (states, gates)]
        with torch.autocast(device, torch.bfloat16, enabled=kind == torch.bfloat16):
            decision = decision_of(expert_ids.to(device), 16)
            output, _ = routed_output(LocalDispatch(), experts, inputs[0], decision, None, inputs[1])
        leaves = (*inputs, *experts.parameters())
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    for ours, expected in zip(results[1], results[0], strict=True):
        difference = (ours.detach().cpu().float() - expected.detach()).norm() / expected.norm()
        assert difference < tolerance
