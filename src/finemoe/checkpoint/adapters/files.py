"""Adapters on disk: writing what a run tuned, and merging it into a base again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from finemoe.checkpoint.adapters.delta import DELTA, DELTA_WEIGHTS, DeltaConfig, apply_delta, to_delta
from finemoe.checkpoint.adapters.low_rank import merged, read_low_rank
from finemoe.checkpoint.adapters.origin import base_of_run
from finemoe.checkpoint.adapters.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, from_peft, to_peft
from finemoe.checkpoint.adapters.tuned import Base, open_tuned
from finemoe.checkpoint.huggingface.exporting import choose_family
from finemoe.checkpoint.huggingface.families import FAMILIES, representable_as
from finemoe.checkpoint.huggingface.importing import companion_of
from finemoe.checkpoint.kinds import is_imported, kind_of
from finemoe.checkpoint.open import load_model, load_tokenizer, text_home
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.store import write_file, writing
from finemoe.checkpoint.storage.streaming import write_tensors
from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.checkpoint.storage.workspace import check_apart, check_free, fingerprint, workspace
from finemoe.checkpoint.weights.exportable import open_exportable
from finemoe.checkpoint.weights.imported import ImportedWriter, read_imported
from finemoe.core.config import Config, parse
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.core.logs import logger, progress
from finemoe.core.reading import damage_of
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.text.files import COMPANIONS, leads_out

ABOUT = "finemoe.json"
"""Beside PEFT's files, which PEFT does not look at: what they belong to."""
TOKENIZER = "tokenizer.json"
_MEND = "write the adapter again"


class About(Config):
    """finemoe.json."""

    base: Base
    family: str
    """Hugging Face model_type whose modules are named."""


def export_adapter(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, family: str | None = None
) -> dict[str, Any]:
    """Write what a run tuned, without the model that it tuned.

    Args:
        source: a run with trainable.kind "lora", which becomes a folder for PEFT, or "experts", which becomes a delta;
            or one checkpoint of it. Never written to.
        out: folder to make.
        family: Hugging Face model_type for PEFT; None: the first that fits the model.

    Returns:
        What `finemoe export --adapter --json` prints.

    Raises:
        ConfigError: `family` for a delta, which has none.
        CheckpointError: no such run, its model is not of that family, or `out` exists; nothing was written.
        RunError: the disk is full or unwritable.
    """
    check_apart(source := Path(source), out)
    place, tuned = check_free(Path(out)), open_tuned(source)
    model = run_state.load_model(tuned.folder)
    notes: tuple[str, ...] = ()
    small: dict[str, Any]
    if tuned.kind == "experts":
        if family is not None:
            raise ConfigError(f"--family {family}: {source} becomes a delta, which is of no family; leave it out")
        experts, tensors = to_delta(tuned)
        delta = DeltaConfig(base=base_of_run(tuned, model, tensors), experts=experts)
        small, weights, form = {DELTA: delta.model_dump(mode="json")}, DELTA_WEIGHTS, "delta"
    else:
        name = choose_family(open_exportable(tuned.folder), family)
        if family is not None and (refusal := representable_as(tuned.config)[name]) is not None:
            raise CheckpointError(f"--family {family}: {refusal}")  # its class would have none of these modules
        adapters = read_low_rank(tuned.tensors)
        raw, tensors, notes = to_peft(tuned.config, FAMILIES[name], adapters, tuned.values["alpha"])
        small, weights, form = {ADAPTER_CONFIG: raw}, ADAPTER_WEIGHTS, "peft"
        small[ABOUT] = About(base=base_of_run(tuned, model, None), family=name).model_dump(mode="json")
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    mark = fingerprint("export-adapter", [], {}, [str(tuned.folder.resolve()), family])
    with workspace(place, mark, nbytes, tensors=len(tensors)) as folder:
        with writing(folder / weights):
            write_tensors(folder / weights, tensors)
        for file, table in small.items():
            write_file(folder / file, (json.dumps(table, indent=2) + "\n").encode())
        for file, data in _companions(text_home(tuned.folder)).items():
            write_file(folder / file, data)
    count = sum(tensor.numel() for tensor in tensors.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "source": str(source),
        "format": form,
        "family": None if form == "delta" else name,
        "tensors": len(tensors),
        "parameters": count,
        "share": count / total,
        "bytes": nbytes,
        "notes": list(notes),
        "path": str(place),
    }


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make the model that an adapter makes of a base; `out` can be used, trained further and exported.

    What the adapter changes is written in float32, whatever the base has: rounded it would be another model.

    Args:
        base: a run, a checkpoint of one, an imported or a Hugging Face folder; never written to.
        adapter: a folder of `export_adapter`, or of PEFT.
        out: folder to make; it appears when all is done.
        quiet: no progress on stderr.

    Returns:
        What `finemoe merge --json` prints.

    Raises:
        ConfigError: the base is a GGUF file.
        CheckpointError: nothing to open, the adapter is of another model, or `out` exists; nothing was written.
        RunError: the disk is full or unwritable.
    """
    base, adapter = Path(base), Path(adapter)
    if kind_of(base) == "gguf":
        raise ConfigError(f"{base} is a GGUF file: `finemoe import {base} DIR`, then merge into DIR")
    for one in (base, adapter):
        check_apart(one, out)
    place = check_free(Path(out))
    form = _form(adapter)
    model = load_model(base, dtype=None)
    weights = model.state_dict()
    changed = _changed(form, base, adapter, model, weights)
    specs = [
        TensorSpec(name, changed[name].dtype if name in changed else tensor.dtype, tuple(tensor.shape))
        for name, tensor in weights.items()
    ]
    nbytes = sum(spec.nbytes for spec in specs)
    mark = fingerprint("merge", [], {}, [str(base.resolve()), str(adapter.resolve())])
    with workspace(place, mark, nbytes, tensors=len(specs)) as folder, ImportedWriter(folder, specs, []) as writer:
        with nullcontext(lambda _: None) if quiet else progress("merging", len(specs), "tensors") as advance:
            for name, tensor in weights.items():
                writer.weights.write(name, changed.get(name, tensor))
                advance(1)
        _finish(writer, model.config, base, adapter)
    return {
        "base": str(base),
        "adapter": str(adapter),
        "format": form,
        "changed": len(changed),
        "tensors": len(specs),
        "bytes": nbytes,
        "path": str(place),
    }


def _finish(writer: ImportedWriter, config: ModelConfig, base: Path, adapter: Path) -> None:
    """The small files: the base's tokenizer and the like, how the adapter speaks, and where the weights came from."""
    tokenizer, home = load_tokenizer(base), text_home(base)
    files = {name: companion_of(home, name) for name in COMPANIONS if (home / name).exists()}
    files |= _companions(adapter)
    ends = {"eos_token_id": list(tokenizer.stop_ids)} if tokenizer.stop_ids else {}
    record = {"config": {"merged": {"base": str(base), "adapter": str(adapter)}, **ends}, "tensors": {}}
    about = {"family": "merged", "format": "merged"}
    writer.finish(_with_length(config, base), about, record, files, quiet=True)


