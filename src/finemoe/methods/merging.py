"""Merging: a mixture's experts become one dense feed-forward layer, a baseline for what routing is worth.

The reverse of upcycling. The dense layer holds the shared experts' neurons as they are, and then one averaged expert
for each group of routed ones, whose output matrix is multiplied by what the gates of the group come to on average. Of a
mixture that upcycling made, and that was not trained since, this is the dense model again: the copies of one shard lie
`experts_per_token` apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.open import load_model, read_model_config
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.workspace import check_free
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.core.config import Config, parse
from finemoe.core.errors import ConfigError
from finemoe.core.reading import damage_of, read_object
from finemoe.methods.upcycling import compare, layer_of, write_derived
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.size import measure
from finemoe.model.transformer import Transformer
from finemoe.training.directory import METRICS, read_metrics


@final
class MergingConfig(Config):
    """How a mixture's routed experts become neurons of a dense layer."""

    group: Literal["position", "similar"] = "position"
    """position: by number modulo `groups`, in which copies of one shard lie together; similar: by how alike their
    weights are."""
    groups: PositiveInt | None = None
    """[groups] Averaged experts of each layer. None: as many as a token goes through, so that the dense layer costs as
    much."""


def densified_config(mixture: ModelConfig, config: MergingConfig) -> ModelConfig:
    """The dense model that `mixture` becomes, without prediction modules.

    Raises:
        ConfigError: it is dense already, has fewer experts than groups, or shared experts that a gate weighs.
    """
    if not mixture.moe_layers:
        raise ConfigError(
            f"all {len(mixture.blocks)} layers are dense already: there are no experts to merge; without --reverse "
            "a dense model becomes a mixture"
        )
    blocks = [
        _dense(block, layer, config) if layer in mixture.moe_layers else block
        for layer, block in enumerate(mixture.blocks)
    ]
    table = {**mixture.model_dump(), "blocks": [block.model_dump() for block in blocks], "mtp": ()}
    return ModelConfig.model_validate(table)


def _dense(block: BlockConfig, layer: int, config: MergingConfig) -> BlockConfig:
    mixture: MoEConfig = block.feed_forward
    groups = config.groups or mixture.experts_per_token
    if groups > mixture.num_routed_experts:
        raise ConfigError(
            f"groups {groups} is above the {mixture.num_routed_experts} routed experts of layer {layer}: lower it"
        )
    if mixture.gate_shared_experts:
        raise ConfigError(
            f"layer {layer} weighs its shared experts by a gate of its own (gate_shared_experts), for which a dense "
            "layer has no place: this model cannot be merged"
        )
    width = (mixture.num_shared_experts + groups) * mixture.expert_hidden_size
    dense = DenseConfig(ffn_hidden_size=width, swiglu_limit=mixture.swiglu_limit)
    return BlockConfig(attention=block.attention, feed_forward=dense)


def group_by_position(num_experts: int, groups: int) -> list[list[int]]:
    """Expert e lies in group e modulo `groups`."""
    return [list(range(first, num_experts, groups)) for first in range(groups)]


def group_by_similarity(experts: Tensor, groups: int) -> list[list[int]]:
    """Groups of equal size (to within one) of experts that are alike, found greedily.

    Likeness is the cosine of the weights after the mean of all experts is taken away. A group begins with the first
    expert that is in none yet, and takes the one that is most like its members on average until it is full. Neurons
    are compared place by place: two experts with the same neurons in another order do not look alike.

    Args:
        experts: [experts, weights].
        groups: at most as many as experts.
    """
    centred = experts.double() - experts.double().mean(dim=0)
    unit = F.normalize(centred, dim=-1)
    likeness = unit @ unit.T
    free = list(range(len(experts)))
    made = []
    for number in range(groups):
        members = [free.pop(0)]
        while len(members) < len(experts) // groups + (number < len(experts) % groups):
            best = max(free, key=lambda e: (likeness[e, members].mean().item(), -e))
            free.remove(best)
            members.append(best)
        made.append(members)
    return made


