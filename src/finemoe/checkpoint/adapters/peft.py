"""Low-rank adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

Names are those of the modules that transformers 5 has. The experts of a layer are two stacked parameters there. PEFT
adapts a parameter by wrapping its module, and the second by wrapping the wrapper, so that the first, gate_up_proj, is
named by `base_layer`. Of `[experts, out, in]` the factors are A `[experts · rank, in]`, expert by expert, and B `[out,
rank · experts]`, rank by rank. All have one rank: smaller ones are filled up with zeros. PEFT before 0.19 had the
factors of experts transposed, so the file says which version it was checked with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from finemoe.checkpoint.adapters.low_rank import LowRank
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig

PEFT_VERSION = "0.21.2"
"""That the tests compare with."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B, _INNER = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".base_layer"
_STACK = re.compile(r"blocks\.(\d+)\.feed_forward\.experts\.(gate_up_proj|down_proj)")
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts(\.base_layer)?")
# PEFT takes modules of these names for parts of experts in families that have experts, wherever they stand; the
# parameters of shared experts and dense layers are named instead, whose keys are the same.
_TAKEN_FOR_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")
_WITHOUT_EXPERTS = ("llama", "mistral", "qwen2", "qwen3")
_CHANGES_NOTHING = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "peft_type", "peft_version", "r", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "megatron_core", "loftq_config", "ensure_weight_tying", "layers_pattern",
    "layers_to_transform", "qalora_group_size",
}  # fmt: skip

