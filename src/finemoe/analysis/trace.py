"""Traces: where every token went in every layer, streamed to one Parquet file that pandas, DuckDB and Polars read.

One row for each token and MoE layer, none for filling, nor for the end of a document that stands alone. A row group
holds one layer of some consecutive tokens, so a reader that filters by layer skips the others. Columns (none is null):

    domain        dictionary<string>  label of the text
    document      int32    number within the domain, counted at end-of-text tokens; such a token opens the next one
    window        int32    number within the domain; windows do not overlap and do not see each other
    position      int32    place within the window; no token looks back beyond its start
    token_id      int32    the token that was read
    token         dictionary<string>  its text; bytes that are no UTF-8 as \\xNN
    layer         int16    index of the block, dense blocks counted
    expert_ids    list<uint16>   the routed experts chosen, best first
    gate_weights  list<float32>  what multiplied their outputs, in that order
    loss          float32  nats of the token that follows, given this one and those before it
    entropy       float32  nats, of the router's scores over all experts, scaled to sum to 1; ln k for a hash router

The key `finemoe.trace` of the file's metadata holds JSON: version, model, config, tokenizer (fingerprint), domains
(tokens of each), length, command, date, environment. A file has its name only once it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from finemoe.analysis.passages import Observed, Passages
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.files import make_folder, replacing, storage_error
from finemoe.core.reading import damage_of, decode_json
from finemoe.model.moe.decision import RoutingDecision
from finemoe.training.alerts import routed_layers

VERSION = 1
_KEY = b"finemoe.trace"
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("domain", pa.dictionary(pa.int32(), pa.string())),
            ("document", pa.int32()),
            ("window", pa.int32()),
            ("position", pa.int32()),
            ("token_id", pa.int32()),
            ("token", pa.dictionary(pa.int32(), pa.string())),
            ("layer", pa.int16()),
            ("expert_ids", pa.list_(pa.field("element", pa.uint16(), nullable=False))),
            ("gate_weights", pa.list_(pa.field("element", pa.float32(), nullable=False))),
            ("loss", pa.float32()),
            ("entropy", pa.float32()),
        )
    ]
)
_SMALL = ["domain", "document", "window", "token_id", "token", "layer", "expert_ids.list.element"]
"""Columns of few values; a dictionary of floats would be built in vain."""
_GROUP_TOKENS = 1 << 15
_GROUP_CHOICES = 1 << 22  # of all layers: 24 MiB of ids and gates


@dataclass(frozen=True)
class TraceInfo:
    """What a trace says of itself."""

    path: Path
    rows: int
    metadata: Mapping[str, Any]
    """version, model, config, tokenizer, domains, length, command, date, environment."""

    @property
    def domains(self) -> list[str]:
        """In the order of the file."""
        return list(self.metadata["domains"])


# ---- writing ----


def require_new_file(path: Path) -> None:
    """Before any work.

    Raises:
        ConfigError: the file is there, or is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder; name a file in it, such as {path / 'trace.parquet'}")
    if path.exists():
        raise ConfigError(f"--out {path} exists; nothing is overwritten: remove it, or choose another name")


def write_trace(
    path: Path,
    opened: LanguageModel,
    passages: Sequence[Passages],
    observed: Iterable[Observed],
    about: Mapping[str, Any],
) -> Iterator[Observed]:
    """Write what `observed` brings to `path` and hand it on; memory is bounded by one row group of all layers.

    Args:
        path: of the file; replaced in one step at the end.
        opened: the model that was run.
        passages: what it reads.
        observed: batches with decisions, as from `observe(record=True)`.
        about: goes into the metadata: command, date, environment.

    Raises:
        RunError: the disk is full or the folder unwritable; nothing is left behind.
    """
    metadata = {
        "version": VERSION,
        "model": str(opened.source),
        "config": opened.model.config.model_dump(mode="json"),
        "tokenizer": opened.tokenizer.fingerprint(),
        "domains": {passage.domain: passage.num_targets for passage in passages},
        "length": passages[0].length,
        **about,
    }
    starts_with_end = opened.first_id == opened.tokenizer.end_of_text_id
    try:
        make_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    with replacing(path) as temporary, _writer(temporary, metadata) as file:
        rows = _Rows(file, opened, -1 if starts_with_end else 0)
        for one in observed:
            rows.add(one)
            yield one
        rows.flush()