def _companions(folder: Path) -> dict[str, bytes]:
    """What says how a tuned model speaks: chat template, ends of a generation. The tokenizer is the base's."""
    files: dict[str, bytes] = {}
    for name in COMPANIONS:
        if name == TOKENIZER or not (folder / name).exists():
            continue
        try:
            files[name] = companion_of(folder, name)
        except CheckpointError as error:
            if leads_out(folder, name):
                raise
            logger.warning("%s; left out: %s", error, COMPANIONS[name])
    return files


def _with_length(config: ModelConfig, base: Path) -> ModelConfig:
    """A run, made small or not, knows from its data how long a sequence may be; what is made of it, from its model."""
    if config.max_positions is not None or kind_of(base) not in ("run", "imported"):
        return config
    return config.model_copy(update={"max_positions": open_exportable(base).max_positions})


def _form(adapter: Path) -> str:
    if (adapter / DELTA).is_file():
        return "delta"
    if (adapter / ADAPTER_CONFIG).is_file():
        return "peft"
    raise CheckpointError(
        f"{adapter}: no adapter: it has neither {ADAPTER_CONFIG}, as PEFT writes, nor {DELTA}; `finemoe export RUN OUT "
        "--adapter` makes one"
    )


def _changed(
    form: str, base: Path, adapter: Path, model: Transformer, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that differ from the base's, whole and in float32."""
    file = folder_file(adapter, DELTA_WEIGHTS if form == "delta" else ADAPTER_WEIGHTS)
    with damage_of(file, _MEND, CheckpointError):
        tensors = load_file(file)
    if form == "delta":
        delta = parse(DeltaConfig, read_json(folder_file(adapter, DELTA)), str(adapter / DELTA))
        delta.base.require(model, str(adapter), base)
        return apply_delta(tensors, weights, str(adapter))
    about = None
    if (adapter / ABOUT).exists():
        about = parse(About, read_json(folder_file(adapter, ABOUT)), str(adapter / ABOUT))
        about.base.require(model, str(adapter), base)
    else:
        logger.warning("%s does not say which model it tuned: whether %s is that one is not known", adapter, base)
    family = FAMILIES[_family_of(base, about)]
    raw = read_json(folder_file(adapter, ADAPTER_CONFIG))
    changed: dict[str, Tensor] = {}
    for one in from_peft(raw, tensors, model.config, family, str(adapter)):
        if one.ours not in changed:
            changed[one.ours] = weights[one.ours].float().clone()
        whole = changed[one.ours]
        whole[one.index] = merged(whole[one.index], one.a, one.b, one.scale)
    return changed


def _family_of(base: Path, about: About | None) -> str:
    """Whose modules an adapter names: it says so itself, or it is of the kind that its base is."""
    if about is not None and about.family in FAMILIES:
        return about.family
    kind = kind_of(base)
    if kind == "huggingface":
        return str(read_json(folder_file(base, "config.json"))["model_type"])
    if is_imported(base) and read_imported(base).family in FAMILIES:
        return read_imported(base).family
    return choose_family(open_exportable(base), None)
