"""Checkpoints that every process writes its pieces of: the bits of whole ones, by whatever layout they are read."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finemoe.checkpoint.run_state.state import METHOD, MODEL, OPTIMIZER, find_damage, read_part
from finemoe.checkpoint.storage.safetensors import read_header
from finemoe.core.config import merge
from finemoe.core.errors import RunError
from finemoe.parallel import shard
from finemoe.parallel.config import Layout
from finemoe.parallel.processes import Processes
from finemoe.parallel.shard import rows, wholes
from finemoe.runs import run as running
from parallel.processes import run, several
from parallel.tiny_layouts import Case, trainer
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]

SHARDED = {"checkpoint_format": "sharded"}
ALONE = {"shard": 1, "expert": 1, "pipeline": 1, "replicate": 1}
LAYOUTS: dict[str, dict[str, int]] = {
    "shard 2": {"shard": 2},
    "experts 2": {"shard": 2, "expert": 2},
    "pipeline 2": {"pipeline": 2},
    "replicate 2, shard 2": {"replicate": 2, "shard": 2},
    "experts 2, shard 4": {"shard": 4, "expert": 2},
    "pipeline 2, shard 2, experts 2": {"pipeline": 2, "shard": 2, "expert": 2},
}


def tables(corpus: Path, layout: str, **training: Any) -> dict[str, Any]:
    """Six steps, saved at three and at the end."""
    own = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 9, "tokens_per_step": 128, "micro_batch_tokens": 32}
    own["evaluate_every"] = 3
    changes = {"training": {**own, **training}, "parallel": LAYOUTS[layout], "optimizer": {"learning_rate": 0.004}}
    return merge(recipe(corpus, "v3", training={}), changes)


def train(raw: dict[str, Any], out: Path) -> None:
    running.train(raw, out=out, quiet=True)


def train_in_pieces(raw: dict[str, Any], out: Path) -> None:
    """Nobody may put a tensor together."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor was gathered")

    from torch.distributed.tensor import DTensor

    DTensor.full_tensor = Processes.gathered = refuse  # type: ignore[method-assign]
    running.train(raw, out=out, quiet=True)


def resume_all(folders: list[tuple[Path, list[str]]]) -> None:
    for folder, overrides in folders:
        running.resume(folder, overrides=overrides, quiet=True)