def _writer(path: Path, metadata: Mapping[str, Any]) -> pq.ParquetWriter:
    schema = SCHEMA.with_metadata({_KEY: json.dumps(metadata, ensure_ascii=False).encode()})
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=_SMALL,
        write_statistics=["domain", "layer", "window", "token_id"], store_schema=True,
    )  # fmt: skip


@final
class _Rows:
    """Tokens waiting to be a row group for each layer."""

    def __init__(self, file: pq.ParquetWriter, opened: LanguageModel, first_document: int) -> None:
        self._file, self._tokenizer = file, opened.tokenizer
        layers = routed_layers(opened.model.config)
        self._sums_to_one = {number for number, layer in layers.items() if layer.router.scores_sum_to_one}
        self._first_document = first_document
        self._domains: list[str] = []
        self._window = self._document = 0
        self._tokens: list[dict[str, NDArray[Any]]] = []
        self._layers: dict[int, list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]] = {}
        self._waiting = self._choices = 0

    def add(self, one: Observed) -> None:
        """A batch, as far as it is text."""
        if one.domain not in self._domains:
            self._domains.append(one.domain)
            self._window, self._document = 0, self._first_document
        keep = one.batch.weights.flatten() > 0
        self._tokens.append(self._columns(one, keep))
        everything = bool(keep.all())
        for layer, record in one.output.routing.items():
            decision = record.decision
            assert decision is not None  # asked for by `observe`
            parts = (decision.expert_ids.to(torch.int32), decision.gate_weights.float(), self._entropy(layer, decision))
            kept = [part if everything else part[keep] for part in parts]
            ids, gates, scores = (part.cpu().numpy() for part in kept)
            self._layers.setdefault(layer, []).append((ids.astype(np.uint16), gates, scores))
            self._choices += ids.size
        self._waiting += int(keep.sum())
        if self._waiting >= _GROUP_TOKENS or self._choices >= _GROUP_CHOICES:
            self.flush()

    def _entropy(self, layer: int, decision: RoutingDecision) -> Tensor:
        if layer in self._sums_to_one and decision.logits is not None:
            return softmax_entropy(decision)
        return entropy_of(decision.scores)

    def _columns(self, one: Observed, keep: Tensor) -> dict[str, NDArray[Any]]:
        """What is the same for every layer."""
        rows, length = one.batch.tokens.shape
        tokens = one.batch.tokens.flatten().cpu().numpy()
        ends = np.cumsum(tokens == self._tokenizer.end_of_text_id)
        made = {
            "domain": np.full(rows * length, len(self._domains) - 1),
            "document": self._document + ends,
            "window": np.repeat(np.arange(self._window, self._window + rows), length),
            "position": np.tile(np.arange(length), rows),
            "token_id": tokens,
            "loss": one.losses.flatten().float().cpu().numpy(),
        }
        self._window += rows
        self._document += int(ends[-1])
        kept = keep.cpu().numpy()
        return {name: values[kept] for name, values in made.items()}

    def flush(self) -> None:
        """Write what waits, a row group for each layer."""
        if not self._waiting:
            return
        joined = {name: np.concatenate([part[name] for part in self._tokens]) for name in self._tokens[0]}
        ids, places = np.unique(joined["token_id"], return_inverse=True)
        spelt = self._tokenizer.token_bytes
        texts = [spelt[int(i)].decode("utf-8", "backslashreplace") if int(i) in spelt else "" for i in ids]
        columns: dict[str, Any] = {
            "domain": pa.DictionaryArray.from_arrays(joined["domain"].astype(np.int32), self._domains),
            "token": pa.DictionaryArray.from_arrays(places.astype(np.int32), texts),
            "loss": pa.array(joined["loss"], pa.float32()),
        }
        for name in ("document", "window", "position", "token_id"):
            columns[name] = pa.array(joined[name].astype(np.int32))
        for layer, parts in self._layers.items():
            experts, gates, entropies = (np.concatenate(part) for part in zip(*parts, strict=True))
            columns["layer"] = pa.array(np.full(self._waiting, layer, dtype=np.int16))
            offsets = pa.array(np.arange(len(experts) + 1, dtype=np.int32) * experts.shape[1])
            for name, values in (("expert_ids", experts), ("gate_weights", gates)):
                kind = SCHEMA.field(name).type
                columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)), type=kind)
            columns["entropy"] = pa.array(entropies, pa.float32())
            self._file.write_batch(pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA))
        self._tokens, self._layers = [], {}
        self._waiting = self._choices = 0


