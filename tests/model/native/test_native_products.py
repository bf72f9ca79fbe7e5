"""The C++ products against plain torch in float64: values and gradients, at sizes that cut every tile somewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.model import native
from finemoe.model.backend import Backend
from finemoe.model.backends import NATIVE, TORCH, backend_for
from finemoe.model.backends import native as native_kernel
from finemoe.model.config import Kernels
from finemoe.model.feed_forward import SwiGLU, swiglu
from finemoe.model.moe.dispatch import LocalDispatch
from finemoe.model.moe.experts import GroupedExperts, grouped_mm, loop
from finemoe.model.moe.layer import routed_output
from finemoe.model.native.exact import sort_by_expert, top_k
from finemoe.model.native.experts import experts as native_experts
from finemoe.model.native.experts import swiglu as native_swiglu
from finemoe.model.native.linear import linear
from finemoe.model.projection import Projection
from finemoe.model.transformer import Transformer
from oracles.models import build, decision_of, small_config
from oracles.rounding import rounding_error

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler: plain torch runs")


def experts_by(name: str) -> Backend:
    return backend_for(Kernels.model_validate({"experts": name}))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def assert_equal_to_float64(
    found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """`found(*inputs)` in float32 and its gradients are those of `expected` in float64, but for rounding.

    Allowed is what roundings of that many additions come to (`oracles.rounding`), or 2e-6 of the largest value.
    """
    output = found(*inputs)
    direction = torch.randn_like(output)

    def with_gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        result = function(*leaves)
        return result, *torch.autograd.grad((result * direction.to(dtype)).sum(), leaves)

    exact = with_gradients(expected, torch.float64)
    rounding = rounding_error(lambda: with_gradients(expected, torch.float64), exact)
    for mine, truth, allowed in zip(with_gradients(found, torch.float32), exact, rounding, strict=True):
        error = (mine.double() - truth).abs().max().item()
        assert error < max(2e-6 * max(1e-30, truth.abs().max().item()), allowed)
    with torch.no_grad():  # the path without a graph is another one
        torch.testing.assert_close(found(*inputs), output, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "columns", "shared"),
    [(1, 1, 1), (1, 33, 17), (7, 5, 3), (8, 16, 16), (9, 64, 31), (14, 32, 384), (15, 33, 385), (29, 70, 800),
     (31, 1030, 40), (130, 97, 129), (3, 200, 1000), (1000, 18, 20)],
)  # fmt: skip
def test_linear(rows: int, columns: int, shared: int) -> None:
    assert_equal_to_float64(linear, F.linear, (drawn(rows, shared), drawn(columns, shared)))


@pytest.mark.parametrize("shared", [3, 16, 95, 1024])
@pytest.mark.parametrize("columns", [1, 3, 4, 9, 130])
def test_of_few_rows_each_is_multiplied_as_if_alone(columns: int, shared: int) -> None:
    generator = torch.Generator().manual_seed(columns * shared)
    states, weight = (torch.randn(count, shared, generator=generator) for count in (63, columns))
    up, down = torch.randn(columns, shared, generator=generator), torch.randn(shared, columns, generator=generator)
    with torch.no_grad():
        alone = torch.cat([linear(row[None], weight) for row in states])
        activated = torch.cat([native_swiglu(row[None], weight, up, down, None) for row in states])
        torch.testing.assert_close(alone, states @ weight.T, rtol=1e-4, atol=1e-3)
        for rows in (2, 5, 6, 7, 12, 13, 31, 63):
            assert torch.equal(linear(states[:rows], weight), alone[:rows])
            assert torch.equal(native_swiglu(states[:rows], weight, up, down, None), activated[:rows])


def test_linear_takes_any_leading_dimensions_and_strides() -> None:
    weight = drawn(6, 5)
    assert_equal_to_float64(linear, F.linear, (drawn(2, 3, 4, 5), weight))
    states = drawn(5, 20).t()
    torch.testing.assert_close(linear(states, weight), F.linear(states, weight))
    assert linear(torch.zeros(0, 5), weight).shape == (0, 6)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(
    ("tokens", "hidden", "width"), [(1, 3, 1), (5, 17, 18), (8, 16, 16), (40, 33, 47), (300, 400, 20)]
)
def test_swiglu(tokens: int, hidden: int, width: int, limit: float | None) -> None:
    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x, gate), F.linear(x, up), limit), down)

    inputs = (drawn(tokens, hidden), drawn(width, hidden), drawn(width, hidden), drawn(hidden, width))
    assert_equal_to_float64(lambda *x: native_swiglu(*x, limit), plain, inputs)


def test_activation_at_the_ends_of_float32() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e30, math.nan]]).t()
    identity = torch.ones(1, 1)
    found = native_swiglu(gate.contiguous(), identity, identity, identity, None)
    torch.testing.assert_close(found, F.silu(gate) * gate, equal_nan=True, rtol=1e-6, atol=1e-34)


IDS = {
    "one token": [[2, 0]],
    "one expert of many": [[3]] * 20,
    "all tokens on one expert, and on another": [[1, 4]] * 50,
    "few rows for all": [[0, 1], [1, 2], [2, 3], [3, 4]],
    "uneven": [[token % 5, 5 + token * token % 3] for token in range(400)],
}


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("dropping", [False, True], ids=["dropless", "dropping"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize(("hidden", "width"), [(5, 3), (33, 17), (64, 40)])
def test_whole_layer(ids: list[list[int]], hidden: int, width: int, dropping: bool, limit: float | None) -> None:
    expert_ids = torch.tensor(ids)
    tokens, k = expert_ids.shape
    keep = torch.rand(tokens, k) < 0.6 if dropping else None
    if keep is not None:
        keep[0, 0] = True

    def on(kernel: str) -> Callable[..., Tensor]:
        def run(states: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            experts = GroupedExperts(8, hidden, width, experts_by(kernel), limit)
            del experts.gate_up_proj, experts.down_proj  # tensors with a graph take the parameters' place
            experts.gate_up_proj, experts.down_proj = gate_up, down  # type: ignore[assignment]
            masked = gates if keep is None else gates * keep
            return routed_output(LocalDispatch(), experts, states, decision_of(expert_ids, 8), keep, masked)[0]

        return run

    inputs = (drawn(tokens, hidden), drawn(tokens, k), drawn(8, 2 * width, hidden), drawn(8, hidden, width))
    assert_equal_to_float64(on("native"), on("loop"), inputs)
    torch.testing.assert_close(on("auto")(*inputs), on("native")(*inputs), rtol=0, atol=0)


def test_a_dropped_assignment_gives_its_gate_no_gradient() -> None:
    keep = torch.tensor([[True, False], [False, True], [True, True]])
    ticket = LocalDispatch().in_place(decision_of(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3), keep)
    gates, weights = torch.rand(3, 2, requires_grad=True), (torch.randn(3, 8, 6), torch.randn(3, 6, 4))
    output = native_experts(torch.randn(3, 6), ticket.order, ticket.slots, ticket.counts, gates, *weights, None)
    [gradient] = torch.autograd.grad(output.sum(), gates)
    assert torch.equal(gradient == 0, ~keep)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 1, 0], [40, 0, 200, 9]])
def test_kernel_on_rows(counts: list[int]) -> None:
    inputs = (drawn(sum(counts), 20), drawn(4, 26, 20), drawn(4, 20, 13))
    given = torch.tensor(counts)
    assert_equal_to_float64(lambda x, *w: native_kernel(x, given, *w), lambda x, *w: loop(x, given, *w), inputs)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    expert_ids = torch.randint(0, 4, (700, 1))
    decision = decision_of(expert_ids, 4)
    experts = GroupedExperts(4, 48, 32, experts_by("native"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    states, gates = drawn(700, 48), drawn(700, 1)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output, _ = routed_output(LocalDispatch(), experts, states, decision, None, gates)
        found.append((output, *torch.autograd.grad(output.sum(), (states, gates, *experts.parameters()))))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_sorting_is_a_stable_argsort() -> None:
    expert_ids = torch.randint(0, 9, (50, 3))
    order, slots, counts = sort_by_expert(expert_ids, 9)
    assert torch.equal(order, expert_ids.flatten().argsort(stable=True))
    assert torch.equal(slots[order], torch.arange(150))
    assert torch.equal(counts, torch.bincount(expert_ids.flatten(), minlength=9))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_expert_that_does_not_exist_is_an_error(wrong: int) -> None:
    with pytest.raises(RuntimeError, match=f"expert id {wrong} is not below 4"):
        sort_by_expert(torch.tensor([[0], [wrong]]), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_torch_path(dtype: torch.dtype) -> None:
    decision = decision_of(torch.tensor([[0, 1], [1, 2], [1, 0]]), 3)
    states, gates = torch.randn(3, 8, dtype=dtype), torch.rand(3, 2, dtype=dtype)
    experts = {name: GroupedExperts(3, 8, 4, experts_by(name)).to(dtype) for name in ("native", "sorted_slices")}
    for parameter in experts["native"].parameters():
        torch.nn.init.normal_(parameter)
    experts["sorted_slices"].load_state_dict(experts["native"].state_dict())
    found, expected = (
        routed_output(LocalDispatch(), layer, states, decision, None, gates)[0] for layer in experts.values()
    )
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_grouped_mm_in_bf16_is_the_loop_to_bf16_rounding() -> None:
    counts = torch.tensor([5, 0, 11, 4])
    rows, gate_up, down = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((20, 16), (4, 32, 16), (4, 16, 16)))
    found, expected = grouped_mm(rows, counts, gate_up, down), loop(rows, counts, gate_up, down)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-1)


def test_one_backend_is_held_by_every_module() -> None:
    config = small_config(mtp_depth=1)
    for products, operations in (("torch", TORCH), ("native", NATIVE)):
        model = Transformer(config, Kernels.model_validate({"products": products}))
        held = [vars(module)["backend"] for module in model.modules() if "backend" in vars(module)]
        assert len(held) > 20
        assert all(backend is model.backend for backend in held)
        for name in ("linear", "rms_norm", "swiglu", "rotate", "attend", "cross_entropy_sum", "decode"):
            assert getattr(model.backend, name) is getattr(operations, name)


def test_products_torch_takes_no_native_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(small_config(mtp_depth=1), products="torch", experts="sorted_slices")
    for name in ("linear", "rms_norm", "swiglu", "rotate", "attention", "experts", "cross_entropy_sum"):
        monkeypatch.setattr(f"finemoe.model.backends.native_{name}", None)
    tokens = torch.arange(8)[None]
    output = model(tokens, mtp=True)
    model.logits(output.hidden)
    weights = torch.ones(8)
    model.backend.cross_entropy_sum(output.hidden[0], model.head_weight, tokens[0], weights).backward()
    with torch.no_grad():
        model.eval()(tokens[:, :1], cache=model.new_cache(1, 4))


def test_modules_under_autocast_give_its_dtype() -> None:
    for module in (Projection(4, 3, NATIVE), SwiGLU(4, 5, NATIVE)):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(torch.randn(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("own", [False, True], ids=["ticket", "order without memory"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_the_whole_form_without_any_row_keeps_the_graph(tokens: int, own: bool) -> None:
    experts = GroupedExperts(4, 5, 3, experts_by("native"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    states, gates, keep = drawn(tokens, 5), drawn(tokens, 2), torch.zeros(tokens, 2, dtype=torch.bool)
    assert experts.fuses(states, gates)
    ticket = LocalDispatch().in_place(decision_of(torch.zeros(tokens, 2, dtype=torch.int64), 4), keep)
    if own:
        ticket = replace(ticket, order=torch.empty(0, dtype=torch.int64))
    output = experts.fused(states, ticket, gates * keep)
    leaves = (states, gates, *experts.parameters())
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, as a gradient that nobody wrote would show
    try:
        found = torch.autograd.grad(output.sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert output.shape == (tokens, 5)
    assert not output.any()
    assert all(
        gradient.shape == leaf.shape and not gradient.any() for gradient, leaf in zip(found, leaves, strict=True)
    )


@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 1, 1), (5, 3, 3), (200, 64, 7), (70, 256, 8), (0, 4, 2)])
def test_top_k_is_torchs(rows: int, columns: int, k: int) -> None:
    scores = torch.randn(rows, columns)
    assert torch.equal(top_k(scores, k), scores.topk(k, dim=-1).indices)


def test_top_k_of_equal_infinite_and_missing_scores() -> None:
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[1.0, 1, 1, 1], [-inf, -inf, 0, -inf], [nan, 2, nan, 1], [nan, nan, nan, nan]])
    assert top_k(scores, 3).tolist() == [[0, 1, 2], [2, 0, 1], [1, 3, 0], [0, 1, 2]]
    with pytest.raises(RuntimeError, match="k must be from 1 to the 4 columns of scores, not 5"):
        top_k(scores, 5)
