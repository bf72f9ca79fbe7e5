"""Upcycling: a dense model becomes a fine-grained mixture that computes the same, and can then learn to be more.

Every dense feed-forward layer is cut along its neurons into `shards`, and each shard is copied. Some shards become
shared experts; the copies of the others are routed. The router has one row for each set of copies, the same for all
shards of the set ("virtual groups", He et al. 2024, arXiv 2410.07524), so that a token always meets each shard as often
as any other, and where gates are normalised the sum is the dense layer's output, exactly.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, final

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from finemoe.checkpoint.huggingface.importing import companion_of
from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.open import load_model, load_tokenizer, read_model_config, text_home
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.workspace import check_free, fingerprint, workspace
from finemoe.checkpoint.weights.imported import ImportedWriter
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.core.config import Config, parse
from finemoe.core.errors import ConfigError
from finemoe.core.logs import progress
from finemoe.core.seeds import derive
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.size import measure
from finemoe.model.transformer import Transformer
from finemoe.text.files import COMPANIONS

_GATE, _UP, _DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"


@final
class UpcyclingConfig(Config):
    """What becomes of each dense feed-forward layer."""

    copies: PositiveInt = 8
    """[copies] Of each routed shard: E of the paper."""
    shards: PositiveInt = 4
    """[shards] Pieces that a layer's neurons are cut into, each as wide as an expert: G of the paper."""
    shared: NonNegativeInt = 1
    """[shards] Of these, how many become shared experts, which are not copied."""
    active: PositiveInt = 1
    """[copies] Of each routed shard that a token goes through; more than one cost more than the dense model."""
    router: Literal["sigmoid", "softmax", "plain"] = "sigmoid"
    """sigmoid: DeepSeek-V3's, with a bias for balance; softmax: gates over the chosen experts that sum to 1; plain:
    DeepSeekMoE's, whose gates are not normalised: what it computes at first is only near the dense model."""
    route_scale: PositiveFloat = 1.0
    """[factor] Of the gates; the experts are made smaller by as much."""
    dense_layers: NonNegativeInt = 0
    """[layers] So many at the bottom stay dense, as in DeepSeek's models."""
    noise: NonNegativeFloat = 0.0
    """[share] Of each weight matrix's standard deviation, added to every copy: equal copies learn equally until the
    router tells them apart."""
    redrawn: Annotated[float, Field(ge=0, le=1)] = 0.0
    """[share] Of each copy's neurons that are drawn anew, with the matrix's own spread (Drop-Upcycling, 2502.19261)."""
    seed: int = 0
    """Of router rows, noise and drawn neurons."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shared >= self.shards:
            raise ValueError(f"shared {self.shared} must be below shards {self.shards}: something has to be routed")
        if self.active > self.copies:
            raise ValueError(f"active {self.active} is above copies {self.copies}: there are no more to go through")
        return self

    @property
    def routed(self) -> int:
        """Shards that are routed."""
        return self.shards - self.shared

    @property
    def down_scale(self) -> float:
        """What routed experts' outputs are multiplied by, so that gates that sum to `route_scale` give back the sum."""
        return self.routed / self.route_scale

    @property
    def plain_scale(self) -> float:
        """The paper's factor of both outer matrices where gates are not normalised: (E G² / T)^(1/3), section 3.3.

        It was derived for squared ReLU and gates of 1 / (E G) each; SwiGLU is not homogeneous in its gate.
        """
        return float((self.copies * self.routed**2 / self.active) ** (1 / 3))


def upcycled_config(dense: ModelConfig, config: UpcyclingConfig) -> ModelConfig:
    """The mixture that `dense` becomes.

    Raises:
        ConfigError: a layer is no dense one, or cannot be cut into equal shards.
    """
    if config.dense_layers >= len(dense.blocks):
        raise ConfigError(
            f"dense_layers {config.dense_layers} leaves nothing to upcycle of {len(dense.blocks)} layers: lower it"
        )
    blocks = [
        block if layer < config.dense_layers else _mixture(block, layer, config)
        for layer, block in enumerate(dense.blocks)
    ]
    return ModelConfig.model_validate({**dense.model_dump(), "blocks": [block.model_dump() for block in blocks]})


def _mixture(block: BlockConfig, layer: int, config: UpcyclingConfig) -> BlockConfig:
    dense = block.feed_forward
    if not isinstance(dense, DenseConfig):
        raise ConfigError(f"layer {layer} is a mixture already: upcycling begins with a dense model")
    width = dense.ffn_hidden_size
    if width % config.shards:
        near = [n for n in range(2, 65) if width % n == 0]
        raise ConfigError(
            f"shards {config.shards} does not divide the {width} neurons of layer {layer}: take one of "
            f"{', '.join(map(str, near[:12])) or 'none below 65'}"
        )
    router: dict[str, Any] = {"kind": "softmax_topk", "normalize_gates": config.router == "softmax"}
    if config.router == "sigmoid":
        router = {"kind": "sigmoid_biased"}
    mixture = {
        "kind": "moe",
        "num_routed_experts": config.copies * config.routed,
        "experts_per_token": config.active * config.routed,
        "expert_hidden_size": width // config.shards,
        "num_shared_experts": config.shared,
        "swiglu_limit": dense.swiglu_limit,
        "router": {**router, "route_scale": config.route_scale},
    }
    return BlockConfig.model_validate({"attention": block.attention.model_dump(), "feed_forward": mixture})