_BEGINS_WITH_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways of drawing the factors that leave the base as it is; others take from it what the factors begin with."""


@dataclass(frozen=True)
class Change:
    """A merge that a file asks for: `ours[index] + scale · b @ a`."""

    ours: str
    index: tuple[int | slice | Tensor, ...]
    """Where in the tensor; () is the whole of it. Experts of a stack are changed together, as training changed them."""
    a: Tensor
    b: Tensor
    scale: float


def to_peft(
    config: ModelConfig, family: Family, adapters: Sequence[LowRank], alpha: float
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """adapter_config.json, the tensors by their keys, and what is left out, in words.

    Args:
        config: of the model.
        family: whose modules are named.
        adapters: of the run.
        alpha: theirs: each counts alpha / its rank.

    Raises:
        CheckpointError: the family has no such module, or its class has no stacked experts.
    """
    rank = max(one.rank for one in adapters)
    places = {one.ours: one.theirs for one in reversed(family.placements(config)) if not one.index}
    shapes = model_shapes(config)
    weights = sorted({one.weight for one in adapters if not one.weight.startswith("mtp.")})
    modules: list[str] = []
    parameters: list[str] = []
    tensors: dict[str, Tensor] = {}
    for weight in weights:
        own = [_of_rank(one, rank) for one in adapters if one.weight == weight]
        if match := _STACK.fullmatch(weight):
            if not family.native:
                raise _no_module(family, weight)
            module = f"model.layers.{match[1]}.mlp.experts"
            parameters.append(f"{module}.{match[2]}")
            inner = match[2] == "gate_up_proj" and weight.replace("gate_up_proj", "down_proj") in weights
            key = _PREFIX + module + _INNER * inner
            tensors[key + _A], tensors[key + _B] = _stacked(own, shapes[weight][0])
            continue
        if weight not in places:
            raise _no_module(family, weight)
        module = places[weight].removesuffix(".weight")
        if module.endswith(_TAKEN_FOR_EXPERTS) and family.name not in _WITHOUT_EXPERTS:
            parameters.append(f"{module}.weight")
        else:
            modules.append(module)
        tensors[_PREFIX + module + _A], tensors[_PREFIX + module + _B] = own[0].a, own[0].b
    left = len({one.weight for one in adapters}) - len(weights)
    notes = (f"{left} adapters of prediction modules, which transformers does not compute",) if left else ()
    if not weights:
        raise CheckpointError(f"nothing is left to write but {notes[0] if notes else 'no adapter'}")
    return _config(rank, alpha, modules, parameters), tensors, notes


def _no_module(family: Family, weight: str) -> CheckpointError:
    why = f"the class of {family.name} has no module for {weight}"
    if not family.native:
        why = f"transformers has no class of its own for {family.name}, where PEFT would look for {weight}"
    known = ", ".join(name for name, one in FAMILIES.items() if one.native)
    return CheckpointError(
        f"{why}: a PEFT folder can be written of models of {known}. The merged model can be exported all the same: "
        "`finemoe export RUN OUT`, without --adapter"
    )


def _of_rank(one: LowRank, rank: int) -> LowRank:
    """Filled up with zeros, and B as much larger as the factor of `rank` is smaller than its own."""
    missing = rank - one.rank
    b = one.b if not missing else one.b * (rank / one.rank)
    return LowRank(one.weight, pad(one.a, (0, 0, 0, missing)), pad(b, (0, missing)), one.experts)


def _stacked(parts: Sequence[LowRank], experts: int) -> tuple[Tensor, Tensor]:
    """Both factors of all experts; zeros for those that have none."""
    a = parts[0].a.new_zeros(experts, *parts[0].a.shape[1:])
    b = parts[0].b.new_zeros(experts, *parts[0].b.shape[1:])
    for one in parts:
        a[one.experts], b[one.experts] = one.a, one.b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()


def _config(rank: int, alpha: float, modules: list[str], parameters: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "use_dora": False,
        "use_rslora": False,
    }


def from_peft(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], config: ModelConfig, family: Family, where: str
) -> list[Change]:
    """What an adapter changes in a model of this configuration, whoever trained it.

    Args:
        raw: adapter_config.json.
        tensors: by key.
        config: of the model.
        family: whose modules are named.
        where: the folder, as messages name it.

    Raises:
        CheckpointError: a setting that changes the function and is not known here, or a tensor that has no place.
    """
    scale = _scale(raw, where)
    places = {one.theirs: one for one in reversed(family.placements(config))}
    shapes = model_shapes(config)
    changes: list[Change] = []
    for key in sorted(name for name in tensors if name.endswith(_A)):
        module = key.removeprefix(_PREFIX).removesuffix(_A)
        a, b = tensors[key].float(), tensors.get(key.removesuffix(_A) + _B)
        if b is None:
            raise CheckpointError(f"{where}: {key} has no lora_B; the file is not whole")
        place = places.get(f"{module}.weight")
        if place is not None and a.shape[1:] + b.shape[:1] == place.shape[::-1] and len(a) == b.shape[1]:
            changes.append(Change(place.ours, place.index, a, b.float(), scale))
        elif (match := _EXPERTS.fullmatch(module)) is not None:
            wrapped = match[2] is not None or f"{_PREFIX}{module}{_INNER}{_A}" in tensors
            changes.append(_unstacked(match, wrapped, (a, b.float()), shapes, scale, where))
        else:
            raise CheckpointError(f"{where}: {key} fits no matrix of the model: it adapts another one")
    if 2 * len([key for key in tensors if key.endswith(_A)]) != len(tensors):
        odd = next(key for key in tensors if not key.endswith((_A, _B)) or key.replace(_B, _A) not in tensors)
        raise CheckpointError(f"{where}: {odd} is no factor of a low-rank adapter, and is not known here")
    return changes


def _scale(raw: Mapping[str, Any], where: str) -> float:
    """alpha / r, where nothing else is said."""
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {raw.get('peft_type')!r}, and LORA is what can be merged here")
    odd = [key for key, value in raw.items() if key not in _CHANGES_NOTHING and value and value != "none"]
    if raw.get("init_lora_weights", True) not in _BEGINS_WITH_THE_BASE:
        odd.append("init_lora_weights")
    if odd:
        raise CheckpointError(
            f"{where}: {odd[0]} {raw[odd[0]]!r} changes what the adapter does, and is not known here; merge it in PEFT"
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}: both must be numbers, r 1 or more")
    return float(alpha) / rank


def _unstacked(
    match: re.Match[str],
    wrapped: bool,
    factors: tuple[Tensor, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    scale: float,
    where: str,
) -> Change:
    """All experts of a stack that have an adapter; which stack it is follows from who wraps whom, or from the shape."""
    stacks = [f"blocks.{match[1]}.feed_forward.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    if wrapped:
        stacks = stacks[:1] if match[2] is not None else stacks[1:]
    a, b = factors
    for ours in stacks:
        if ours not in shapes:
            continue
        experts, outer, inner = shapes[ours]
        if (a.shape[1], b.shape[0]) != (inner, outer) or len(a) % experts or len(a) != b.shape[1]:
            continue
        rows = a.reshape(experts, -1, inner)
        columns = b.reshape(outer, -1, experts).permute(2, 0, 1)
        adapted = columns.flatten(1).any(dim=1).nonzero().flatten()
        return Change(ours, (adapted,), rows[adapted], columns[adapted].contiguous(), scale)
    raise CheckpointError(
        f"{where}: the factors {list(a.shape)} and {list(b.shape)} of layer {match[1]} fit no stack of experts of the "
        "model: it has other sizes, or the adapter is of PEFT before 0.19, which had them transposed"
    )
