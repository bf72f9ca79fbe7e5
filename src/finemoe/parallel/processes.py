"""Several processes as a World: torch.distributed's process groups, and who is missing when they fail."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]  # torch does not list them
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from finemoe.core.errors import FinemoeError
from finemoe.model.transformer import Transformer
from finemoe.parallel.config import Layout
from finemoe.parallel.context import Pieces
from finemoe.parallel.passes import Execute, OneAfterAnother
from finemoe.parallel.pipeline import Pipeline
from finemoe.parallel.relay import Relay
from finemoe.parallel.shard import local, put, rows, settle, spread, wholes
from finemoe.parallel.signs import SILENT, SignsOfLife
from finemoe.parallel.stages import Cut, keep_only
from finemoe.parallel.world import ROWS_FIGURE, Parts, in_words

_A_DAY = timedelta(days=1)
"""How long meetings beside training wait. One may write or read a whole checkpoint before the others go on, which is no
reason to end a run; one that dies closes its connections, and is noticed at once all the same."""

_BUCKET_BYTES = 25 << 20
"""Gradients that are summed at once, as torch's DistributedDataParallel has it: more would hold as much twice."""

_ROOM = 504
"""[bytes] Of what each process says in one exchange: counts, terms and flags of a step are shorter."""

Key = TypeVar("Key")
Value = TypeVar("Value")


def leave(world: Processes | None) -> None:
    """Leave the others, who may still be computing, well or not; a process may train again."""
    if world is not None:
        world.close()
    if dist.is_initialized():
        dist.destroy_process_group()