def upcycle_layer(
    weights: Mapping[str, Tensor], layer: int, config: UpcyclingConfig, init_std: float
) -> dict[str, Tensor]:
    """The tensors of one mixture.

    Args:
        weights: `gate_proj.weight` and `up_proj.weight [width, hidden]`, `down_proj.weight [hidden, width]`.
        layer: its number; each layer has random numbers of its own.
        config: how.
        init_std: spread of the router's rows.

    Returns:
        By the names of `MoELayer`: experts lie set by set, the shards of a set one behind the other.
    """
    gate, up, down = (weights[name].float() for name in (_GATE, _UP, _DOWN))
    draw = torch.Generator().manual_seed(derive(config.seed, f"upcycling {layer}"))
    size = gate.shape[0] // config.shards
    shared = config.shared * size
    made: dict[str, Tensor] = {}
    rows = torch.randn(config.copies, gate.shape[1], generator=draw) * init_std
    made["router.weight"] = rows.repeat_interleave(config.routed, dim=0)
    if config.router == "sigmoid":
        made["router.selection_bias"] = torch.zeros(config.copies * config.routed)
    outer = config.plain_scale if config.router == "plain" else 1.0
    routed_down = down * (config.plain_scale if config.router == "plain" else config.down_scale)
    stacks: tuple[list[Tensor], ...] = ([], [], [])
    for number in range(config.copies * config.routed):
        first = shared + number % config.routed * size
        part = slice(first, first + size)
        expert = gate[part].clone(), outer * up[part], routed_down[:, part].clone()
        for weight in expert:
            _disturb(weight, config, draw)
        _redraw(*expert, config, draw)
        for stack, weight in zip(stacks, expert, strict=True):
            stack.append(weight)
    gates, ups, downs = map(torch.stack, stacks)
    made["experts.gate_up_proj"], made["experts.down_proj"] = torch.cat((gates, ups), dim=1), downs
    if config.shared:
        made[f"shared_experts.{_GATE}"] = gate[:shared].clone()
        made[f"shared_experts.{_UP}"] = up[:shared].clone()
        made[f"shared_experts.{_DOWN}"] = down[:, :shared].clone()
    return made


def _disturb(weight: Tensor, config: UpcyclingConfig, draw: torch.Generator) -> None:
    if config.noise:
        weight += torch.randn(weight.shape, generator=draw) * (config.noise * weight.std())


def _redraw(gate: Tensor, up: Tensor, down: Tensor, config: UpcyclingConfig, draw: torch.Generator) -> None:
    """Some of the neurons of one copy, with the mean and spread that each matrix has."""
    count = round(config.redrawn * len(gate))
    if not count:
        return
    chosen = torch.randperm(len(gate), generator=draw)[:count]
    for weight, index in ((gate, (chosen,)), (up, (chosen,)), (down, (slice(None), chosen))):
        mean, spread = weight.mean(), weight.std()
        weight[index] = torch.randn(weight[index].shape, generator=draw) * spread + mean


