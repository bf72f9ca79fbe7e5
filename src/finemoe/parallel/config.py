"""How the processes of a run share its work: `[parallel]` of a recipe, and the layout that it comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from finemoe.core.config import Config
from finemoe.core.errors import ConfigError

Schedule = Literal["1f1b", "interleaved", "zbv", "dualpipev"]
Start = Literal["torchrun", "plan", "launch"]
"""Who says how many processes there are: torchrun, which runs them, or an option of a verb, which only asks."""

_COUNTED: dict[Start, tuple[str, str]] = {
    "torchrun": ("running", "torchrun --nproc-per-node {}"),
    "plan": ("planned for", "--gpus {}"),
    "launch": ("asked for", "--nodes times --gpus-per-node = {}"),
}

_NOT_BUILT = {
    "tensor": "products of small experts are too narrow to be cut, and a dense model of this size fits with shard",
    "expert_tensor": "cutting inside of experts gave wrong gradients elsewhere and was given up there: use expert",
    "deepep": "its kernels run on some GPUs and networks only, and torch's all-to-all moves the same rows everywhere: "
    "use expert, and `finemoe plan --calibration tuned` for what such kernels would save",
}


class ParallelConfig(Config):
    """How many processes share what. Together they are pipeline · replicate · shard · context."""

    replicate: PositiveInt | None = None
    """[copies] Whole copies of the model, or of its shards, each with sequences of its own (with shard: HSDP).
    None: as many as there are processes for where shard is given, else 1."""
    shard: PositiveInt | None = None
    """[processes] Over how many a copy's weights, gradients and moments are spread, each with sequences of its own
    (FSDP2). None: all processes that are left."""
    expert: PositiveInt = 1
    """[processes] Over how many of a copy's processes its routed experts are spread whole, tokens travelling to them;
    divides shard · context."""
    pipeline: PositiveInt = 1
    """[stages] Consecutive pieces of the model's blocks, each on processes of its own."""
    schedule: Schedule = "1f1b"
    """In which order a pipeline's micro-batches go forward and back."""
    context: PositiveInt = 1
    """[processes] Over how many the tokens of each sequence are spread; for latent attention."""
    timeout: PositiveFloat = 600.0
    """[seconds] How long a process waits for another before the run fails and says for whom. Longer than what one may
    do alone: read a corpus for the first time, measure kernels. Writing and reading checkpoints in pieces has no such
    limit."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping):
            for name, reason in _NOT_BUILT.items():
                if name in raw:
                    raise ValueError(f"parallel.{name} is not built, and is not meant to be: {reason}")
        return raw

    @property
    def least(self) -> int:
        """How many processes it takes; where `shard` is left out, the fewest that experts can be spread over."""
        shard = self.shard or self.expert // math.gcd(self.expert, self.context)
        return self.pipeline * (self.replicate or 1) * shard * self.context

    def layout(self, processes: int, start: Start = "torchrun", experts: int = 0) -> Layout:
        """What `processes` come to.

        Args:
            processes: all of them.
            start: who says so, for the words of a refusal.
            experts: whose divisors alone are offered for `expert`; 0: any.

        Raises:
            ConfigError: they cannot be shared out like that; with numbers that can.
        """
        replicate, shard = self.replicate or 1, self.shard or 1
        fixed = self.pipeline * replicate * shard * self.context
        if self.shard is None and processes % fixed:
            raise ConfigError(
                f"{processes} processes cannot be parallel.pipeline {self.pipeline} x replicate {replicate} x "
                f"context {self.context}: start a multiple of {fixed}, or take other sizes, such as "
                f"{self._all_shard(processes)}"
            )
        left = processes // fixed
        if self.shard is None:
            shard = left
        elif self.replicate is None and processes % fixed == 0:
            replicate = left
        elif fixed != processes:
            counted, instead = _COUNTED[start]
            raise ConfigError(
                f"parallel.pipeline {self.pipeline} x replicate {replicate} x shard {shard} x context "
                f"{self.context} are {fixed} processes, and {processes} {'is' if processes == 1 else 'are'} "
                f"{counted}: {instead.format(fixed)}, or other sizes, such as {self._other(processes, fixed)}"
            )
        if shard * self.context % self.expert:
            most = math.gcd(experts, shard * self.context)
            near = [str(n) for n in range(1, most + 1) if most % n == 0]
            instead = f"try one of {', '.join(near)}" if near[1:] else "--set parallel.expert=1"
            raise ConfigError(
                f"parallel.expert {self.expert} does not divide shard x context = {shard * self.context}: {instead}"
            )
        return Layout(self.pipeline, replicate, shard, self.context, self.expert, self.schedule)

    def _other(self, processes: int, fixed: int) -> str:
        """In options: other copies of the same where that is enough, as a run that is gone on with names its own."""
        once = fixed // (self.replicate or 1)
        return self._all_shard(processes) if processes % once else f"--set parallel.replicate={processes // once}"

    def _all_shard(self, processes: int) -> str:
        """In options, what makes so many processes of these sizes, all of them shards."""
        others = ("pipeline", "replicate", "context", "expert")
        return " ".join(
            [
                f"--set parallel.shard={processes}",
                *(f"--set parallel.{name}=1" for name in others if (getattr(self, name) or 1) > 1),
            ]
        )


@dataclass(frozen=True)
class Layout:
    """Sizes of a run's groups of processes, all known. Ranks count through pipeline slowest, then replicate, shard,
    context."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    schedule: Schedule = "1f1b"

    @property
    def processes(self) -> int:
        """All of them."""
        return self.pipeline * self.replicate * self.shard * self.context

    @property
    def data(self) -> int:
        """Processes, or groups of them, with sequences of their own."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Over how many processes a weight that is no expert's is spread."""
        return self.shard * self.context

    @property
    def expert_shard(self) -> int:
        """Over how many processes the experts that lie on one are spread further."""
        return self.fsdp // self.expert

    def __str__(self) -> str:
        """In words, those above 1."""
        sizes = {name: getattr(self, name) for name in ("pipeline", "replicate", "shard", "context", "expert")}
        said = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if self.pipeline > 1:
            said[0] += f" ({self.schedule})"
        return ", ".join(said) or "one process"
