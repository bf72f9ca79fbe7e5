"""Opening a model, its configuration, its tokenizer or its chat template, whatever the path holds.

A run directory or one checkpoint of it, an imported folder, a Hugging Face folder or a GGUF file: the rest of finemoe
asks here and need not know which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from finemoe.checkpoint.gguf import opening as gguf
from finemoe.checkpoint.huggingface.accounting import our_dtype
from finemoe.checkpoint.huggingface.families import family_of
from finemoe.checkpoint.huggingface.importing import Source, open_source
from finemoe.checkpoint.kinds import CONFIG, STATE, kind_of
from finemoe.checkpoint.own_config import model_of
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.storage.memory import mapped
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.checkpoint.weights.build import Part, build, fitting_shapes, one_by_one
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.checkpoint.weights.small import BF16, Bits, as_stored, formats_for, formats_in
from finemoe.core.errors import CheckpointError, ConfigError, named
from finemoe.core.logs import logger
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.text.chat import ChatTemplate
from finemoe.text.tokenizer import Tokenizer


def load_model(
    path: str | os.PathLike[str],
    kernels: Kernels | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    small: Bits | Literal["stored"] | None = None,
) -> Transformer:
    """The model at `path`, in eval mode.

    Args:
        path: a run (its newest undamaged checkpoint), a checkpoint, an imported folder, a Hugging Face folder or a
            GGUF file.
        kernels: how to compute.
        dtype: of the weights; None keeps what is stored (FP8 becomes bf16). Routers are float32 all the same.
        small: large products in blocks of few bits, made while they are read, or those that are stored so, in bfloat16
            too; all else is float32, and nothing can be learnt. In a folder of ours they are then mapped, not read.

    Raises:
        CheckpointError: nothing to open, damaged, or not exactly representable.
        ConfigError: `small` and another `dtype`, or a number that no block can hold.
    """
    path = Path(path)
    kind = kind_of(path)
    if small is not None:
        if dtype is not torch.float32:
            raise ConfigError(f"dtype={dtype} with small={small!r}: what is not small is float32, leave dtype out")
        return _load_small(path, kind, kernels, small)
    if kind == "run":
        return run_state.load_model(path, kernels, dtype=dtype)
    config, stored, parts = parts_of(path, kind)
    return build(config, kernels, _numbers(stored), parts, dtype)


def _load_small(path: Path, kind: str, kernels: Kernels | None, small: Bits | Literal["stored"]) -> Transformer:
    if small == "stored" and kind == "gguf":
        file = gguf.open_gguf(path)
        _warn(file.warnings)
        formats = file.formats()
        lying = file.lying(formats)
        stored = file.dtypes() | dict.fromkeys(lying, torch.uint8)
        return build(file.config, kernels, stored, file.parts(formats, lying), torch.float32, formats)
    if small == "stored" and kind == "imported":
        return _mapped(path, kernels)
    config, found, parts = parts_of(path, kind)
    formats = as_stored(found) if small == "stored" else formats_for(small, found)
    if formats and stored_small(path):
        logger.warning("%s has products in blocks already, which are rounded a second time: auto keeps them", path)
    return build(config, kernels, _numbers(found), parts, torch.float32, formats)


def _mapped(path: Path, kernels: Kernels | None) -> Transformer:
    """An imported folder with its blocks where they lie, and bfloat16 in whole blocks."""
    imported = read_imported(path)
    infos = imported.tensors.tensors
    stored = {name: info.dtype for name, info in infos.items()}
    formats = formats_in({name: info.shape for name, info in infos.items() if info.dtype is torch.uint8})
    halves = as_stored(stored)
    whole = {name for name, kind in halves.items() if infos[name].shape[-1] % kind.size == 0 and not infos[name].pieces}
    lying = mapped(infos[name] for name in (*formats, *whole))
    lying |= {name: lying[name].unflatten(-1, (-1, halves[name].bytes)) for name in whole}
    as_they_lie = ((name, (), lying[name] if name in lying else imported.tensors.read(name)) for name in infos)
    with named(path):
        return build(
            imported.config, kernels, stored | dict.fromkeys(whole, torch.uint8), as_they_lie, torch.float32,
            formats | halves,
        )  # fmt: skip


def _numbers(stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Of blocks of bytes the type of what they stand for."""
    return {name: torch.float32 if kind is torch.uint8 else kind for name, kind in stored.items()}


def stored_in_halves(path: str | os.PathLike[str]) -> bool:
    """Whether large products of the model at `path` are stored in bfloat16, of a GGUF file in whole blocks; only
    headers are read.

    Raises:
        CheckpointError: nothing to open, or damaged.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "gguf":
        return BF16 in gguf.open_gguf(path).formats().values()
    return bool(as_stored(types_of(path, kind)[1]))


def stored_small(path: str | os.PathLike[str]) -> bool:
    """Whether large products of the model at `path` are stored in blocks of few bits that are multiplied by as they
    are; only headers are read. Bfloat16 is none: nothing is lost that would be rounded a second time.

    Raises:
        CheckpointError: nothing to open, or damaged.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "gguf":
        return any(one != BF16 for one in gguf.open_gguf(path).formats().values())
    if kind != "imported":
        return False
    return any(info.dtype is torch.uint8 for info in read_imported(path).tensors.tensors.values())


