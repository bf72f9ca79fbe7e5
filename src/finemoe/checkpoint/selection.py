"""Which routed experts a task needs: the file that says so, written by an analysis and read by expert tuning."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from finemoe.core.config import Config, parse, to_json
from finemoe.core.errors import ConfigError
from finemoe.core.files import make_folder, storage_error, write_text
from finemoe.core.reading import decode_json, reason_of
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.size import measure
from finemoe.model.transformer import Transformer

Score = Literal["gate", "token"]
_MOST_BYTES = 64 << 20
"""Of a selection; DeepSeek-V3's experts all together make less than one MiB."""


class ModelShape(Config):
    """What a model must share with the one that the experts were selected on."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    experts: dict[NonNegativeInt, PositiveInt]
    """Routed experts of each MoE layer of the main model."""


class LayerSelection(Config):
    """The experts of one layer."""

    layer: NonNegativeInt
    experts: tuple[NonNegativeInt, ...]
    """Most relevant first."""
    scores: tuple[Annotated[float, Field(ge=0)], ...]
    """Relevance of each, as a share of the layer's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.experts) != len(self.scores):
            raise ValueError(f"layer {self.layer}: {len(self.experts)} experts and {len(self.scores)} scores")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"layer {self.layer}: an expert is selected twice")
        return self


class ExpertSelection(Config):
    """The experts to train, layer by layer."""

    kind: Literal["expert_selection"] = "expert_selection"
    schema_version: Literal[1] = 1
    source: str
    """The model the relevance was measured on."""
    router_sha256: str
    """Of its routers, which expert tuning leaves alone: `router_fingerprint` of a tuned model is still this."""
    model: ModelShape
    score: Score
    p: Annotated[float, Field(gt=0, le=1)]
    """Share of each layer's relevance that the selected experts reach."""
    samples: PositiveInt
    tokens: PositiveInt
    trainable_parameters: NonNegativeInt
    trainable_share: Annotated[float, Field(ge=0, le=1)]
    """Of all parameters of the main model."""
    layers: tuple[LayerSelection, ...]

    @property
    def experts(self) -> dict[int, tuple[int, ...]]:
        """By layer."""
        return {layer.layer: layer.experts for layer in self.layers}


def shape_of(config: ModelConfig) -> ModelShape:
    """The shape that a selection records and checks."""
    layers = {number: block.feed_forward for number, block in enumerate(config.blocks)}
    experts = {number: ff.num_routed_experts for number, ff in layers.items() if isinstance(ff, MoEConfig)}
    return ModelShape(
        num_layers=len(config.blocks), hidden_size=config.hidden_size, vocab_size=config.vocab_size, experts=experts
    )


def trainable(config: ModelConfig, experts: Mapping[int, tuple[int, ...]]) -> tuple[int, float]:
    """Parameters of the selected experts, three matrices each, and their share of all of the main model's."""
    count = 0
    for layer, chosen in experts.items():
        feed_forward = config.blocks[layer].feed_forward
        assert isinstance(feed_forward, MoEConfig)
        count += 3 * config.hidden_size * feed_forward.expert_hidden_size * len(chosen)
    return count, count / measure(config, 1).total_parameters


def router_fingerprint(model: Transformer) -> str:
    """sha256 of the routers of the main model, in float32: of two models of one shape it tells which is which."""
    digest = hashlib.sha256()
    for number, layer in sorted(model.moe_layers.items()):
        if number < len(model.blocks):
            for name, tensor in sorted(layer.router.state_dict().items()):
                values = tensor.detach().cpu()
                digest.update(f"{number}.{name}{tuple(values.shape)}".encode())
                digest.update((values.float() if values.is_floating_point() else values).numpy().tobytes())
    return digest.hexdigest()


def require_place(path: Path) -> None:
    """Before any work: nothing but an older selection is written over.

    Raises:
        ConfigError: there is a folder, or a file that holds something else.
    """
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, and a selection is a file: name one in it, as {path / 'selection.json'}"
        )
    if not path.exists():
        return
    table = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        table = decode_json(path.read_bytes()) if path.stat().st_size <= _MOST_BYTES else None
    if not isinstance(table, dict) or table.get("kind") != "expert_selection":
        raise ConfigError(f"{path} holds something else, which is not written over: choose another name, or remove it")


def write_selection(path: Path, selection: ExpertSelection) -> None:
    """Write it as JSON.

    Raises:
        RunError: it cannot be written.
    """
    try:
        make_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    write_text(path, to_json(selection))


def read_selection(path: Path, model: ModelConfig) -> ExpertSelection:
    """The selection at `path`, if it fits a model of this configuration.

    Raises:
        ConfigError: no such file, no selection, of a later version, or with layers or experts that the model has not.
    """
    try:
        table = decode_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such selection; `finemoe analyze relevance` writes one") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable selection of experts: {reason_of(error)}") from error
    if not isinstance(table, dict) or table.get("kind") != "expert_selection":
        raise ConfigError(f"{path}: not a selection of experts; `finemoe analyze relevance` writes one")
    if table.get("schema_version") != 1:
        raise ConfigError(f"{path}: schema_version {table.get('schema_version')!r} is not known here, which reads 1")
    selection = parse(ExpertSelection, table, str(path))
    _check_fit(path, selection, shape_of(model))
    return selection


def _check_fit(path: Path, selection: ExpertSelection, shape: ModelShape) -> None:
    for name in ("num_layers", "hidden_size", "vocab_size"):
        made, here = vars(selection.model)[name], vars(shape)[name]
        if made != here:
            raise ConfigError(f"{path}: made for a model with {name} {made}, and this one has {here}: select again")
    seen: set[int] = set()
    for one in selection.layers:
        if one.layer not in shape.experts:
            known = ", ".join(map(str, shape.experts)) or "none"
            raise ConfigError(f"{path}: layer {one.layer} has no routed experts in this model; MoE layers: {known}")
        if one.layer in seen:
            raise ConfigError(f"{path}: layer {one.layer} stands there twice")
        seen.add(one.layer)
        if one.experts and max(one.experts) >= shape.experts[one.layer]:
            raise ConfigError(
                f"{path}: layer {one.layer} has no expert {max(one.experts)}: its {shape.experts[one.layer]} routed "
                "experts are numbered from 0"
            )
    if selection.model.experts != shape.experts:
        raise ConfigError(f"{path}: made for a model with other numbers of routed experts: select again")
    if not any(one.experts for one in selection.layers):
        raise ConfigError(f"{path}: selects no expert at all")
