"""Bins of conversations: nothing is lost, nothing is twice, nothing is too long, and a position says all."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.core.errors import DataError
from finemoe.data.conversations.packing import Packer, bins, fit
from finemoe.data.conversations.store import Stored, Writing
from finemoe.text.turns import Turns


def stored(folder: Path, *items: tuple[str, ...]) -> Stored:
    """Items whose segments are spelt: a letter a token, a capital one is to be learnt."""
    writing = Writing()
    for number, item in enumerate(items):
        turns = [Turns(tuple(ord(one.lower()) for one in text), tuple(map(str.isupper, text))) for text in item]
        writing.add(turns, f"question {number}", None)
    folder.mkdir(parents=True, exist_ok=True)
    writing.close(folder)
    return Stored.open(folder)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(20, 40))
def test_every_item_is_in_one_bin_and_no_bin_is_over_full(lengths: list[int], capacity: int) -> None:
    found = bins(np.array(lengths), capacity, range(len(lengths)))
    assert sorted(number for members in found for number in members) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in members) <= capacity for members in found)
    # Two bins that could have been one are wasted room: at most one is half empty.
    assert sum(sum(lengths[number] for number in members) * 2 <= capacity for members in found) <= 1


def test_what_is_too_long_is_cut_behind_an_answer_or_dropped(tmp_path: Path) -> None:
    items = stored(tmp_path, ("qAAqBB",), ("qqqqqqA",), ("qA",))
    whole = fit(items, 5, "cut")
    assert (whole.items.tolist(), whole.lengths[:, 0].tolist(), whole.cut, whole.dropped) == ([0, 2], [6, 2], 0, 1)
    cut = fit(items, 4, "cut")
    assert (cut.items.tolist(), cut.lengths[:, 0].tolist(), cut.cut, cut.dropped) == ([0, 2], [3, 2], 1, 1)
    dropped = fit(items, 4, "drop")
    assert (dropped.items.tolist(), dropped.cut, dropped.dropped) == ([2], 0, 2)


def test_a_pair_is_never_cut(tmp_path: Path) -> None:
    pairs = stored(tmp_path, ("qAA", "qBBBB"), ("qA", "qB"))
    found = fit(pairs, 3, "cut")
    assert (found.items.tolist(), found.cut, found.dropped) == ([1], 0, 1)


@pytest.mark.parametrize(("short", "told"), [(180, True), (181, False)])
def test_much_that_is_too_long_is_told_with_the_length_that_would_do(
    tmp_path: Path, short: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenth of 200 is; of the longest twenty, two may stay out."""
    items = stored(tmp_path, *[("qA",)] * short, *[("q" * n + "A",) for n in range(10, 210 - short)])
    Packer(items, fit(items, 4, "cut"), 4, seed=1).require(1, room=3)
    assert bool(caplog.messages) == told
    if told:
        (text,) = caplog.messages
        assert text.startswith("20 of 200 to train on (10%) are longer than data.sequence_length 7 ")
        assert text.endswith("data.sequence_length = 30 would hold 99% of them")
        lengths = np.diff(items.starts) - 1
        assert (lengths <= 30 - 3).mean() == 0.99


def packer(folder: Path, **changes: object) -> Packer:
    items = stored(folder, ("qA",), ("qAABB",), ("qqqAA",), ("qAqA",), ("qB",))
    return Packer(items, fit(items, 6, "cut"), 6, seed=1, **changes)  # type: ignore[arg-type]


def test_a_row_holds_each_conversation_from_its_own_beginning(tmp_path: Path) -> None:
    batch = packer(tmp_path).pack([[0, 2]])
    assert bytes(batch.rows.tokens[0].tolist()) == b"qqqqa"
    assert bytes(batch.rows.targets[0].tolist()) == b"aqqaa"
    assert batch.rows.weights[0].tolist() == [1, 0, 0, 1, 1]
    assert batch.rows.positions[0].tolist() == [0, 0, 1, 2, 3]
    assert batch.rows.documents[0].tolist() == [0, 1, 1, 1, 1]
    assert (batch.num_sequences, batch.num_documents, batch.items.tolist()) == (1, 2, [0, 2])


def test_concatenated_conversations_are_one_document_and_go_on_counting(tmp_path: Path) -> None:
    batch = packer(tmp_path, packing="concatenate").pack([[0, 2], [4]])
    assert batch.rows.positions[0].tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.rows.documents[0].tolist() == [0, 0, 0, 0, 0, 1]
    assert batch.num_documents == 2


def test_conversations_can_count_alike(tmp_path: Path) -> None:
    batch = packer(tmp_path, weighing="conversation").pack([[1], [3]])
    torch.testing.assert_close(batch.rows.weights[0], torch.tensor([0.25] * 4 + [0.5, 0, 0.5]))


def test_a_judgement_is_all_that_is_learnt(tmp_path: Path) -> None:
    batch = packer(tmp_path, ending=ord("z")).pack([[0], [1]])
    assert bytes(batch.rows.targets[0].tolist()) == b"azaabbz"
    assert batch.rows.weights[0].tolist() == [0, 1, 0, 0, 0, 0, 1]


def test_an_epoch_serves_every_bin_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    found = packer(tmp_path)
    size = len(found.bins)
    assert size == 3
    epochs = [[found.batch(epoch * size + place, 1).items.tolist() for place in range(size)] for epoch in range(6)]
    assert all(sorted(functools.reduce(operator.iadd, epoch, [])) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) > 1


def test_a_batch_is_its_positions_whatever_they_are_cut_into(tmp_path: Path) -> None:
    found = packer(tmp_path)
    whole = found.batch(1, 4)
    parts = [found.batch(1, 1), found.batch(2, 3)]
    assert torch.equal(whole.rows.tokens, torch.cat([one.rows.tokens for one in parts], dim=1))
    assert whole.items.tolist() == functools.reduce(operator.iadd, (one.items.tolist() for one in parts), [])


def test_too_few_for_a_step_are_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 items to train on, which make 3 bins of 6 tokens, and one step takes 4"):
        packer(tmp_path).require(4)


def test_damaged_arrays_are_known(tmp_path: Path) -> None:
    from finemoe.data.cache import DamagedError

    stored(tmp_path, ("qA",))
    tokens = np.load(tmp_path / "tokens.npy")
    np.save(tmp_path / "tokens.npy", tokens + 1)
    with pytest.raises(DamagedError, match="recorded hash"):
        Stored.open(tmp_path)
