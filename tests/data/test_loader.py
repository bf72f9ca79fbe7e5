"""The loader: every batch a pure function of its position, every token conserved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.core.errors import DataError
from finemoe.data import Loader, TokenBatch, TokenShards, TokenSource
from finemoe.data.loader import Packing, pack
from finemoe.data.shuffle import MixtureSchedule, permuted

END = 0


def loader(
    *lengths: int,
    weights: tuple[float, ...] = (),
    length: int = 4,
    seed: int = 0,
    packing: Packing = "concatenate",
) -> Loader:
    """A loader over sources whose tokens tell where they come from: source * 10_000 + index + 1."""
    sources = tuple(
        TokenSource(str(i), weight, np.arange(i * 10_000 + 1, i * 10_000 + 1 + n, dtype=np.uint16))
        for i, (n, weight) in enumerate(zip(lengths, weights or (1.0,) * len(lengths), strict=True))
    )
    return Loader(TokenShards(sources), sequence_length=length, packing=packing, end_of_text_id=END, seed=seed)


def same(left: TokenBatch, right: TokenBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left._tensors(), right._tensors(), strict=True))


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(6, 300), length=st.integers(1, 5), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_covers_each_window_once_and_conserves_tokens(tokens: int, length: int, seed: int, epoch: int) -> None:
    served = loader(tokens, length=length, seed=seed)
    size = served.sequences_per_epoch
    assert size == (tokens - 1) // length
    batch = served.batch(epoch * size, size)
    assert sorted(batch.tokens.flatten().tolist()) == list(range(1, size * length + 1))
    assert sorted(batch.targets.flatten().tolist()) == list(range(2, size * length + 2))


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 10**12), rows=st.integers(1, 12), seed=st.integers(0, 5))
def test_one_batch_of_n_is_n_batches_of_one(position: int, rows: int, seed: int) -> None:
    served = loader(60, 90, weights=(1, 2), seed=seed)
    whole = served.batch(position, rows)
    single = [loader(60, 90, weights=(1, 2), seed=seed).batch(position + i, 1) for i in reversed(range(rows))]
    columns = ("tokens", "targets", "weights", "positions", "documents")
    joined = [torch.cat([getattr(one, column) for one in reversed(single)]) for column in columns]
    assert same(whole, TokenBatch(*joined))


def test_batches_of_a_seed_never_change() -> None:
    # A run that is resumed by a later version must see the order it started with.
    assert loader(41).batch(0, 10).tokens[:, 0].tolist() == [29, 37, 1, 5, 13, 9, 33, 25, 17, 21]


def test_epochs_and_seeds_differ() -> None:
    size = loader(400).sequences_per_epoch
    first = loader(400).batch(0, size).tokens
    assert not torch.equal(first, loader(400).batch(size, size).tokens)
    assert not torch.equal(first, loader(400, seed=1).batch(0, size).tokens)


def test_targets_follow_tokens() -> None:
    batch = loader(400).batch(7, 5)
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == batch.documents.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    assert batch.weights.sum() == 20


def test_concatenate_ignores_separators() -> None:
    batch = pack(np.array([[5, END, 6, 7, END, 8]]), "concatenate", END)
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 1]]
    assert batch.targets.tolist() == [[END, 6, 7, END, 8]]


def test_isolate_restarts_after_separators() -> None:
    batch = pack(np.array([[5, END, 6, 7, END, 8], [END, END, 4, 5, 6, 7]]), "isolate", END)
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]]
    assert batch.weights.tolist() == [[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.targets.tolist() == [[END, 6, 7, END, 8], [END, 4, 5, 6, 7]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30))
def test_isolate_agrees_with_the_obvious_loop(row: list[int]) -> None:
    batch = pack(np.array([row]), "isolate", END)
    document, position = 0, 0
    for i, token in enumerate(row[:-1]):
        assert batch.documents[0, i] == document
        assert batch.positions[0, i] == position
        assert batch.weights[0, i] == (token != END)
        document, position = (document + 1, 0) if token == END else (document, position + 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_mixture_proportions_hold_in_every_stretch(weights: list[float]) -> None:
    schedule = MixtureSchedule(weights)
    shares = np.array(weights) / sum(weights)
    source, rank = schedule.at(np.arange(25_000))
    for which, share in enumerate(shares):
        turns = np.flatnonzero(source == which)
        assert rank[turns].tolist() == list(range(len(turns)))  # no window skipped, none repeated
        prefix = np.cumsum(source == which)
        expected = np.arange(1, 25_001) * share
        # Rounding to a block may be off by one a block; within a block the sources interleave evenly.
        assert np.abs(prefix - expected).max() <= len(weights) + 3


def test_mixture_serves_each_source_by_its_own_epochs() -> None:
    served = loader(41, 401, weights=(3, 1))  # 10 and 100 windows
    batch = served.batch(0, 400)
    first = batch.tokens[:, 0]
    assert (first < 10_000).sum() == 300
    counts = torch.bincount(first[first < 10_000])
    assert counts[counts > 0].tolist() == [30] * 10
    rest = first[first >= 10_000]
    assert len(rest.unique()) == 100


def test_too_rare_and_too_short_sources_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1/10000"):
        loader(50, 50, weights=(1, 1e-6))
    with pytest.raises(DataError, match="fewer than one sequence"):
        loader(50, 4)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**62))
def test_permutations_permute(size: int, seed: int) -> None:
    image = permuted(np.arange(size), size, seed, "test")
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutations_look_random() -> None:
    # Where the first of 8 goes over 4000 seeds: 40 is beyond all but a millionth of chi-square(7).
    first = [int(permuted(np.zeros(1, dtype=np.int64), 8, seed, "test")[0]) for seed in range(4000)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 40
    image = permuted(np.arange(10_000), 10_000, 1, "test")
    assert abs(np.corrcoef(image, np.arange(10_000))[0, 1]) < 0.05


def test_batch_keeps_its_shape() -> None:
    batch = loader(400).batch(0, 6)
    assert batch.num_sequences == 6
    assert same(batch.to("cpu"), batch)
    with pytest.raises(ValueError, match="must be"):
        TokenBatch(batch.tokens, batch.targets[:2], batch.weights, batch.positions, batch.documents)
