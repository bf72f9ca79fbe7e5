"""What the model that a run begins with says of every answer: computed once, cached by content, saved with the run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.checkpoint.open import load_model
from finemoe.core.errors import DataError
from finemoe.core.files import replacing
from finemoe.core.logs import logger, progress
from finemoe.data.batch import PackedBatch
from finemoe.data.conversations.packing import Packer
from finemoe.methods.conversations import Conversations
from finemoe.methods.setting import Setting
from finemoe.model.logprobs import token_logprobs
from finemoe.model.transformer import Transformer
from finemoe.training.losses.coefficients import Places
from finemoe.training.method import Method, Saved

_VERSION = 2
_TOKENS = 8192  # per forward pass


@final
class Reference:
    """Log-probabilities of whole answers under the reference: a number each, NaN where nobody asks for it."""

    def __init__(self, data: Conversations, setting: Setting) -> None:
        """Of the items of `data` that the run reads, on both sides of the split; nothing is computed yet."""
        self._data, self._setting = data, setting
        self._cache = setting.data.cache
        self._sums = torch.full((data.offset + len(data.validation.stored), 2), torch.nan)

    def of(self, batch: PackedBatch) -> Tensor:
        """[documents] in nats, of the segments of `batch` in order."""
        return self._sums.to(batch.items.device)[batch.items].flatten()

    def added_to(self, method: Method[PackedBatch]) -> Method[PackedBatch]:
        """`method` that computes it before its first step, and saves it."""
        return replace(method, prepare=(*method.prepare, self.prepare), state={**method.state, "reference": self})

    @torch.no_grad()
    def prepare(self, model: Transformer, begins: bool) -> None:
        """Compute it with `model`, or find it in the cache; a run that goes on has saved it."""
        if begins:
            self._complete(model)

    def state(self) -> Saved:
        """The numbers."""
        return Saved({"logprobs": self._sums})

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """As saved; of pairs that only a longer run reads it is computed by the model that the run began with."""
        self._sums = saved.tensors["logprobs"].clone()
        if self._missing():
            assert self._setting.start_from is not None  # without one there would be no method on conversations
            self._complete(load_model(self._setting.start_from))

    def _needed(self) -> list[tuple[Packer, int, list[int]]]:
        """The rows of each side that the run reads, with the number of the side's first item."""
        data = self._data
        held = [number for one in data.validated for number in one]
        return [(data.train, 0, data.train.served(self._setting.positions)), (data.validation, data.offset, held)]

    def _missing(self) -> list[tuple[Packer, int, list[int]]]:
        """Those of them that nothing is known of yet."""
        found = []
        for packer, offset, rows in self._needed():
            items = torch.from_numpy(packer.fitted.items[rows]) + offset
            unknown = self._sums[items, 0].isnan().tolist()
            if any(unknown):
                found.append((packer, offset, [row for row, lacks in zip(rows, unknown, strict=True) if lacks]))
        return found

    def _complete(self, model: Transformer) -> None:
        path = self._cache / "references" / f"{self._key(model)}.npy"
        if (known := _read(path, len(self._sums))) is not None:
            self._sums = torch.where(self._sums.isnan(), known, self._sums)
        missing = self._missing()
        if not missing:
            logger.info("log-probabilities under the reference come from the cache")
            return
        mode = model.training
        model.eval()
        try:
            self._compute(model, missing)
        finally:
            model.train(mode)
        _write(path, self._sums)

    def _compute(self, model: Transformer, missing: list[tuple[Packer, int, list[int]]]) -> None:
        device = model.embedding.weight.device
        total = sum(len(rows) for _, _, rows in missing)
        with progress("reading pairs with the reference", total, "pairs") as advance:
            for packer, offset, rows_of in missing:
                for batch in _batches(packer, offset, rows_of):
                    batch = batch.to(device)
                    rows, places = batch.rows, Places.of(batch)
                    output = model(rows.tokens, positions=rows.positions, documents=rows.documents)
                    logprobs, _ = token_logprobs(model, output.hidden[0, places.index], places.targets)
                    sums = places.per_document(logprobs, batch.num_documents).view(-1, 2)
                    self._sums[batch.items.cpu()] = sums.cpu()
                    advance(len(batch.items))

    def _key(self, model: Transformer) -> str:
        """A hash of the weights and of what is read with them."""
        digest = hashlib.sha256(fingerprint(model).encode())
        facts = (_VERSION, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
        digest.update(repr((*facts, self._data.train.sequence_length)).encode())
        for stored in (self._data.train.stored, self._data.validation.stored):  # a template may change under its name
            for column in (stored.starts, stored.tokens, stored.trained):
                digest.update(f"{column.shape}{column.dtype}".encode())
                digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:32]


def _batches(packer: Packer, offset: int, rows: list[int]) -> Iterator[PackedBatch]:
    """`rows`, each once, in passes of about as many tokens."""
    group: list[list[int]] = []
    tokens = 0
    for row in rows:
        length = int(packer.fitted.tokens[row])
        if group and tokens + length > _TOKENS:
            yield _numbered(packer.pack(group), offset)
            group, tokens = [], 0
        group.append([row])
        tokens += length
    if group:
        yield _numbered(packer.pack(group), offset)


def _numbered(batch: PackedBatch, offset: int) -> PackedBatch:
    return replace(batch, items=batch.items + offset)


def _read(path: Path, size: int) -> Tensor | None:
    """What is in the cache; None where nothing of that size is."""
    try:
        found: Any = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    whole = found.shape == (size, 2) and found.dtype == np.float32
    return torch.from_numpy(found) if whole else None


def _write(path: Path, sums: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh, fresh.open("wb") as stream:
            np.save(stream, sums.numpy())
    except OSError as error:
        raise DataError(f"cache folder {path.parent} cannot be written ({error}): set `data.cache_dir`") from error
