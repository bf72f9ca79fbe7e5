"""Where config.json and the weights contradict each other the weights decide, and a sentence says so.

A flag is easily edited away, or left behind by a fine-tuning; the tensors are what was trained. What is settled here is
read by the family's own reader, from a config.json that says what the weights hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finemoe.checkpoint.huggingface import keys as hf_keys
from finemoe.checkpoint.huggingface.accounting import split_copies
from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TIED, _VOCABULARY = "tie_word_embeddings", "vocab_size"
_MODULES, _MODULES_TOO = "num_nextn_predict_layers", "num_mtp_layers"
_MODULE = ("enorm.weight", "hnorm.weight", "eh_proj.weight")


@dataclass(frozen=True)
class Settled:
    """A config.json read beside the weights that it describes."""

    config: ModelConfig
    notes: tuple[str, ...]
    """As the family's reader leaves them."""
    warnings: tuple[str, ...]
    """Where the weights said otherwise."""
    aside: Mapping[str, str]
    """Tensors that no model of the family uses, though they are none of its unknown ones -> why."""


def settle_by(family: Family, raw: Mapping[str, Any], tensors: TensorFolder) -> tuple[TensorFolder, Settled]:
    """The tensors that count, and the model of `raw` as they have it.

    What an index leaves out is taken where the model needs it. Reads no more than embedding and head, where they should
    be one.

    Raises:
        CheckpointError: as `Family.read`.
    """
    if tensors.unlisted:
        wanted, _, _ = split_copies(family.placements(family.to_config(raw)))
        tensors = tensors.listed(wanted)

    rows = _rows(tensors)

    def own_head() -> bool:
        return not (tensors.info(EMBEDDING).shape == tensors.info(HEAD).shape and tensors.equal(EMBEDDING, HEAD))

    return tensors, settle(family, raw, tensors.tensors.keys(), own_head, rows)


def _rows(tensors: TensorFolder) -> int | None:
    """How many tokens embedding and head have; None where they are not there, or not of one size."""
    shapes = [tensors.info(name).shape for name in (EMBEDDING, HEAD) if name in tensors.tensors]
    return shapes[0][0] if shapes and len(shapes[0]) == 2 and len(set(shapes)) == 1 else None


def settle(
    family: Family,
    raw: Mapping[str, Any],
    names: Collection[str],
    own_head: Callable[[], bool],
    rows: int | None = None,
) -> Settled:
    """The model of `raw` as weights have it.

    Args:
        family: that `raw` names.
        raw: config.json.
        names: of all tensors.
        own_head: whether embedding and head, both there, hold different numbers; asked only where they should not.
        rows: of embedding and head; None where they do not tell.

    Raises:
        CheckpointError: as `Family.read`.
    """
    understood = family.read(raw)
    if not names:
        return Settled(understood.config, understood.notes, understood.warnings, {})
    changed = dict(raw)
    warnings = [*_switches(family, changed, names), *_head(understood.config, changed, names, own_head)]
    said = understood.config.vocab_size
    if (
        rows and rows != said and said <= 2 * rows and rows <= 2 * said
    ):  # a figure beyond all reason is damage, and refused
        changed[_VOCABULARY] = rows
        warnings.append(f"config.json: `{_VOCABULARY}` is {said}, and the weights have {rows} tokens: read as {rows}")
    warnings += _modules(family, understood.config, changed, names)
    aside = {}
    if changed != dict(raw):
        understood = family.read(changed)
    layers = len(understood.config.blocks)
    if family.modules:
        lost = hf_keys.modules_after(names, layers + len(understood.config.mtp))
        aside = dict.fromkeys(lost, "part of a prediction module that is not whole, and that config.json does not name")
        if aside:
            warnings.append(
                f"a prediction module after layer {layers - 1} is not whole: its {len(aside)} tensors are left aside"
            )
    return Settled(understood.config, understood.notes, (*understood.warnings, *warnings), aside)


def _head(
    config: ModelConfig, changed: dict[str, Any], names: Collection[str], own_head: Callable[[], bool]
) -> Iterator[str]:
    if config.tie_embeddings and {EMBEDDING, HEAD} <= set(names) and own_head():
        changed[_TIED] = False
        yield f"config.json says that embedding and head are tied, and the weights hold a {HEAD} of its own: it is used"
    elif not config.tie_embeddings and EMBEDDING in names and HEAD not in names:
        changed[_TIED] = True
        yield f"config.json does not tie embedding and head, and the weights hold no {HEAD}: the embedding is the head"


def _switches(family: Family, changed: dict[str, Any], names: Collection[str]) -> Iterator[str]:
    """Flags that say whether tensors exist."""
    for name, tensor in family.switches.items():
        said = bool(changed.get(name, family.defaults.get(name, False)))
        there = any(key.startswith("model.layers.") and key.endswith(f".{tensor}") for key in names)
        if said != there:
            changed[name] = there
            yield (
                f"config.json: `{name}` is {str(said).lower()}, and the weights hold "
                f"{tensor if there else f'no {tensor}'}: read as {str(there).lower()}"
            )


def _modules(family: Family, config: ModelConfig, changed: dict[str, Any], names: Collection[str]) -> Iterator[str]:
    """Prediction modules, announced and absent or the other way round."""
    layers, announced = len(config.blocks), len(config.mtp)
    kept, notes = hf_keys.without_absent_mtp(config, names)
    present = len(kept.mtp)
    if notes:
        yield notes[0]
    elif family.modules:
        while any(f"model.layers.{layers + present}.{part}" in names for part in _MODULE):
            present += 1
        while present > announced and not _whole(family, changed, present, names):
            present -= 1
        if present > announced:
            yield (
                f"config.json announces {announced or 'no'} multi-token prediction module(s), and the weights hold "
                f"{present}: they are read"
            )
    if present != announced:
        changed.pop(_MODULES_TOO, None)
        changed[_MODULES] = present


def _whole(family: Family, raw: Mapping[str, Any], count: int, names: Collection[str]) -> bool:
    """Whether all tensors of `count` prediction modules are there."""
    more = {key: value for key, value in raw.items() if key != _MODULES_TOO} | {_MODULES: count}
    try:
        config = family.to_config(more)
    except CheckpointError:
        return False
    loaded, _, _ = split_copies(family.placements(config))
    first = len(config.blocks)
    wanted = hf_keys.modules_after(loaded, first)
    return all(name in names for name in wanted)
