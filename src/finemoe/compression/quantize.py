"""Making a model small: large products in blocks of 8 or 4 bits, made part by part and written as they come."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finemoe.checkpoint.gguf.opening import open_gguf
from finemoe.checkpoint.gguf.tokenizer import companions_of
from finemoe.checkpoint.huggingface.importing import companion_of, open_source
from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.language_model import training_data
from finemoe.checkpoint.open import load_tokenizer, parts_of, stored_small, text_home
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.workspace import check_apart, check_free, fingerprint, workspace
from finemoe.checkpoint.weights.build import Part
from finemoe.checkpoint.weights.imported import ENDS, ImportedWriter, read_imported
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import BF16, formats_for, of_tensor, small_shape
from finemoe.core.errors import CheckpointError, ConfigError, named
from finemoe.core.logs import logger, progress
from finemoe.model.config import ModelConfig
from finemoe.model.quantised.blocks import Format, is_quantised
from finemoe.model.quantised.making import quantise
from finemoe.text.files import COMPANIONS

Few = Literal["int8", "int4", "stored"]
BITS: tuple[Few, ...] = ("int8", "int4", "stored")


def quantize(
    model: str | os.PathLike[str], out: str | os.PathLike[str], weights: Few = "int8", *, quiet: bool = False
) -> dict[str, Any]:
    """Make a folder of `model` with its large products in blocks of 8 or 4 bits, which opens where it lies.

    Blocks are those of GGUF's Q8_0 and Q4_0: 32 numbers of a row share a scale; or those of a GGUF file as they are, in
    finemoe's order, so that nothing is copied of a mixture larger than memory. Routers, norms and latents stay what
    they are, and words in and out keep 8 bits. One part of a tensor is held at a time. `out` is used, served and
    evaluated like any model; what is trained from it begins with the numbers that the blocks stand for.

    Args:
        model: a run, a checkpoint of one, an imported or a Hugging Face folder, a GGUF file; never written to.
        out: folder to make; it appears when all is done, and an interrupted call goes on where it was.
        weights: "int8" or "int4", or "stored" for the blocks of a GGUF file, of which no number changes.
        quiet: no progress on stderr.

    Returns:
        What `finemoe quantize --json` prints.

    Raises:
        ConfigError: `weights` is none of them, or "stored" of what has no blocks.
        CheckpointError: nothing to open, it is small already, `out` exists or ends in .gguf, a number that no block can
            hold, or the work that was interrupted had other weights; nothing is left behind.
        DataError: no tokenizer; nothing was written.
        RunError: the disk is full or unwritable.
    """
    started, model = time.monotonic(), Path(model)
    if weights not in BITS:
        raise ConfigError(f"weights must be one of {', '.join(BITS)}, not {weights!r}")
    kind = kind_of(model)
    place, files = _place(model, out, weights), _companions(model)
    source = run_state.newest_checkpoint(model) if kind == "run" else model  # a run may go on meanwhile
    config, stored, parts, formats, before = _opened(source, kind, weights)
    shapes = model_shapes(config)
    specs = [_spec(name, shape, stored[name], formats.get(name)) for name, shape in shapes.items()]
    numbers = sum(map(math.prod, shapes.values()))
    nbytes = sum(spec.nbytes for spec in specs)
    mark = fingerprint("quantize", _files(source, kind), [str(source.resolve()), weights, config.model_dump_json()])
    with workspace(place, mark, nbytes, tensors=len(specs)) as folder, ImportedWriter(folder, specs, []) as writer:
        with nullcontext(lambda _: None) if quiet else progress("quantising", numbers, "numbers") as advance:
            for name, index, tensor in parts:
                if writer.weights.facts(name, index) is None:
                    with named(model), of_tensor(name):
                        writer.weights.write(name, _made(tensor, formats.get(name), stored[name]), index)
                advance(math.prod(tensor.shape[:-2]) * shapes[name][-1] if is_quantised(tensor) else tensor.numel())
        made_of = {"quantised": {"model": str(model), "weights": weights}, **_ends(model, kind)}
        about, record = {"family": "quantised", "format": weights}, {"config": made_of, "tensors": {}}
        writer.finish(config, about, record, files, _data(model, kind), quiet=quiet)
    return {
        "source": str(model),
        "weights": weights,
        "tensors": len(specs),
        "small": len(formats),
        "bytes": nbytes,
        "bytes_before": before,
        "path": str(place),
        "seconds": time.monotonic() - started,
    }


def _opened(
    source: Path, kind: str, weights: Few
) -> tuple[ModelConfig, Mapping[str, torch.dtype], Iterator[Part], Mapping[str, Format], int]:
    """Of what model, in which types, every part of it when its turn comes, what becomes blocks of which format, and the
    bytes that all of it is."""
    if weights != "stored":
        config, stored, parts = parts_of(source, kind)
        nbytes = sum(_spec(name, shape, stored[name], None).nbytes for name, shape in model_shapes(config).items())
        return config, stored, parts, formats_for(weights, stored), nbytes
    file = open_gguf(source)
    for text in file.warnings:
        logger.warning("%s", text)
    formats = {name: one for name, one in file.formats().items() if one != BF16}  # a folder has its own element type
    nbytes = sum(file.tensors[name].nbytes for name in file.account)
    return file.config, file.dtypes(), file.parts(formats), formats, nbytes


def _made(tensor: Tensor, kind: Format | None, stored: torch.dtype) -> Tensor:
    if kind is None:
        return tensor.to(stored)
    return tensor if is_quantised(tensor) else quantise(tensor, kind)


def _place(model: Path, out: str | os.PathLike[str], weights: Few) -> Path:
    """Where the folder will be.

    Raises:
        ConfigError: there are no blocks to keep.
        CheckpointError: something is there, or there is nothing to make small.
    """
    check_apart(model, out)
    place = check_free(Path(out))
    if place.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{place}: quantize makes a folder, of which `finemoe export FOLDER {place.name}` makes a GGUF file: "
            "leave .gguf out"
        )
    if weights == "stored":
        if kind_of(model) != "gguf" or not stored_small(model):
            raise ConfigError(
                f"weights='stored' keeps the blocks of a GGUF file, and {model} has none of a format that is known: "
                "make them, with int8 or int4"
            )
    elif stored_small(model):
        keeps = ", or --weights stored, which keeps its blocks" if kind_of(model) == "gguf" else ""
        raise CheckpointError(
            f"{model} has products in blocks already and opens small as it is; rounding twice loses more: quantize the "
            f"model that it was made of, or, if there is none, what `finemoe import` makes of its GGUF file{keeps}"
        )
    return place


def _spec(name: str, shape: tuple[int, ...], stored: torch.dtype, kind: Format | None) -> TensorSpec:
    return (
        TensorSpec(name, stored, shape)
        if kind is None
        else TensorSpec(name, torch.uint8, small_shape(name, shape, kind))
    )


def _files(source: Path, kind: str) -> tuple[Path, ...]:
    """Those that hold the weights."""
    if kind == "run":
        return run_state.open_part(source, run_state.MODEL).files
    if kind == "imported":
        return read_imported(source).tensors.files
    return tuple(open_gguf(source).files) if kind == "gguf" else open_source(source).tensors.files


def _companions(model: Path) -> Mapping[str, bytes]:
    """Tokenizer, chat template and the like, as they are.

    Raises:
        DataError, CheckpointError: no tokenizer, or a damaged one.
    """
    load_tokenizer(model)
    if kind_of(model) == "gguf":
        file = open_gguf(model)
        return companions_of(file.metadata, str(file.path))[0]
    home = text_home(model)
    return {name: companion_of(home, name) for name in COMPANIONS if (home / name).exists()}


def _ends(model: Path, kind: str) -> dict[str, Any]:
    """The ends of texts that the model's own config.json names, beside those in its companions."""
    if kind in ("run", "gguf"):
        return {}
    known = read_imported(model).source()["config"] if kind == "imported" else open_source(model).raw
    return {key: known[key] for key in (ENDS,) if known.get(key) is not None}


def _data(model: Path, kind: str) -> dict[str, Any] | None:
    """What a run trained on, and how: by that its model is asked otherwise than a foreign one."""
    return training_data(model) or {"sequence_length": None} if kind == "run" else None