def softmax_entropy(decision: RoutingDecision) -> Tensor:
    """`entropy_of` the scores of a softmax in one pass over them, a third of the time: logsumexp z - sum of s z."""
    assert decision.logits is not None
    best = decision.expert_ids[:, :1]  # its score is at least 1 / experts, so its logarithm is safe
    logsumexp = decision.logits.gather(1, best)[:, 0] - decision.scores.gather(1, best)[:, 0].log()
    return (logsumexp - torch.linalg.vecdot(decision.scores, decision.logits)).clamp(min=0.0)


def entropy_of(scores: Tensor) -> Tensor:
    """Nats, `[tokens]`, of `scores [tokens, experts]` scaled to sum to 1; 0 where they are all 0."""
    share = scores.float() / scores.float().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.special.entr(share).sum(dim=-1)


# ---- reading ----


def trace_info(path: str | os.PathLike[str]) -> TraceInfo:
    """What the trace at `path` says of itself; no rows are read.

    Raises:
        DataError: it is not there, damaged, or no trace of this version.
    """
    path = Path(path)
    with _reading(path) as file:
        return _info(path, file)


def read_trace(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a trace in row groups, each of one layer.

    Args:
        path: of the file.
        columns: those wanted; all when None.
        layers: those wanted; the others are not read. All when None.

    Raises:
        DataError: it is not there, damaged, no trace of this version, or without such a column or layer.
    """
    path = Path(path)
    if unknown := set(columns or ()) - set(SCHEMA.names):
        raise DataError(f"{path}: a trace has no column {min(unknown)!r}; it has {', '.join(SCHEMA.names)}")
    with _reading(path) as file:
        _info(path, file)
        groups = [(number, _layer_of(file, number)) for number in range(file.num_row_groups)]
        if missing := set(layers or ()) - {layer for _, layer in groups}:
            there = sorted({layer for _, layer in groups})
            raise DataError(f"{path}: layer {min(missing)} is not an MoE layer of this trace; it has {there}")
        for number, layer in groups:
            if layers is None or layer in layers:
                table = file.read_row_group(number, columns=None if columns is None else list(columns))
                yield from table.combine_chunks().to_batches()


def _layer_of(file: pq.ParquetFile, group: int) -> int:
    statistics = file.metadata.row_group(group).column(SCHEMA.get_field_index("layer")).statistics
    return int(statistics.min)


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; `finemoe trace MODEL --out {path}` makes one")
    with damage_of(path, "trace again", DataError):
        try:
            with pq.ParquetFile(path) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole Parquet file ({_brief(error)}); trace again") from error


def _brief(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _info(path: Path, file: pq.ParquetFile) -> TraceInfo:
    raw = (file.schema_arrow.metadata or {}).get(_KEY)
    if raw is None:
        raise DataError(f"{path}: a Parquet file, but not made by `finemoe trace`")
    metadata = decode_json(raw)
    if metadata.get("version") != VERSION:
        raise DataError(
            f"{path}: a trace of version {metadata.get('version')}, this finemoe reads {VERSION}: trace again"
        )
    if not file.schema_arrow.remove_metadata().equals(SCHEMA):
        raise DataError(f"{path}: its columns are not those of a trace; trace again")
    for key in ("domains", "config"):
        dict(metadata[key])
    return TraceInfo(path, file.metadata.num_rows, metadata)
