"""The native attention against the textbook in double precision: spans of keys, shapes that fill no tile, gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from finemoe.model import native
from finemoe.model.attention.kernels import reference
from finemoe.model.attention.places import within_documents
from finemoe.model.backends import NATIVE
from finemoe.model.native.attention import attention
from finemoe.model.spans import Spans

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

BATCH = 2
WIDTHS = [(96, 64), (8, 3), (1, 1), (17, 80), (33, 40)]


def oracle(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The formula; a query that sees nothing gets 0."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    weights = torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1) * mask
    return weights @ value


def spans(kind: str, queries: int, keys: int) -> Spans | None:
    if kind == "causal":
        return None
    if kind == "documents":
        return within_documents(torch.randint(0, 4, (BATCH, queries)).sort().values)
    if kind == "cache":
        starts = torch.randint(0, keys - queries + 1, (BATCH, 1))
        return Spans(None, starts + torch.arange(queries) + 1, keys)
    first = torch.randint(0, keys, (BATCH, queries))  # many see nothing
    return Spans(first, torch.randint(0, keys + 1, (BATCH, queries)), keys)


def drawn(*shape: int, strided: bool) -> Tensor:
    if not strided:
        return torch.randn(*shape)
    batch, heads, seq, width = shape
    return torch.randn(batch, seq, heads, width + 5).transpose(1, 2)[..., 2 : 2 + width]


def check(heads: tuple[int, int], queries: int, keys: int, widths: tuple[int, int], kind: str, strided: bool) -> None:
    num_heads, num_kv_heads = heads
    sizes = (num_heads, queries, widths[0]), (num_kv_heads, keys, widths[0]), (num_kv_heads, keys, widths[1])
    states = [drawn(BATCH, *size, strided=strided).requires_grad_() for size in sizes]
    seen = spans(kind, queries, keys)
    first, last = (None, None) if seen is None else (seen.first, seen.last)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if seen is None else seen.mask
    found = attention(*states, first, last, 0.3)
    doubles = [state.detach().double().requires_grad_() for state in states]
    expected = oracle(*doubles, mask, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    direction = drawn(*expected.shape, strided=strided)
    gradients = torch.autograd.grad((found * direction).sum(), states)
    wanted = torch.autograd.grad((expected * direction.double()).sum(), doubles)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-4 * max(1.0, want.abs().max().item()))
    with torch.no_grad():
        torch.testing.assert_close(attention(*states, first, last, 0.3), found, rtol=0, atol=0)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("kind", ["causal", "documents", "cache", "random"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (8, 1), (3, 3)], ids=["one", "GQA", "MQA", "MHA"])
@pytest.mark.parametrize("queries", [1, 2, 5, 15, 33, 100])
def test_output_and_gradients(queries: int, heads: tuple[int, int], kind: str, strided: bool) -> None:
    for widths in WIDTHS:
        check(heads, queries, queries if kind in ("causal", "documents") else queries + 37, widths, kind, strided)


@pytest.mark.parametrize("kind", ["causal", "documents", "cache", "random"])
def test_several_blocks_of_queries_and_keys(kind: str) -> None:
    check((4, 2), 530, 530 if kind in ("causal", "documents") else 1300, (24, 16), kind, False)


# queries, keys, heads, widths: decoding over latents, over many keys in parts; widths beyond one packed piece
LONG = {
    "latents": (1, 700, (16, 1), (72, 64)),
    "one key head, few queries": (3, 900, (4, 1), (16, 16)),
    "many heads": (1, 600, (6, 6), (32, 32)),
    "wide": (20, 300, (2, 1), (500, 400)),
}


@pytest.mark.parametrize(("queries", "keys", "heads", "widths"), LONG.values(), ids=LONG)
def test_few_queries_over_many_keys(queries: int, keys: int, heads: tuple[int, int], widths: tuple[int, int]) -> None:
    check(heads, queries, keys, widths, "cache", False)


def test_extreme_scores_stay_finite_and_far_ones_weigh_nothing() -> None:
    query, key = torch.full((1, 1, 300, 4), 30.0), torch.randn(1, 1, 300, 4)
    value = torch.randn(1, 1, 300, 4)
    key[:, :, 7] = 30.0  # score 3600, the others far below
    output = attention(query, key, value, None, None, 1.0)
    assert output.isfinite().all()
    torch.testing.assert_close(output[0, 0, 7:], value[0, 0, 7].expand(293, 4))


@pytest.fixture
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("heads", "seq"), [((8, 2), 400), ((2, 1), 700), ((4, 4), 90), ((2, 2), 510)])
def test_no_bit_depends_on_the_number_of_threads(heads: tuple[int, int], seq: int) -> None:
    states = [
        torch.randn(1, count, seq, width, requires_grad=True)
        for count, width in zip((heads[0], heads[1], heads[1]), (48, 48, 32), strict=True)
    ]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = attention(*states, None, None, 0.2)
        results.append((output, *torch.autograd.grad(output.square().sum(), states)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_to_attend_with() -> None:
    for batch, queries in ((0, 3), (2, 0)):
        query = torch.randn(batch, 2, queries, 4, requires_grad=True)
        output = attention(query, torch.randn(batch, 1, queries, 4), torch.randn(batch, 1, queries, 5), None, None, 1.0)
        assert output.shape == (batch, 2, queries, 5)
        output.sum().backward()
        assert query.grad is not None
        assert query.grad.shape == query.shape


def test_memory_of_training_grows_with_tokens_not_with_their_square() -> None:
    saved = []
    states = [torch.randn(1, 2, 512, 8, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attention(*states, None, None, 1.0)
    assert sum(saved) == 4 * 2 * 512 * 8 + 2 * 2 * 512  # the maximum and the logarithm of the sum of each query


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_take_torchs_path(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.model.backends.native_attention", None)
    states = [torch.randn(1, 2, 5, 8).to(dtype) for _ in range(3)]
    expected = reference(*states, None, 0.3)
    tolerance = 1e-5 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(NATIVE.attend(*states, None, 0.3), expected, rtol=tolerance, atol=tolerance)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(RuntimeError, match="as many queries as keys"):
        attention(query, key, key, None, None, 1.0)
    with pytest.raises(RuntimeError, match="bounds of what a query sees"):
        attention(query, key, key, None, torch.ones(1, 2, dtype=torch.int64), 1.0)
    with pytest.raises(RuntimeError, match="same number of query heads"):
        attention(torch.randn(1, 3, 5, 4), key, key, None, None, 1.0)