def merge_layer(
    weights: Mapping[str, Tensor],
    layer: MoEConfig,
    config: MergingConfig,
    gate_sum: float,
    load: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weights of the dense layer, float32.

    Args:
        weights: by the names of `MoELayer`.
        layer: what they are.
        config: how.
        gate_sum: what a token's gates come to together, on average.
        load: [experts] how often each expert is chosen. Weighs the experts of a group, and the groups; None: all alike.

    Returns:
        `gate_proj.weight` and `up_proj.weight [width, hidden]`, `down_proj.weight [hidden, width]`: shared neurons
        first, then group after group.
    """
    stack, outputs = weights["experts.gate_up_proj"].float(), weights["experts.down_proj"].float()
    count = config.groups or layer.experts_per_token
    if config.group == "similar":
        groups = group_by_similarity(torch.cat((stack.flatten(1), outputs.flatten(1)), dim=1), count)
    else:
        groups = group_by_position(len(stack), count)
    gates: list[Tensor] = []
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    if layer.num_shared_experts:
        names = ("gate_proj", "up_proj", "down_proj")
        for parts, name in zip((gates, ups, downs), names, strict=True):
            parts.append(weights[f"shared_experts.{name}.weight"].float())
    for members in groups:
        share, total = _shares(members, load, 1 / count)
        gate, up = torch.einsum("e,ewh->wh", share, stack[members]).chunk(2)
        gates.append(gate)
        ups.append(up)
        downs.append(torch.einsum("e,ehw->hw", share, outputs[members]) * (gate_sum * total))
    return {
        "gate_proj.weight": torch.cat(gates),
        "up_proj.weight": torch.cat(ups),
        "down_proj.weight": torch.cat(downs, dim=1),
    }


def _shares(members: Sequence[int], load: Tensor | None, even: float) -> tuple[Tensor, float]:
    """What each of `members [n]` counts in their mean, and the group's share of all choices."""
    alike = torch.full((len(members),), 1 / len(members))
    if load is None:
        return alike, even
    own = load.double()[members]
    if not own.sum():
        return alike, 0.0
    return (own / own.sum()).float(), (own.sum() / load.double().sum()).item()


@torch.inference_mode()
def gate_sums(model: Transformer, tokens: int = 256) -> dict[int, float]:
    """What the gates of a token come to together, by layer: the mean over the random tokens that `compare` reads.

    Gates that are normalised come to their `route_scale`, whatever is read. Others depend on the text.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=draw)
    found = {}
    for layer, record in model(ids, record=True).routing.items():
        assert record.decision is not None  # asked for
        found[layer] = record.decision.gate_weights.double().sum(-1).mean().item()
    return found


def merge_weights(
    model: Transformer, config: MergingConfig, loads: Mapping[int, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the dense model, one after the other, by the names of `Transformer.state_dict()`.

    Args:
        model: the mixture, in eval mode.
        config: how.
        loads: [experts] by layer, as in `merge_layer`.
    """
    weights, mixture = model.state_dict(), model.config
    for name, tensor in weights.items():
        if not name.startswith("mtp") and layer_of(name) not in mixture.moe_layers:
            yield name, tensor
    sums = gate_sums(model)
    for layer in mixture.moe_layers:
        place = f"blocks.{layer}.feed_forward."
        own = {name.removeprefix(place): tensor for name, tensor in weights.items() if name.startswith(place)}
        load = None if loads is None else loads[layer]
        for name, tensor in merge_layer(own, mixture.blocks[layer].feed_forward, config, sums[layer], load).items():
            yield place + name, tensor


def read_loads(path: Path) -> dict[int, Tensor]:
    """How often each expert was chosen, `[experts]` by layer.

    Args:
        path: results.json of `finemoe analyze load`, whose last model counts; or a run or its metrics.jsonl, whose last
            validation counts. Of a folder, the one of the two that is in it.

    Raises:
        ConfigError: it holds no loads.
        RunError: it cannot be read, or is damaged.
    """
    mend = "name results.json of `finemoe analyze load`, or a run that trained a mixture and was validated"
    if path.is_dir():
        path = path / (METRICS if (path / METRICS).exists() else "results.json")
    found: Any = None
    if path.name == METRICS:
        known = [one["load"] for one in read_metrics(path.parent) if one["kind"] == "validation" and "load" in one]
        found = known[-1] if known else None
    elif (results := read_object(path, mend)).get("kind") == "load":
        with damage_of(path, mend):
            found = {layer: figures["load"] for layer, figures in results["series"][-1]["layers"].items()}
    if found is None:
        raise ConfigError(f"{path} holds no load of experts: {mend}")
    with damage_of(path, mend):
        return {int(layer): torch.tensor(load, dtype=torch.float64) for layer, load in found.items()}


def _check_loads(loads: Mapping[int, Tensor], mixture: ModelConfig, path: Path) -> None:
    for layer in mixture.moe_layers:
        experts = mixture.blocks[layer].feed_forward.num_routed_experts
        if layer not in loads or loads[layer].shape != (experts,) or loads[layer].sum() <= 0:
            raise ConfigError(
                f"{path}: it has no load of {experts} experts for layer {layer}: it was made with another model"
            )


@dataclass(frozen=True)
class Densified:
    """What was made."""

    path: Path
    config: ModelConfig
    gates: Mapping[int, float]
    """What the gates of a token come to together, by layer: the factor of all groups' outputs."""
    difference: float
    """Largest difference of a logit from the mixture's, over some random tokens."""
    largest: float
    """The mixture's largest logit there."""
    divergence: float
    """[nats] Mean KL of the mixture's distributions from the dense model's."""

    def to_dict(self) -> dict[str, Any]:
        """What `finemoe upcycle --reverse --json` prints."""
        return {
            "path": str(self.path),
            "total_parameters": measure(self.config, self.config.max_positions or 1).total_parameters,
            "gate_sums": {str(layer): total for layer, total in self.gates.items()},
            "largest_logit_difference": self.difference,
            "largest_logit": self.largest,
            "kl_nats": self.divergence,
        }


def densify(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    load: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **options: Any,
) -> Densified:
    """Make a dense model of the mixture at `source` by averaging its experts: the reverse of `upcycle`.

    What comes out can be opened, served, exported and trained further. Selection biases and prediction modules are
    left out, and what is merged is written in float32.

    Args:
        source: a run, a checkpoint of one, an imported or a Hugging Face folder; never written to.
        out: folder to make; it appears when all is done.
        load: what weighs experts and groups, as in `read_loads`; None: all alike.
        quiet: no progress on stderr.
        options: of `MergingConfig`.

    Raises:
        ConfigError: the model is dense, or cannot be merged so; `load` is no load of its experts.
        CheckpointError: there is nothing to open, or `out` exists.
        RunError: the disk is full or unwritable, or `load` cannot be read.
    """
    source, config = Path(source), parse(MergingConfig, options, "upcycle --reverse")
    if kind_of(source) == "gguf":
        raise ConfigError(f"{source} is a GGUF file: `finemoe import {source} DIR`, then merge DIR")
    place = check_free(Path(out))
    mixture = read_model_config(source)
    dense = densified_config(mixture, config)
    loads = None if load is None else read_loads(Path(load))
    if loads is not None:
        _check_loads(loads, mixture, Path(str(load)))
    kept = load_model(source, dtype=None)
    types = {name: tensor.dtype for name, tensor in kept.state_dict().items()}
    model = kept.float()
    specs = [TensorSpec(name, types.get(name, torch.float32), shape) for name, shape in model_shapes(dense).items()]
    dtypes = {spec.name: spec.dtype for spec in specs}
    made = ((name, tensor.to(dtypes[name])) for name, tensor in merge_weights(model, config, loads))
    weighed = None if loads is None else {str(layer): one.tolist() for layer, one in loads.items()}
    how = {**config.model_dump(mode="json"), "load": weighed}
    write_derived(source, place, dense, specs, made, "densified", how, quiet=quiet)
    return Densified(place, dense, gate_sums(model), *compare(model, load_model(place)))