def load_tensors(path: str | os.PathLike[str]) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The model at `path` as `load_model` would fill it, in float32, one whole tensor after the other.

    Raises:
        CheckpointError: as `load_model`, some of it only when a tensor's turn comes.
    """
    path = Path(path)
    config, stored, parts = parts_of(path, kind_of(path))
    return config, one_by_one(fitting_shapes(config, stored), _numbers(stored), parts, torch.float32)


def parts_of(path: Path, kind: str) -> tuple[ModelConfig, Mapping[str, torch.dtype], Iterator[Part]]:
    """What is stored there: of what model, in which types, and every part of it when its turn comes."""
    config, stored, parts, warnings = _opened(path, kind)
    _warn(warnings)
    return config, stored, parts


def types_of(path: Path, kind: str) -> tuple[ModelConfig, Mapping[str, torch.dtype]]:
    """What is stored there, by headers alone: of what model, and in which types. Warnings are left to who opens it."""
    return _opened(path, kind)[:2]


def _opened(path: Path, kind: str) -> tuple[ModelConfig, Mapping[str, torch.dtype], Iterator[Part], Sequence[str]]:
    """As `parts_of`, and what is to be warned of."""
    if kind == "gguf":
        file = gguf.open_gguf(path)
        return file.config, file.dtypes(), file.parts(), file.warnings
    if kind in ("run", "imported"):
        if kind == "run":
            config, tensors = run_state.open_weights(path)
        else:
            imported = read_imported(path)
            config, tensors = imported.config, imported.tensors
        return config, {name: info.dtype for name, info in tensors.tensors.items()}, _own_parts(tensors), ()
    source = open_source(path)
    stored: dict[str, torch.dtype] = {}
    for name, placement in source.account.loaded.items():
        found = our_dtype(source.tensors.info(name).dtype)
        stored[placement.ours] = torch.promote_types(stored.get(placement.ours, found), found)
    return source.config, stored, _foreign_parts(source), source.warnings


def _warn(warnings: Sequence[str]) -> None:
    for text in warnings:
        logger.warning("%s", text)


def _own_parts(tensors: TensorFolder) -> Iterator[Part]:
    for name in tensors.tensors:
        yield name, (), tensors.read(name)


def _foreign_parts(source: Source) -> Iterator[Part]:
    for name, placement in source.account.loaded.items():
        pieces = [value for _, value in source.values(name)]
        yield placement.ours, placement.index, pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def read_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of the model at `path`; no weights are read.

    Raises:
        CheckpointError, ConfigError: nothing to open, or not exactly representable.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "gguf":
        return gguf.open_gguf(path).config
    if kind == "huggingface":
        return open_source(path).config
    file = folder_file(path, CONFIG)
    return model_of(read_json(file), file)


def describe_model(path: str | os.PathLike[str]) -> ModelConfig:
    """The same, for what may have no weights: a config.json, alone or in its folder, or the header of a GGUF file.

    Weights that lie beside it, and can be read, have the last word, as they do when the model is opened; those that
    cannot are told in the log.

    Raises:
        CheckpointError, ConfigError: nothing that describes a model, or not exactly representable.
    """
    path = Path(path)
    if path.suffix.lower() == ".json" and path.is_file():
        if path.name == CONFIG:
            return describe_model(path.parent)
        raw = read_json(folder_file(path.parent, path.name))
        return family_of(raw).to_config(raw) if "model_type" in raw else model_of(raw, path)
    kind = kind_of(path)
    if kind == "gguf":
        return gguf.open_gguf(path, whole=False).config
    if kind != "huggingface":
        return read_model_config(path)
    try:
        return open_source(path).config
    except CheckpointError as error:
        raw = read_json(folder_file(path, CONFIG))
        with named(path):
            config = family_of(raw).to_config(raw)
        if any(path.glob("*.safetensors")):
            logger.warning("%s; what follows is of the config.json alone", error)
        return config


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that belongs to the model at `path`, or a `tokenizer.json` itself.

    Raises:
        DataError: there is none, or it is not readable.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return gguf.open_gguf(path).tokenizer()
    return Tokenizer.load(text_home(path))


def load_chat_template(path: str | os.PathLike[str]) -> ChatTemplate | None:
    """The chat template that belongs to the model at `path`; None when it has none.

    Raises:
        DataError: it is damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return gguf.open_gguf(path).chat_template()
    return ChatTemplate.load(text_home(path))


def text_home(path: Path) -> Path:
    """The folder that holds tokenizer and chat template: a checkpoint of a run lies two below it.

    Raises:
        CheckpointError: a checkpoint that was taken out of its run.
    """
    if (path / STATE).exists() and not (path / "tokenizer.json").exists():
        home = path.resolve().parent.parent
        if not (home / "tokenizer.json").exists():
            raise CheckpointError(
                f"{path} is a checkpoint of a run, and the tokenizer lies in the run's own folder: name the checkpoint "
                "there, or copy the whole run; a checkpoint that goes elsewhere is what `finemoe export` makes"
            )
        return home
    return path