@final
class Processes:
    """A World of processes that torchrun started, on any device; one a run.

    Small things (counts, flags, errors) go through gloo on the CPU, gradients through the device's own library. Every
    method is a meeting point: all ranks call the same ones in the same order.
    """

    def __init__(
        self, layout: Layout, device: torch.device, store: Store | None = None, timeout: float | None = None
    ) -> None:
        """Of the processes that have met in torch's default group, as many as `layout` has.

        Args:
            layout: of the run.
            device: where the model is.
            store: from `join`, to say in whom the reason lies when a collective fails.
            timeout: [seconds] of the collectives of every group; None: torch's own, half an hour with gloo.
        """
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.layout, self.device = layout, device
        self.dense, self.routed = _meshes(layout, device)
        pipeline, replicate, fsdp = self.dense.get_coordinate() or (0, 0, 0)
        self.stage, self.stages = pipeline, layout.pipeline
        self._cut: Cut | None = None
        self._pipeline: Pipeline | None = None
        self.share, self.shares = replicate * layout.shard + fsdp // layout.context, layout.data
        self.piece, self.pieces = fsdp % layout.context, layout.context
        self._timeout = None if timeout is None else timedelta(seconds=timeout)
        self._context: Pieces | None = None
        self._within: DeviceMesh | None = None
        if layout.context > 1:
            shape = (layout.pipeline, layout.replicate, layout.shard, layout.context)
            names = ("pipeline", "replicate", "shard", "context")
            self._within = init_device_mesh(device.type, shape, mesh_dim_names=names)
            self._context = Pieces(self._within["context"].get_group(), self.piece, self.pieces)
        if self._timeout is not None:  # torch gives it to the default group alone
            for mesh in {id(one): one for one in (self.dense, self.routed, self._within) if one is not None}.values():
                for group in mesh.get_all_groups():
                    _set_pg_timeout(self._timeout, group)
        self._alive = SignsOfLife(store, self.rank, self.size)

    @property
    def sharded(self) -> bool:
        """Whether weights are cut, so that their gradients are summed where the backward pass makes them."""
        return self.layout.fsdp > 1

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """One of each share and piece, added in the order of ranks: the same bits everywhere."""
        total: dict[str, float] = {}
        for found in self._shares(self.everyone(dict(values))):
            for name, value in found.items():
                total[name] = total[name] + value if name in total else value
        return total

    def sum_tensors(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """All of them in one collective for each type."""
        summed: dict[Key, Tensor] = {}
        for dtype in dict.fromkeys(one.dtype for one in tensors.values()):  # in one order everywhere
            some = {key: one for key, one in tensors.items() if one.dtype == dtype}
            flat = torch.cat([one.reshape(-1) for one in some.values()])
            flat = flat if self.stage == 0 else torch.zeros_like(flat)  # stages of a pipeline have the same
            self._meet(partial(dist.all_reduce, flat))
            pieces = flat.split([one.numel() for one in some.values()])
            summed |= {key: piece.view_as(one) for (key, one), piece in zip(some.items(), pieces, strict=True)}
        return {key: summed[key] for key in tensors}

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Over copies of the whole model; where weights are cut, the backward pass has done it."""
        if self.sharded or self.layout.replicate == 1:
            return
        group = self.dense.get_group("replicate")
        parameters = list(parameters)
        reached = [one.grad is not None for one in parameters]
        anywhere = [any(flags) for flags in zip(*self.everyone(reached), strict=True)]
        gradients = []
        for parameter, wanted in zip(parameters, anywhere, strict=True):
            if not wanted:  # alone it would be passed over, and so is its momentum
                continue
            if parameter.grad is None:  # a rank where nothing reached it still has to meet the others
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for some in _buckets(gradients):
            if len(some) == 1:
                self._meet(partial(dist.all_reduce, some[0], group=group))
                continue
            flat = torch.cat([one.reshape(-1) for one in some])
            self._meet(partial(dist.all_reduce, flat, group=group))
            for one, summed in zip(some, flat.split([one.numel() for one in some]), strict=True):
                one.copy_(summed.view_as(one))

    def spread(self, model: Transformer, products: torch.dtype | None = None) -> None:
        """Stages of a pipeline first, then experts whole, then everything by FSDP2."""
        if self.stages > 1:
            self._cut = Cut.of(model.config, self.layout.schedule, self.stages)
            keep_only(model, self._cut, self.stage)
        model.context = self._context
        spread(model, self.layout, self.dense, self.routed, products)

    def passes(self, model: Transformer) -> Execute:
        """One after the other, or a pipeline."""
        if self._cut is None:
            return OneAfterAnother(model)
        self._pipeline = Pipeline(model, self._cut, self._along())
        return self._pipeline

    def measured(self, model: Transformer) -> Any:
        """Stages answer as one model."""
        if self._cut is None:
            return model
        return Relay(model, self._cut, self._along())

    def _along(self) -> dist.ProcessGroup:
        """The processes of this one's pipeline."""
        return self.dense.get_group("pipeline")

    def settle(self, model: Transformer) -> None:
        """FSDP leaves the outermost weights whole."""
        settle(model)

    @torch.no_grad()  # in which a piece is an attribute, and not a function with a backward pass
    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Root of the squares of all pieces; copies are counted once."""
        counted = parameters if self._pipeline is None else self._pipeline.counted(parameters)
        gradients = [self.local(p.grad) for p in counted.values() if p.grad is not None]
        squared = torch.nn.utils.get_total_norm(gradients).double().square().to(self.device)
        if self.sharded:
            self._meet(lambda: dist.all_reduce(squared, group=self.dense.get_group("fsdp")))
        if self.stages > 1:
            self._meet(partial(dist.all_reduce, squared, group=self._along()))
        first = next(iter(parameters.values()), None)
        return squared.sqrt().to(torch.float32 if first is None else first.dtype)

    def local(self, tensor: Tensor) -> Tensor:
        """Of a DTensor, what lies here."""
        return local(tensor)

    def first_row(self, tensor: Tensor) -> int:
        """Of a DTensor, which is cut by rows."""
        return int(rows(tensor).start) if isinstance(tensor, DTensor) else 0

    def put(self, target: Tensor, whole: Parts) -> None:
        """No process has to ask another: each cuts its piece out."""
        put(target, whole)

    def apart(self) -> dist.ProcessGroup:
        """Collectives of a thread never stand between those of training: they have connections of their own."""
        group = dist.new_group(backend="gloo", timeout=self._timeout)  # all are there now, or never
        _set_pg_timeout(_A_DAY, group)
        return group

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One after the other, so that no rank but the first holds more than a few whole tensors; stages in order.

        Of copies that two stages hold, the first stage's.
        """
        found: dict[str, Tensor] = {}
        each = self.size // self.stages  # ranks count through stages slowest
        names = [(stage, name) for stage, own in enumerate(self.everyone(list(tensors))[::each]) for name in own]
        once = {name: stage for stage, name in reversed(names)}
        names = [(stage, name) for stage, name in names if once[name] == stage]
        mine = wholes(tensors[name] for stage, name in names if stage == self.stage)
        for stage, name in names:
            one = next(mine).detach() if stage == self.stage else None
            if stage and self.rank in (0, stage * each):
                one = self._sent(one, stage * each)
            if self.rank == 0 and one is not None:
                found[name] = one.to("cpu", copy=True)
        return found

    def _sent(self, tensor: Tensor | None, source: int) -> Tensor:
        """A tensor of another stage, on rank 0 and where it comes from; both call this."""
        if self.rank == source:
            assert tensor is not None
            own = tensor.cpu().contiguous()
            dist.send_object_list([own.shape, own.dtype], dst=0)
            dist.send(own, dst=0)
            return own
        kind: list[Any] = [None, None]
        dist.recv_object_list(kind, src=source)
        came = torch.empty(kind[0], dtype=kind[1])
        dist.recv(came, src=source)
        return came

    def figures(self, arrived: Mapping[int, int]) -> dict[str, float]:
        """Of the layer where it is worst, the rows of the process that received most over the mean: 1 is even.

        Rows as they came, of every process by itself: the load of the step knows experts, which several processes hold.
        """
        if self.layout.expert == 1:
            return {}
        everybody = self.everyone(dict(arrived))
        layers = {layer for found in everybody for layer in found}
        rows = [[found[layer] for found in everybody if layer in found] for layer in layers]
        return {ROWS_FIGURE: max(max(one) * len(one) / max(sum(one), 1) for one in rows)} if rows else {}

    def any(self, flag: bool) -> bool:
        """Over all processes."""
        return any(self.everyone(flag))

    def first(self, make: Callable[[], Value]) -> Value:
        """Rank 0's result, or its error."""
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made = [make(), None]
            except FinemoeError as error:
                made = [None, error]
        self._meet(partial(dist.broadcast_object_list, made, src=0))
        value, failure = made
        if failure is not None:
            failure.everywhere = True
            raise failure
        return value  # type: ignore[no-any-return]

    def in_turn(self, make: Callable[[], Value]) -> Value:
        """Rank 0, then all others at once; an error of any is one of all."""
        made: list[Value] = []
        failure: FinemoeError | None = None
        for mine in (self.rank == 0, self.rank != 0):
            if mine:
                try:
                    made.append(make())
                except FinemoeError as error:
                    failure = type(error)(f"rank {self.rank}: {error}") if self.rank else error
            failed = [one for one in self.everyone(failure) if one is not None]
            if failed:
                failed[0].everywhere = True
                raise failed[0]
        return made[0]

    def why(self, error: BaseException) -> str:
        """In words, which processes are the reason that a collective failed."""
        missing = self._alive.missing()
        if missing:
            return f"{in_words(missing)} gave no sign of life for {SILENT:.0f} s and more, stopped or gone: {error}"
        behind = self._alive.behind()
        if behind:
            return f"{in_words(behind)} did not come as far as the others: {error}"
        return f"a process failed while others waited for it; what it said is above or below: {error}"

    def close(self) -> None:
        """No sign of life any more: whoever waits is to know."""
        self._alive.stop()

    def everyone(self, value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
        """Pickled, and so small things only: most fit into one exchange, of which a step has several."""
        found: list[Any] = [None] * self.size
        self._meet(lambda: _all_gather(found, value, group))
        return found

    def _shares(self, found: list[Value]) -> list[Value]:
        """One of each share and piece: those of the first stage of a pipeline."""
        return found[: self.layout.data * self.layout.context]

    def _meet(self, collective: Callable[[], Any]) -> None:
        self._alive.count()
        collective()


def _all_gather(found: list[Any], value: Any, group: dist.ProcessGroup | None) -> None:
    """`dist.all_gather_object` on the CPU, which would first ask everybody how long theirs is.

    Each sends the length and as much as there is room for; what is longer anywhere follows in a second exchange.
    """
    data = pickle.dumps(value)
    came = _exchange(len(data).to_bytes(8, "little") + data[:_ROOM].ljust(_ROOM), len(found), group)
    lengths = [int.from_bytes(one[:8], "little") for one in came]
    longest = max(lengths)
    came = [one[8:] for one in came] if longest <= _ROOM else _exchange(data.ljust(longest), len(found), group)
    found[:] = [pickle.loads(one[:length]) for one, length in zip(came, lengths, strict=True)]


def _exchange(own: bytes, processes: int, group: dist.ProcessGroup | None) -> list[bytes]:
    """Bytes of all, as many from each."""
    came = [torch.empty(len(own), dtype=torch.uint8) for _ in range(processes)]
    dist.all_gather(came, torch.frombuffer(bytearray(own), dtype=torch.uint8), group=group)
    return [one.numpy().tobytes() for one in came]


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those that are summed in one exchange, which costs about a millisecond however little it carries."""
    found: list[list[Tensor]] = []
    for dtype in dict.fromkeys(one.dtype for one in gradients):  # in one order everywhere
        room = 0
        for one in gradients:
            if one.dtype != dtype:
                continue
            if one.nbytes > room:
                found.append([])
                room = _BUCKET_BYTES
            found[-1].append(one)
            room -= one.nbytes
    return found


def _meshes(layout: Layout, device: torch.device) -> tuple[DeviceMesh, DeviceMesh]:
    """The same processes seen twice: by weights that every token meets, and by routed experts."""
    dense = init_device_mesh(
        device.type,
        (layout.pipeline, layout.replicate, layout.fsdp),
        mesh_dim_names=("pipeline", "replicate", "fsdp"),
    )
    if layout.expert == 1:
        return dense, dense
    routed = init_device_mesh(
        device.type,
        (layout.pipeline, layout.replicate, layout.expert_shard, layout.expert),
        mesh_dim_names=("pipeline", "replicate", "expert_shard", "expert"),
    )
    return dense, routed
