"""Copies of a run's state: apart from the original, in memory that is used again, refused where there is none."""

from __future__ import annotations

import pytest
import torch

from finemoe.checkpoint.run_state.snapshot import NoRoomError, Snapshot
from finemoe.checkpoint.run_state.state import RunState
from finemoe.core import memory


def run(fill: float = 1.0, width: int = 5) -> RunState:
    weights = torch.full((3, width), fill)
    model = {"weight": weights, "transposed": weights.T, "half": weights.bfloat16(), "none": torch.empty(0, 4)}
    optimizer = {"weight/exp_avg": weights * 2, "weight/step": torch.tensor(fill), "flag": torch.tensor([True, False])}
    return RunState(model, optimizer, {"step": int(fill)}, "{}")


def assert_equal(left: RunState, right: RunState) -> None:
    for one, other in ((left.model, right.model), (left.optimizer, right.optimizer)):
        assert list(one) == list(other)
        for name, tensor in one.items():
            assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
            assert torch.equal(tensor, other[name])
    assert (left.state, left.config) == (right.state, right.config)


def test_a_copy_stays_when_the_original_changes_in_place() -> None:
    original = run()
    copy = Snapshot().take(original)
    assert_equal(copy, run())
    for tensor in (*original.model.values(), *original.optimizer.values()):
        tensor.zero_()
    assert_equal(copy, run())


def test_the_next_copy_takes_the_same_memory() -> None:
    snapshot = Snapshot()
    places = [{name: tensor.data_ptr() for name, tensor in snapshot.take(run(n)).model.items()} for n in (1.0, 2.0)]
    assert places[0] == places[1]
    assert_equal(snapshot.take(run(3.0)), run(3.0))


def test_a_state_of_another_shape_gets_memory_of_its_own() -> None:
    snapshot = Snapshot()
    snapshot.take(run())
    assert_equal(snapshot.take(run(2.0, width=70)), run(2.0, width=70))


def test_parameters_that_want_a_gradient_are_copied_without_a_trace() -> None:
    weight = torch.ones(3, requires_grad=True)
    copy = Snapshot().take(RunState({"weight": weight}, {}, {}, "{}"))
    assert not copy.model["weight"].requires_grad


def test_nothing_to_copy() -> None:
    assert_equal(Snapshot().take(RunState({}, {}, {}, "{}")), RunState({}, {}, {}, "{}"))


def test_a_copy_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot()
    with monkeypatch.context() as patched:
        patched.setattr(memory, "available_bytes", lambda: 100)
        with pytest.raises(NoRoomError, match=r"0\.00 GiB are available"):
            snapshot.take(run())
    assert_equal(snapshot.take(run()), run())  # later there is room
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    assert_equal(snapshot.take(run(2.0)), run(2.0))  # it has its memory already


def test_processes_of_one_machine_divide_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks before any of them copies, and all of them have three quarters."""
    needed = sum(-(-one.nbytes // 64) * 64 for part in run().tensors for one in part.values())
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * needed)
    Snapshot(3).make_room(run())
    with pytest.raises(NoRoomError, match="for 4 processes of this machine"):
        Snapshot(4).make_room(run())


def test_room_that_was_left_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot()
    snapshot.make_room(run())
    snapshot.leave()
    monkeypatch.setattr(memory, "available_bytes", lambda: 100)
    with pytest.raises(NoRoomError):
        snapshot.take(run())


def test_where_the_system_does_not_say_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert_equal(Snapshot().take(run()), run())
