"""A process that takes longer over a checkpoint than the others wait for it in training."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from finemoe.checkpoint.run_state import pieces
from finemoe.checkpoint.run_state.pieces import save_pieces
from finemoe.checkpoint.run_state.state import RunState, find_damage
from finemoe.checkpoint.storage.pieces import Place
from finemoe.parallel.config import Layout
from finemoe.parallel.processes import Processes
from parallel.processes import run

TIMEOUT, LONGER = 1.0, 1.8
"""[seconds] That training waits, and that one takes."""


def state() -> RunState:
    """On every process the same: the first writes it, and the others wait."""
    held: tuple[dict[str, torch.Tensor], ...] = ({"weight": torch.ones(3, 4)}, {"weight/step": torch.ones(())}, {})
    places = tuple({name: Place(0, tuple(one.shape)) for name, one in part.items()} for part in held)
    return RunState(held[0], held[1], {"step": 1}, "{}", held[2], places)


def hang_up() -> None:
    """Close the connections to the others, as the system does for a process that dies."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
            one.getpeername()  # one that listens has none
            if one.family in (socket.AF_INET, socket.AF_INET6):
                one.shutdown(socket.SHUT_RDWR)


def saves(checkpoints: Path, dies: bool) -> tuple[int, list[int]] | str:
    """Bytes that were written, and what all said, the last of them late; or why not."""
    world = Processes(Layout(replicate=2), torch.device("cpu"), timeout=TIMEOUT)
    group = world.apart()
    original = pieces.write_rest

    def slowly(*arguments: Any) -> None:
        if dies:
            hang_up()
        time.sleep(LONGER)
        original(*arguments)

    pieces.write_rest = slowly
    try:
        nbytes = save_pieces(checkpoints, 1, state(), 1, group)
    except RuntimeError as error:
        distributed.destroy_process_group()  # there is nobody to say good-bye to
        return str(error)
    if world.rank:
        time.sleep(LONGER)
    return nbytes, world.everyone(world.rank, group)


@pytest.mark.slow
def test_others_wait_for_a_slow_writer_and_a_slow_reader(tmp_path: Path) -> None:
    assert run(2, saves, tmp_path, False) == [(52, [0, 1]), (0, [0, 1])]
    assert find_damage(tmp_path / "step-00000001") is None


def test_the_connections_of_one_that_dies_end_the_wait(tmp_path: Path) -> None:
    said = run(2, saves, tmp_path, True)
    assert all(" by peer" in str(one) for one in said), said  # closed, or reset


def waits() -> list[float]:
    """[seconds] Of a group beside training, and of one of training."""
    world = Processes(Layout(), torch.device("cpu"), timeout=TIMEOUT)
    groups = world.apart(), world.dense.get_group("fsdp")
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_meetings_beside_training_wait_for_a_day() -> None:
    assert run(1, waits) == [[86400.0, TIMEOUT]]