def at(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def copy_at(source: Path, step: int, copy: Path) -> Path:
    """A run that has come to `step`."""
    shutil.copytree(source, copy)
    for one in (copy / "checkpoints").glob("step-*"):
        if one.name > at(copy, step).name:
            shutil.rmtree(one)
    (copy / "summary.json").unlink(missing_ok=True)
    return copy


def settings(layout: dict[str, int], **training: Any) -> list[str]:
    tables = {"parallel": {**ALONE, **layout}, "training": training}
    return [f"{table}.{key}={value}" for table, keys in tables.items() for key, value in keys.items()]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint, whoever wrote it."""
    parts = (MODEL, OPTIMIZER, *([METHOD] if list(folder.glob("method*")) else []))
    return {f"{part} {name}": one for part in parts for name, one in read_part(folder, part).items()}


def require_same(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    states = [json.loads((folder / "state.json").read_text()) for folder in (one, other)]
    assert states[0] | {"seconds": 0} == states[1] | {"seconds": 0}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


TWO = [f"{part}-rank0000{rank}.safetensors" for part in ("model", "optimizer") for rank in (0, 1)]


@pytest.fixture(scope="module")
def written(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run by two processes twice: `whole`, and in `pieces`."""
    folder = tmp_path_factory.mktemp("sharded")
    work = [
        (train, tables(corpus, "shard 2"), folder / "whole"),
        (train_in_pieces, tables(corpus, "shard 2", **SHARDED), folder / "pieces"),
    ]
    run(2, several, work, met=False)
    return folder


def test_pieces_hold_what_a_whole_checkpoint_holds(written: Path) -> None:
    for step in (3, 6):  # by the thread, and at the end
        folder = at(written / "pieces", step)
        assert files(folder) == TWO
        assert find_damage(folder) is None
        require_same(folder, at(written / "whole", step))
        sizes = [sum(one.nbytes for one in read_header(folder / name)[0].values()) for name in TWO]
        whole = sum(sizes)
        assert max(sizes[:2]) < 0.52 * sum(sizes[:2])  # an even part each
        assert max(sizes[2:]) < 0.52 * sum(sizes[2:])
    for name in ("whole", "pieces"):
        assert not list((written / name / "checkpoints").glob(".writing-*"))
    noted = [json.loads(line) for line in (written / "pieces" / "metrics.jsonl").read_text().splitlines()]
    saved = [record for record in noted if record["kind"] == "checkpoint"]
    assert [(record["step"], record["in_background"]) for record in saved] == [(3, True), (6, False)]
    assert {record["bytes"] for record in saved} == {whole}


def test_a_run_goes_on_from_pieces_by_any_layout_and_format(written: Path, tmp_path: Path) -> None:
    """By the same layout to the same bits; FSDP2, then experts elsewhere, then one process, then whole."""
    every = {"checkpoint_every": 1}
    chains = [copy_at(written / name, 3, tmp_path / name) for name in ("pieces", "whole")]
    again = copy_at(written / "pieces", 6, tmp_path / "again")
    content = bytearray((at(again, 6) / TWO[1]).read_bytes())
    content[-1] ^= 1  # one process looks at this file, and all go back to the third step
    (at(again, 6) / TWO[1]).write_bytes(content)
    from_whole = copy_at(written / "whole", 3, tmp_path / "from whole")
    here, experts = LAYOUTS["shard 2"], LAYOUTS["experts 2"]
    steps: list[tuple[Path, list[str]]] = [(again, []), (from_whole, settings(here, **SHARDED))]
    steps += [(chain, settings(experts, **every)) for chain in chains]
    run(2, resume_all, steps, met=False)
    for folder in (again, from_whole):
        assert files(at(folder, 6)) == TWO
        require_same(at(folder, 6), at(written / "whole", 6))
    for step in (4, 5, 6):
        require_same(at(chains[0], step), at(chains[1], step))
    last = [copy_at(chain, 4, tmp_path / f"{chain.name} alone") for chain in chains]
    run(1, resume_all, [(one, settings(ALONE, checkpoint_format="whole")) for one in last], met=False)
    assert files(at(last[0], 4)) == TWO
    assert files(at(last[0], 6)) == [MODEL, OPTIMIZER]
    for name in (MODEL, OPTIMIZER):
        assert (at(last[0], 6) / name).read_bytes() == (at(last[1], 6) / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_and_reads_pieces(corpus: Path, tmp_path: Path, layout: str) -> None:
    size = math.prod(LAYOUTS[layout].get(key, 1) for key in ("replicate", "shard", "pipeline"))
    run(size, train, tables(corpus, layout), tmp_path / "whole", met=False)
    run(size, train_in_pieces, tables(corpus, layout, **SHARDED), tmp_path / "pieces", met=False)
    for step in (3, 6):
        require_same(at(tmp_path / "pieces", step), at(tmp_path / "whole", step))
    again = copy_at(tmp_path / "pieces", 3, tmp_path / "again")
    run(size, resume_all, [(again, [])], met=False)
    require_same(at(again, 6), at(tmp_path / "whole", 6))
    alone = [copy_at(tmp_path / name, 3, tmp_path / f"{name} alone") for name in ("pieces", "whole")]
    run(1, resume_all, [(one, settings(ALONE)) for one in alone], met=False)
    require_same(at(alone[0], 6), at(alone[1], 6))
    back = [copy_at(one, 6, tmp_path / f"{one.name} back") for one in alone]
    run(size, resume_all, [(one, [*settings(LAYOUTS[layout]), "training.steps=8"]) for one in back], met=False)
    require_same(at(back[0], 8), at(back[1], 8))


def rows_here(layout: Layout) -> list[str]:
    """Weights whose piece is not those rows of the whole that `rows` says."""
    world = Processes(layout, torch.device("cpu"))
    model = trainer(Case(num_experts=6), world).model
    wrong, cut = [], 0
    for name, weight in model.state_dict().items():
        [full] = wholes([weight])
        if full is not weight:
            cut += 1
            if not torch.equal(full[rows(weight)], weight.to_local()):
                wrong.append(name)
    assert cut > 20
    return wrong + bundled(list(model.state_dict().values()), cut)


def bundled(weights: list[Tensor], cut: int) -> list[str]:
    """What differs where small tensors travel together, and where none is small."""
    wrong: list[str] = []
    one_by_one = [next(wholes([one])) for one in weights]
    for bound, fewest, most in ((1 << 24, 2, cut / 2), (0, cut / 2, cut)):
        with (
            patch.object(shard, "_BUNDLE_BYTES", bound),
            patch.object(dist, "all_gather", wraps=dist.all_gather) as meet,
        ):
            found = list(wholes(iter(weights)))
        if not fewest <= meet.call_count <= most:
            wrong.append(f"{meet.call_count} exchanges of bundles of {bound} bytes for {cut} tensors")
        wrong += [f"{one.shape}" for one, other in zip(found, one_by_one, strict=True) if not torch.equal(one, other)]
    return wrong


def test_rows_are_those_that_lie_here_where_processes_hold_unlike_many() -> None:
    assert run(4, rows_here, Layout(shard=4, expert=2)) == [[], [], [], []]  # 6 experts: 2, 1, 2 and 1 of them
    assert run(2, rows_here, Layout(shard=2, expert=2)) == [[], []]
    assert run(4, rows_here, Layout(replicate=2, shard=2)) == [[], [], [], []]


def full_disk(raw: dict[str, Any], out: Path, rank: int) -> tuple[str, bool]:
    """What each process says when the disk of one is full while the second checkpoint is written."""
    from torch import distributed

    from finemoe.checkpoint.run_state import pieces

    original = pieces.write_tensors

    def write(path: Path, *arguments: Any) -> Any:
        if distributed.get_rank() == rank and at(out, 2).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *arguments)

    pieces.write_tensors = write
    try:
        running.train(raw, out=out, quiet=True)
    except RunError as error:
        return str(error), error.everywhere
    return "trained", False


def test_a_full_disk_of_one_process_is_the_error_of_all_and_spares_what_is_there(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = run(2, full_disk, tables(corpus, "shard 2", checkpoint_every=2, **SHARDED), out, 1, met=False)
    assert said[0] == said[1]
    assert said[0][1]
    assert "rank 1: " in said[0][0]
    assert "step-00000004: the disk is full" in said[0][0]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert find_damage(at(out, 2)) is None


def with_little_room(raw: dict[str, Any], out: Path, rank: int, available: int) -> None:
    from torch import distributed

    from finemoe.core import memory

    original = memory.available_bytes
    memory.available_bytes = lambda: available if distributed.get_rank() == rank else original()
    running.train(raw, out=out, quiet=True)


def test_where_one_process_has_no_room_for_a_copy_all_wait(corpus: Path, written: Path, tmp_path: Path) -> None:
    """It sees room for its own copy, and not for that of its neighbour on the same machine too."""
    out = tmp_path / "run"
    own = sum(one.nbytes for name in TWO[1::2] for one in read_header(at(written / "pieces", 3) / name)[0].values())
    raw = tables(corpus, "shard 2", memory_check=False, **SHARDED)
    run(2, with_little_room, raw, out, 1, 2 * own, met=False)
    noted = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["in_background"] for record in noted if record["kind"] == "checkpoint"] == [False, False]
    require_same(at(out, 6), at(written / "whole", 6))


def dies_while_saving(raw: dict[str, Any], out: Path, rank: int, place: int) -> None:
    """A process kills itself at the `place`-th of the things that it does to write the second checkpoint."""
    from torch import distributed

    from finemoe.checkpoint.run_state import pieces, state

    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if at(out, 2).exists() and distributed.get_rank() == rank:
                calls += 1
                if calls == place:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    pieces.write_tensors = counted(pieces.write_tensors)
    pieces.begin = counted(pieces.begin)
    for name in ("write_bytes", "sync"):
        setattr(state, name, counted(getattr(state, name)))
    running.train(raw, out=out, quiet=True)


SLOW = [(0, 1), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (1, 1)]


@pytest.mark.parametrize(("rank", "place"), [(1, 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_a_kill_while_saving_costs_only_the_steps_since(
    corpus: Path, written: Path, tmp_path: Path, rank: int, place: int
) -> None:
    """One is killed between its pieces, or the first before it gives the name: the others end by themselves."""
    out = tmp_path / "run"
    raw = tables(corpus, "shard 2", checkpoint_every=2, **SHARDED)
    with pytest.raises(AssertionError, match=r"ended without a word|closed by peer|did not come as far"):
        run(2, dies_while_saving, raw, out, rank, place, met=False)
    assert [one.name for one in (out / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert find_damage(at(out, 2)) is None
    run(2, resume_all, [(out, [])], met=False)
    require_same(at(out, 6), at(written / "whole", 6))
    assert not list((out / "checkpoints").glob(".writing-*"))
