"""The threshold of Child-Tuning's D: an order statistic of parts, with ties, against sorting one long row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.methods.trainables import ranking
from finemoe.methods.trainables.fisher import Fisher
from finemoe.methods.trainables.ranking import masks_of, order_statistic

FLOATS = st.floats(min_value=0, max_value=2.0**127, width=32)


@given(parts=st.lists(st.lists(FLOATS, max_size=9), min_size=1, max_size=4), place=st.floats(0, 1))
def test_it_is_what_stands_there_in_one_sorted_row(parts: list[list[float]], place: float) -> None:
    row = sorted(abs(value) for part in parts for value in part)  # -0.0 is 0.0, and a square is never -0.0
    if not row:
        return
    index = min(len(row) - 1, int(place * len(row)))
    found = order_statistic([torch.tensor(part, dtype=torch.float32).abs() for part in parts], index)
    assert found.item() == row[index]


def test_parts_of_any_shape_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_CHUNK", 7)
    parts = [torch.rand(3, 5, 2).square(), torch.rand(11).square() * 1e-20, torch.rand(4, 6).T.square()]
    row = torch.cat([part.flatten() for part in parts]).sort().values
    assert [order_statistic(parts, n).item() for n in range(len(row))] == row.tolist()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 11, 101, 500])
@pytest.mark.parametrize("ties", [False, True])
def test_what_numpy_s_percentile_keeps_is_kept(share: float, size: int, ties: bool) -> None:
    drawn = np.random.default_rng(size)
    values = drawn.integers(0, 4, size) if ties else drawn.permutation(size)
    numbers = torch.from_numpy(values.astype(np.float32))
    parts = {"blocks.0.a": numbers[: size // 2 + 1], "blocks.1.b": numbers[size // 2 + 1 :]}
    masks, said = masks_of(Fisher(parts, {}), share, "parameter")
    kept = torch.cat(list(masks.values())).numpy()
    assert (kept == (values >= np.percentile(values.astype(np.float64), (1 - share) * 100))).all()
    assert said.startswith(f"{int(kept.sum()):,} of {size:,} weights are kept")


def test_all_that_ties_with_the_threshold_is_kept() -> None:
    values = {"blocks.0.a": torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 3.0])}
    masks, _ = masks_of(Fisher(values, {}), 0.3, "parameter")
    assert masks["blocks.0.a"].tolist() == [False, True, True, True, True, True]


def test_a_vector_is_one_row() -> None:
    values = {"blocks.0.norm.weight": torch.tensor([1.0, 9.0]), "blocks.0.w": torch.tensor([[1.0, 1.0], [8.0, 8.0]])}
    masks, said = masks_of(Fisher(values, {}), 0.5, "row")
    assert masks["blocks.0.norm.weight"].tolist() == [True]  # 5, 1, 8: their median is 5
    assert masks["blocks.0.w"].tolist() == [[False], [True]]
    assert "2 of 3 rows are kept" in said
