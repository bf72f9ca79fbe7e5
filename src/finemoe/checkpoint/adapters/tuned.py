"""What a run tuned, read from its newest checkpoint, and what names the model that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from finemoe.checkpoint.fingerprint import weights_fingerprint
from finemoe.checkpoint.kinds import CONFIG, STATE
from finemoe.checkpoint.own_config import model_of
from finemoe.checkpoint.run_state.state import METHOD, newest_checkpoint, read_part
from finemoe.checkpoint.selection import ModelShape, router_fingerprint, shape_of
from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.core.config import Config
from finemoe.core.errors import CheckpointError
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer

Kind = Literal["lora", "experts"]
_MEND = "open another checkpoint of the run"


class Base(Config):
    """What a model must have in common with the one that was tuned: tuning leaves routers and shapes as they are."""

    router_sha256: str
    embedding_sha256: str
    """It tells dense models from each other, which have no routers; no adapter changes it."""
    model: ModelShape
    weights_sha256: str | None = None
    """Of all its weights, as `weights_fingerprint` has it; None where they were not there any more to be read."""

    @classmethod
    def of(cls, model: Transformer) -> Self:
        """Of a tuned model, or of the one it began as: they have the same, but for `weights_sha256`, left out here."""
        # rounded, as a base may be stored so
        values = model.embedding.weight.detach().cpu().bfloat16().contiguous().view(torch.int16)
        return cls(
            router_sha256=router_fingerprint(model),
            embedding_sha256=hashlib.sha256(values.numpy().data).hexdigest(),
            model=shape_of(model.config),
        )

    def require(self, model: Transformer, what: str, base: Path) -> None:
        """Refuse a base that was not tuned so.

        Args:
            model: at `base`.
            what: the adapter, as the message names it.
            base: as the message names it.

        Raises:
            CheckpointError: it has another shape, or other routers, embeddings or weights.
        """
        here = Base.of(model)
        if here.model != self.model:
            raise CheckpointError(f"{what}: made for a model of another shape than {base} has; name the one it tuned")
        other = None
        if here.router_sha256 != self.router_sha256:
            other = "routers"
        elif here.embedding_sha256 != self.embedding_sha256:
            other = "embeddings"
        elif self.weights_sha256 is None:
            logger.warning(
                "%s does not say all weights of the model that it tuned: %s has its shape, routers and embeddings, and "
                "whether it is that model is not known",
                what,
                base,
            )
        elif self.weights_sha256 != weights_fingerprint(model):
            other = "weights"
        if other is not None:
            raise CheckpointError(
                f"{what}: {base} has the right shape and other {other}, so it is not the model that was tuned; name "
                "the one that the run had as start_from"
            )


@dataclass(frozen=True)
class Tuned:
    """What the run keeps of its trainable."""

    folder: Path
    """The checkpoint."""
    start_from: str | None
    """What the run began with."""
    config: ModelConfig
    kind: Kind
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def open_tuned(path: Path) -> Tuned:
    """The tuned part of a run, or of one checkpoint of it.

    Raises:
        CheckpointError: no run, damaged, or one that trains in another way.
    """
    folder = newest_checkpoint(path)
    raw = read_json(folder_file(folder, CONFIG))
    trainable = raw.get("trainable")
    kind = trainable.get("kind") if isinstance(trainable, dict) else None
    if kind not in ("lora", "experts"):
        raise CheckpointError(
            f'{path}: an adapter is what a run with trainable.kind "lora" or "experts" makes, and this one is of kind '
            f"{kind or 'everything'!r}: export the model itself, without --adapter"
        )
    with damage_of(folder / METHOD, _MEND, CheckpointError):
        tensors = read_part(folder, METHOD)
    values = read_json(folder_file(folder, STATE)).get("method")
    own = values.get(kind) if isinstance(values, dict) else None
    if not isinstance(own, dict):
        raise CheckpointError(f"{folder / STATE}: says nothing of what was tuned; {_MEND}")
    found = {name.removeprefix(f"{kind}/"): one for name, one in tensors.items() if name.startswith(f"{kind}/")}
    start = raw.get("start_from")
    return Tuned(folder, start if isinstance(start, str) else None, model_of(raw, folder / CONFIG), kind, found, own)
