"""What can be exported: an imported folder, or the newest checkpoint of a run, opened by headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finemoe.checkpoint.kinds import CONFIG, is_imported
from finemoe.checkpoint.own_config import model_of
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.storage.untrusted import TOKENIZER_BYTES, folder_file, parse_json, read_bytes, read_json
from finemoe.checkpoint.weights.imported import DATA, read_imported
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import formats_in, small_shape
from finemoe.core.errors import CheckpointError, named
from finemoe.model.config import ModelConfig
from finemoe.model.quantised.blocks import Format
from finemoe.text import Tokenizer, exported_tokenizer_config
from finemoe.text.files import COMPANIONS

_TOKENIZER, _TOKENIZER_CONFIG, _GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"


@dataclass(frozen=True)
class Exportable:
    """Where an export starts, an import or a run alike: tensors under our names, all that the model needs.

    Beside them is what a foreign format asks for: text files ready to be written, ids, and what an import knew.
    """

    path: Path
    config: ModelConfig
    tensors: TensorFolder
    companions: Mapping[str, bytes]
    """Tokenizer and generation files, as they are to be written."""
    notes: tuple[str, ...]
    family: str | None = None
    """What it was imported from; None for a run."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the Hugging Face folder that was imported; empty where it was none."""
    account: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of that folder's tensors, by name: status, dtype ..."""
    carried: TensorFolder = field(default_factory=lambda: TensorFolder({}))
    max_positions: int | None = None
    """Sequence length of the training."""
    small: Mapping[str, Format] = field(default_factory=dict)
    """The formats of tensors that are blocks of few bits."""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    """`bos_token_id`, `eos_token_id`, `pad_token_id`, where known."""


def open_exportable(path: Path) -> Exportable:
    """Open an imported folder, a run directory or one checkpoint of a run.

    Raises:
        CheckpointError: none of these, or damaged.
    """
    opened = _open_imported(path) if is_imported(path) else _open_run(path)
    with named(path):
        shapes = model_shapes(opened.config)
        bytes_of = {name: info.shape for name, info in opened.tensors.tensors.items() if info.dtype is torch.uint8}
        small = formats_in(bytes_of)
        shapes |= {name: small_shape(name, shapes[name], kind) for name, kind in small.items() if name in shapes}
    found = {name: info.shape for name, info in opened.tensors.tensors.items()}
    if shapes != found:
        name = min(name for name in {**shapes, **found} if shapes.get(name) != found.get(name))
        raise CheckpointError(
            f"{path}: the weights do not fit the configuration: {name} is {_shape(found.get(name))} "
            f"instead of {_shape(shapes.get(name))}"
        )
    return replace(opened, small=small)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _open_imported(path: Path) -> Exportable:
    imported = read_imported(path)
    source = imported.source()
    from_hub = imported.format == "huggingface"
    files = {
        name: folder_file(path, name) for name in COMPANIONS if (path / name).is_symlink() or (path / name).exists()
    }
    companions = {name: read_bytes(file, TOKENIZER_BYTES) for name, file in files.items()}
    notes = _mend_tokenizer_config(companions, path)
    known = {
        **source["config"],
        **(parse_json(companions[_GENERATION], _GENERATION) if _GENERATION in companions else {}),
    }
    return Exportable(
        path=path,
        config=imported.config,
        tensors=imported.tensors,
        companions=companions,
        notes=notes,
        family=imported.family,
        raw=source["config"] if from_hub else {},
        account=source["tensors"] if from_hub else {},
        carried=imported.carried,
        max_positions=_length(imported.data),
        token_ids={key: known[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in known},
    )


def _mend_tokenizer_config(companions: dict[str, bytes], path: Path) -> tuple[str, ...]:
    """Name the class that reads tokenizer.json as it is; verbatim where it is named already."""
    if _TOKENIZER_CONFIG not in companions:
        return ()
    old = parse_json(companions[_TOKENIZER_CONFIG], str(path / _TOKENIZER_CONFIG))
    new = exported_tokenizer_config(old)
    if new == old:
        return ()
    companions[_TOKENIZER_CONFIG] = _json(new)
    was, now = old.get("tokenizer_class"), new.get("tokenizer_class")
    return (f"{_TOKENIZER_CONFIG}: tokenizer_class {was} is now {now}, which reads tokenizer.json as it is",)


def _open_run(path: Path) -> Exportable:
    folder = run_state.newest_checkpoint(path)
    raw = read_json(folder_file(folder, CONFIG))
    config = model_of(raw, folder / CONFIG)
    tensors = run_state.open_part(folder, run_state.MODEL)
    homes = [home for home in (path, *path.absolute().parents[:2]) if (home / _TOKENIZER).exists()]
    companions, ids = _tokenizer_of_run(homes[0]) if homes else ({}, {})
    notes = () if homes else (f"{path}: no {_TOKENIZER} beside the run, so none is written",)
    return Exportable(path, config, tensors, companions, notes, max_positions=_length(raw.get(DATA)), token_ids=ids)


def _length(data: Any) -> int | None:
    """Of the sequences of a run, by its data table."""
    length = data.get("sequence_length") if isinstance(data, Mapping) else None
    return length if type(length) is int and length > 0 else None


def _tokenizer_of_run(home: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """tokenizer.json as it is, and the files beside it that others look for."""
    tokenizer = Tokenizer.load(home)
    end = tokenizer.end_of_text_id
    name = tokenizer.token_bytes[end].decode("utf-8", errors="replace")
    companions = {
        name: read_bytes(folder_file(home, name), TOKENIZER_BYTES) for name in COMPANIONS if (home / name).exists()
    }
    companions.setdefault(_TOKENIZER_CONFIG, _json(exported_tokenizer_config({"eos_token": name})))
    companions.setdefault(_GENERATION, _json({"eos_token_id": end}))
    return companions, {"eos_token_id": end}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
