"""The native kernels where numbers end: NaN, infinities, denormals, and products of a million, against plain torch.

Where torch's result or gradient is not a number, ours must not be one, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finemoe.model import native
from finemoe.model.attention.kernels import reference
from finemoe.model.backend import Backend
from finemoe.model.backends import NATIVE, TORCH, automatic
from finemoe.model.moe.experts import loop, sorted_slices
from finemoe.model.native.exact import sort_by_expert
from finemoe.model.native.experts import experts as native_experts
from finemoe.model.spans import Spans

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "denormal": 1e-40, "zero": 0.0, "1e20": 1e20}
PLAIN = replace(TORCH, attend=reference, experts=loop)  # sdpa is itself 2e-2 off where products are a million
Kernel = Callable[..., Tensor]
KEYS = 300


def every_key(queries: int, keys: int, batch: int = 2) -> Spans:
    return Spans(None, torch.full((batch, queries), keys), keys)


def fused(backend: Backend, rows: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two of three experts a token, as a layer has it."""
    ids = torch.stack([torch.arange(len(rows)) % 3, (torch.arange(len(rows)) + 1) % 3], dim=1)
    order, slots, counts = sort_by_expert(ids, 3)
    if backend is NATIVE:
        return native_experts(rows, order, slots, counts, gates, gate_up, down, 1.5)
    outputs = loop(rows[order // 2], counts, gate_up, down, 1.5)
    return (outputs[slots].view(len(rows), 2, -1) * gates[..., None]).sum(1)


def angles(backend: Backend, states: Tensor, layout: str) -> Tensor:
    turn = torch.linspace(-3, 3, 7 * 18).view(1, 7, 18).expand(2, 7, 18)
    return backend.rotate(states, turn.cos(), turn.sin(), layout)  # type: ignore[arg-type]


def loss(backend: Backend, hidden: Tensor, head: Tensor) -> Tensor:
    targets, weights = torch.arange(len(hidden)) * 7 % len(head), torch.linspace(0, 1, len(hidden))
    return backend.cross_entropy_sum(hidden, head, targets, weights)


def experts(backend: Backend, rows: Tensor, gate_up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    counts = torch.tensor([len(rows) // 3, 0, len(rows) - len(rows) // 3])
    return backend.experts(rows, counts, gate_up, down, limit)


KERNELS: dict[str, tuple[Kernel, list[tuple[int, ...]]]] = {
    "linear, few rows": (lambda b, x, w: b.linear(x, w, None), [(3, 37), (21, 37)]),
    "linear": (lambda b, x, w: b.linear(x, w, None), [(40, 37), (21, 37)]),
    "RMSNorm": (lambda b, x, w: b.rms_norm(x, w, 1e-6), [(11, 37), (37,)]),
    "rotate halves": (lambda b, x: angles(b, x, "half_split"), [(2, 3, 7, 44)]),
    "rotate neighbours": (lambda b, x: angles(b, x, "interleaved"), [(2, 3, 7, 44)]),
    "loss": (loss, [(23, 19), (50, 19)]),
    "fused experts": (fused, [(9, 19), (9, 2), (3, 74, 19), (3, 19, 37)]),
    "attention, few rows": (
        lambda b, *x: b.attend(*x, every_key(5, 5), 0.3), [(2, 4, 5, 24), (2, 2, 5, 24), (2, 2, 5, 16)]
    ),
    "attention": (lambda b, *x: b.attend(*x, every_key(33, 33), 0.3), [(2, 4, 33, 24), (2, 2, 33, 24), (2, 2, 33, 16)]),
    "attention in parts": (
        lambda b, *x: b.attend(*x, every_key(4, KEYS, 1), 0.3), [(1, 2, 4, 24), (1, 2, KEYS, 24), (1, 2, KEYS, 16)]
    ),
    "attention, one query": (
        lambda b, *x: b.attend(*x, every_key(1, KEYS), 0.3), [(2, 4, 1, 24), (2, 2, KEYS, 24), (2, 2, KEYS, 16)]
    ),
}  # fmt: skip
for name, bound in (("", None), (" with a limit", 1.5)):
    for size, rows in ((" of few rows", 3), ("", 40)):
        KERNELS[f"SwiGLU{name}{size}"] = (
            lambda b, *x, limit=bound: b.swiglu(*x, limit),
            [(rows, 19), (37, 19), (37, 19), (19, 37)],
        )
        KERNELS[f"experts{name}{size}"] = (
            lambda b, *x, limit=bound: experts(b, *x, limit),
            [(rows, 19), (3, 74, 19), (3, 19, 37)],
        )


def results(kernel: Kernel, backend: Backend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and what flows back to every input."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = kernel(backend, *inputs)
    flow = torch.linspace(0.5, 1.5, output.numel()).view(output.shape)
    with torch.no_grad():
        torch.testing.assert_close(kernel(backend, *inputs), output, rtol=0, atol=0, equal_nan=True)
    return [output.detach(), *torch.autograd.grad((output * flow).sum(), inputs)]


def check(found: Tensor, wanted: Tensor, tolerance: float = 1e-3, rounding: float = 1e-30) -> None:
    assert torch.equal(found.isnan(), wanted.isnan())
    for infinite in (math.inf, -math.inf):
        assert torch.equal(found == infinite, wanted == infinite)
    finite = wanted.isfinite()
    if finite.any():
        scale = wanted[finite].abs().max().item()
        torch.testing.assert_close(found[finite], wanted[finite], rtol=0, atol=max(tolerance * scale, rounding))


@pytest.mark.parametrize(
    ("kernel", "name"),  # products of 1e20 have no gradient in float32; test_large_products has those that do
    [(one, name) for one in KERNELS for name in SPECIAL if name != "1e20" or not one.startswith("attention")],
)
def test_a_special_number_goes_where_it_goes_in_torch(kernel: str, name: str) -> None:
    compute, shapes = KERNELS[kernel]
    torch.manual_seed(0)
    drawn = [torch.randn(shape) for shape in shapes]
    for number, tensor in enumerate(drawn):
        flat = tensor.view(-1)
        for place in (slice(flat.numel() // 2, flat.numel() // 2 + 1), slice(-tensor.shape[-1], None)):
            inputs = [each.clone() for each in drawn]
            inputs[number].view(-1)[place] = SPECIAL[name]
            pairs = zip(results(compute, NATIVE, inputs), results(compute, PLAIN, inputs), strict=True)
            for found, wanted in pairs:
                if kernel == "fused experts" and "inf" in name:  # gates are multiplied after the sum, not before it
                    assert torch.equal(found.isfinite(), wanted.isfinite())
                else:
                    check(found, wanted)


def test_two_ways_in_plain_torch_agree_too() -> None:
    """`sorted_slices` has a gradient written by hand."""
    compute, shapes = KERNELS["experts with a limit"]
    for special in SPECIAL.values():
        inputs = [torch.randn(shape) for shape in shapes]
        inputs[0][5] = special
        by_hand = results(compute, replace(TORCH, experts=sorted_slices), inputs)
        for found, wanted in zip(by_hand, results(compute, PLAIN, inputs), strict=True):
            check(found, wanted)
    assert NATIVE.experts is automatic


@pytest.mark.parametrize("place", ["query", "key", "value"])
@pytest.mark.parametrize("special", ["nan", "inf", "-inf"])
def test_what_a_query_sees_reaches_it_under_a_mask(place: str, special: str) -> None:
    """Torch multiplies what is masked by 0, so that one NaN is everywhere; here it is at least where it is seen."""
    torch.manual_seed(0)
    states = [torch.randn(1, 2, 33, 8) for _ in range(3)]
    states[["query", "key", "value"].index(place)][0, :, 20] = SPECIAL[special]
    found = results(lambda b, *x: b.attend(*x, None, 0.3), NATIVE, states)
    wanted = results(lambda b, *x: b.attend(*x, None, 0.3), PLAIN, states)
    for ours, theirs in zip(found, wanted, strict=True):
        assert not (~ours.isfinite() & theirs.isfinite()).any()
    seeing = slice(20, 21) if place == "query" else slice(20, None)
    assert torch.equal(~found[0][:, :, seeing].isfinite(), ~wanted[0][:, :, seeing].isfinite())
    assert not found[0][:, :, seeing].isfinite().all()


@pytest.mark.parametrize("queries", [4, 12, 33, 300])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "drawn"])
def test_large_products(queries: int, exact: bool) -> None:
    """Scores of a million: those that float32 holds exactly, and drawn ones, of which one key takes nearly all."""
    torch.manual_seed(queries)
    size = (2, 4, queries, 16), (2, 2, queries, 16), (2, 2, queries, 16)
    states = [torch.randn(each) * 1000 for each in size[:2]] + [torch.randn(size[2])]
    if exact:
        for tensor, base, step in ((states[0], 2.0**20, 1.0), (states[1], 1.0, 0.5)):
            small = torch.randint(-3, 4, (*tensor.shape[:-1], 2)) * step
            tensor.zero_()[..., 0] = base
            tensor[..., 1:3] = small
    found = results(lambda b, *x: b.attend(*x, None, 1.0), NATIVE, states)
    judge = states if not exact else [state.double() for state in states]
    wanted = results(lambda b, *x: b.attend(*x, None, 1.0), replace(PLAIN, attend=in_full), judge)
    # Where one key takes all, the gradient of a score is the difference of two equal sums of 16 products of values with
    # what flows back (at most 1.5), and is multiplied by a key or, for every query, by a query.
    sums = 2 * 16 * 2.0**-24 * 1.5 * states[2].abs().max().item()
    of_keys = sums * 2 * queries * states[0].abs().max().item()
    rounding = (1e-30, sums * states[1].abs().max().item(), of_keys, 1e-30)
    for ours, theirs, least in zip(found, wanted, rounding, strict=True):
        if theirs.abs().max() > 0:
            check(ours, theirs.float(), *((2e-6,) if exact else (1e-3, least)))
        else:
            assert not ours.any()


def in_full(query: Tensor, key: Tensor, value: Tensor, mask: object, scale: float) -> Tensor:
    """The formula in the precision of its inputs, causal."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    return (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf).softmax(-1) @ value


def test_the_gradient_of_a_large_gate_is_that_of_a_line() -> None:
    """d silu(x) / dx is 1 from about 20 on; written as 1 + x - silu(x) it would be 0 from 2^24 on."""
    one = torch.eye(1)
    for size in (20.0, 1e4, 1e8, 1e20):
        for backend in (NATIVE, PLAIN):
            x = torch.full((1, 1), size, requires_grad=True)
            gates = backend.swiglu(x, one, torch.zeros(1, 1), one, None)
            gates.backward()
            weight = torch.full((1, 1), size, requires_grad=True)
            value = backend.swiglu(torch.ones(1, 1), weight, one, one, None)
            value.backward()
            assert weight.grad is not None
            assert weight.grad.item() == pytest.approx(1.0, rel=1e-6)


def test_keys_at_minus_infinity_are_no_keys_until_all_are() -> None:
    """A block of keys without weight before one with: torch's softmax leaves the former out."""
    query, key, value = torch.ones(1, 1, 20, 4), torch.randn(1, 1, 600, 4), torch.randn(1, 1, 600, 4)
    key[:, :, :300] = -math.inf
    for queries in (1, 4, 20):
        states = [query[:, :, :queries], key, value]
        found = results(lambda b, *x: b.attend(*x, every_key(x[0].shape[2], 600, 1), 1.0), NATIVE, states)
        wanted = results(lambda b, *x: b.attend(*x, every_key(x[0].shape[2], 600, 1), 1.0), PLAIN, states)
        check(found[0], wanted[0])
        assert found[0].isfinite().all()
        states[1] = torch.full_like(key, -math.inf)
        assert (
            results(lambda b, *x: b.attend(*x, every_key(x[0].shape[2], 600, 1), 1.0), NATIVE, states)[0].isnan().all()
        )