def upcycle_weights(
    weights: Mapping[str, Tensor], dense: ModelConfig, config: UpcyclingConfig
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the mixture, one after the other, by the names of `Transformer.state_dict()`.

    What is not touched is passed on as it is; prediction modules stay dense.
    """
    for name, tensor in weights.items():
        layer = layer_of(name)
        if layer is None or layer < config.dense_layers:
            yield name, tensor
    for layer in range(config.dense_layers, len(dense.blocks)):
        place = f"blocks.{layer}.feed_forward."
        own = {name: weights[place + name] for name in (_GATE, _UP, _DOWN)}
        for name, tensor in upcycle_layer(own, layer, config, dense.init_std).items():
            yield place + name, tensor


def layer_of(name: str) -> int | None:
    """Of a tensor of a dense feed-forward layer of the main model; None of all others."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and parts[2] == "feed_forward" else None


@dataclass(frozen=True)
class Upcycled:
    """What was made."""

    path: Path
    config: ModelConfig
    difference: float
    """Largest difference of a logit from the dense model's, over some random tokens."""
    largest: float
    """The dense model's largest logit there."""
    divergence: float
    """[nats] Mean KL of the dense model's distributions from the mixture's."""

    def to_dict(self) -> dict[str, Any]:
        """What `finemoe upcycle --json` prints."""
        sizes = measure(self.config, self.config.max_positions or 1)
        return {
            "path": str(self.path),
            "total_parameters": sizes.total_parameters,
            "active_parameters": sizes.active_parameters,
            "largest_logit_difference": self.difference,
            "largest_logit": self.largest,
            "kl_nats": self.divergence,
        }


def upcycle(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quiet: bool = False,
    **options: Any,
) -> Upcycled:
    """Make a mixture of the dense model at `source`; `out` can be trained further (`start_from`), served and exported.

    What is made new is written in float32, whatever the source has: a rounded factor would be another function.

    Args:
        source: a run, a checkpoint of one, an imported or a Hugging Face folder; never written to.
        out: folder to make; it appears when all is done.
        quiet: no progress on stderr.
        options: of `UpcyclingConfig`.

    Raises:
        ConfigError: the model is no dense one, or cannot be cut so.
        CheckpointError: there is nothing to open, or `out` exists.
        RunError: the disk is full or unwritable.
    """
    source, config = Path(source), parse(UpcyclingConfig, options, "upcycle")
    if kind_of(source) == "gguf":
        raise ConfigError(f"{source} is a GGUF file: `finemoe import {source} DIR`, then upcycle DIR")
    place = check_free(Path(out))
    dense = read_model_config(source)
    mixture = upcycled_config(dense, config)
    model = load_model(source, dtype=None)
    weights = model.state_dict()
    specs = [
        TensorSpec(name, weights[name].dtype if name in weights else torch.float32, shape)
        for name, shape in model_shapes(mixture).items()
    ]
    made = upcycle_weights(weights, dense, config)
    write_derived(source, place, mixture, specs, made, "upcycled", config.model_dump(mode="json"), quiet=quiet)
    return Upcycled(place, mixture, *compare(model.float(), load_model(place)))


def write_derived(
    source: Path,
    place: Path,
    model: ModelConfig,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    kind: str,
    how: Mapping[str, Any],
    *,
    quiet: bool,
) -> None:
    """Write the folder of a model that was made of the one at `source`, with the tokenizer and its companions.

    Args:
        source: what it was made of.
        place: folder to make.
        model: the new model.
        specs: its tensors.
        tensors: the same, by name.
        kind: what it is: `upcycled`, `densified`.
        how: it was made, JSON-able: an interrupted command goes on only where this is the same.
        quiet: no progress on stderr.

    Raises:
        RunError: the disk is full or unwritable.
    """
    home, tokenizer = text_home(source), load_tokenizer(source)
    files = {name: companion_of(home, name) for name in COMPANIONS if (home / name).exists()}
    nbytes = sum(spec.nbytes for spec in specs)
    mark = fingerprint(kind, [], {}, [str(source.resolve()), how])
    about = {"family": kind, "format": kind}
    with workspace(place, mark, nbytes, tensors=len(specs)) as folder, ImportedWriter(folder, specs, []) as writer:
        with nullcontext(lambda _: None) if quiet else progress(kind, len(specs), "tensors") as advance:
            for name, tensor in tensors:
                writer.weights.write(name, tensor)
                advance(1)
        ends = {"eos_token_id": list(tokenizer.stop_ids)} if tokenizer.stop_ids else {}
        record = {"config": {kind: how, **ends}, "tensors": {}}
        writer.finish(model, about, record, files, quiet=True)


@dataclass(frozen=True)
class Apart:
    """How far the copies of one shard are from each other: ||a - b|| over the mean of ||a|| and ||b||."""

    mean: float
    """Over all pairs of copies, shards and layers; 0 where all copies are equal."""
    least: float
    """Of the two copies that are nearest to each other."""


@torch.no_grad()
def copies_apart(model: Transformer, config: UpcyclingConfig) -> Apart:
    """How different the copies have become: of all weights of an expert together, gate, up and down.

    Args:
        model: that upcycling made, trained since or not.
        config: what it was made with.

    Raises:
        ConfigError: a layer does not have the experts that `config` makes, or there is one copy alone.
    """
    if config.copies < 2:
        raise ConfigError("copies 1: a single copy has no other to differ from")
    found = []
    for number in model.config.moe_layers:
        layer = model.moe_layers[number]
        experts = layer.experts
        if layer.config.num_routed_experts != config.copies * config.routed:
            raise ConfigError(
                f"layer {number} has {layer.config.num_routed_experts} routed experts, and {config.copies} copies of "
                f"{config.routed} shards are {config.copies * config.routed}: name what it was upcycled with"
            )
        flat = torch.cat((experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)), dim=1).double()
        for copies in flat.unflatten(0, (config.copies, config.routed)).unbind(1):
            lengths = copies.norm(dim=-1)
            for one in range(config.copies):
                gaps = (copies[one + 1 :] - copies[one]).norm(dim=-1)
                found.append(gaps / (0.5 * (lengths[one + 1 :] + lengths[one])))
    pairs = torch.cat(found)
    return Apart(pairs.mean().item(), pairs.min().item())


@torch.inference_mode()
def compare(dense: Transformer, mixture: Transformer, tokens: int = 256) -> tuple[float, float, float]:
    """Largest difference of a logit, the dense model's largest, and the mean KL [nats], over random tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(dense.config.vocab_size, (1, tokens), generator=draw)
    wanted, found = (model.logits(model(ids).hidden).float() for model in (dense, mixture))
    logprobs, others = wanted.log_softmax(-1), found.log_softmax(-1)
    divergence = (logprobs.exp() * (logprobs - others)).sum(-1).mean()
    return (wanted - found).abs().max().item(), wanted.abs().max().item(), max(0.0, divergence.item())
