"""The native norm and rotation against torch's own, forward and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.model import native
from finemoe.model.backends import NATIVE, TORCH
from finemoe.model.native.norm import rms_norm
from finemoe.model.norm import RMSNorm

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("size", [1, 3, 16, 17, 64, 100, 1000])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (2, 150)], ids=str)
def test_norm_and_its_gradients(shape: tuple[int, ...], size: int, strided: bool) -> None:
    hidden = torch.randn(*shape, size + 5)[..., 2 : 2 + size] if strided else torch.randn(*shape, size)
    hidden, weight = hidden.requires_grad_(), torch.randn(size, requires_grad=True)
    found = rms_norm(hidden, weight, 1e-3)
    doubles = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.rms_norm(doubles[0], (size,), doubles[1], 1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(*shape, size + 1)[..., 1:]
    gradients = torch.autograd.grad((found * direction).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * direction.double()).sum(), doubles)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(rms_norm(hidden, weight, 1e-3), found)


def test_norm_gradients_do_not_depend_on_the_number_of_threads() -> None:
    hidden, weight = torch.randn(700, 48, requires_grad=True), torch.randn(48, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = rms_norm(hidden, weight, 1e-6)
        results.append((output, *torch.autograd.grad(output.sin().sum(), (hidden, weight))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_norm_takes_torchs_path_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quick, hidden = RMSNorm(6, 1e-3, TORCH), RMSNorm(6, 1e-3, NATIVE), torch.randn(4, 6)
    expected = quick(hidden)
    monkeypatch.setattr("finemoe.model.backends.native_rms_norm", None)
    torch.testing.assert_close(plain(hidden), expected)
    assert quick.double()(hidden.double()).dtype == torch.float64


def angles(batch: int, seq: int, pairs: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Any numbers: nothing says that they are a cosine and a sine."""
    shape = (1 if shared else batch, seq, pairs)
    cosine, sine = torch.randn(shape), torch.randn(shape)
    return cosine.expand(batch, -1, -1), sine.expand(batch, -1, -1)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize(("kept", "first"), [(0, False), (3, False), (3, True)], ids=["all", "the last", "the first"])
@pytest.mark.parametrize("pairs", [1, 2, 5, 8, 16, 35])
@pytest.mark.parametrize(("batch", "heads", "seq"), [(1, 1, 1), (2, 3, 7), (1, 2, 0)], ids=str)
def test_rotation_and_its_gradient(
    batch: int, heads: int, seq: int, pairs: int, kept: int, first: bool, layout: Any
) -> None:
    turned = angles(batch, seq, pairs, shared=kept == 0)
    states = torch.randn(batch, seq, heads, 2 * pairs + kept).transpose(1, 2).requires_grad_()
    found, expected = (backend.rotate(states, *turned, layout, first=first) for backend in (NATIVE, TORCH))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    alike = slice(2 * pairs, None) if first else slice(0, kept)
    assert torch.equal(found[..., alike], states[..., alike])
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * direction).sum(), states)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(NATIVE.rotate(states, *turned, layout, first=first), found)


def test_rotation_of_rows_that_are_not_contiguous() -> None:
    states, turned = torch.randn(1, 2, 8, 5).transpose(2, 3), angles(1, 5, 4, shared=True)
    torch.testing.assert_close(
        NATIVE.rotate(states, *turned, "interleaved"), NATIVE.rotate(states.contiguous(), *turned, "interleaved")
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotation_of_other_precisions_takes_torchs_path(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.model.backends.native_rotate", None)
    states = torch.randn(1, 2, 5, 8).to(dtype)
    assert NATIVE.rotate(states, *angles(1, 5, 4, shared=True), "half_split").dtype == dtype
