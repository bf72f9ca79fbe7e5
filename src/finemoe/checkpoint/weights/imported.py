"""The imported folder: our weights, what the source brought along, and a manifest that makes it complete.

`config.json` holds the ModelConfig, where it came from, the ends of texts that the source's config.json names, and the
data table of a run that the weights were trained in;
`model*.safetensors` the weights under our names; `carried.safetensors` source tensors kept verbatim; `source.json` the
source's configuration and an account of each of its tensors; `manifest.json`, written last, size and SHA-256 of every
other file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

from finemoe.checkpoint.kinds import CONFIG, MANIFEST, SOURCE
from finemoe.checkpoint.own_config import model_of
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.storage.store import TensorStore, WrittenFile, write_file
from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.core.errors import CheckpointError
from finemoe.core.files import sha256
from finemoe.model.config import ModelConfig

CARRIED = "carried"
_FORMAT = 1
DATA = "data"
ENDS = "eos_token_id"  # where generation_config.json says none, a tokenizer looks for it in config.json
_OWN_JSON_BYTES = 256 << 20  # source.json has a line for each source tensor, manifest.json one for each file


@final
@dataclass(frozen=True)
class Imported:
    """A folder that an import finished: tensors under our names, and what else its source had, kept as it was.

    Opened by its headers. It says nothing of where tensors came from; `source()` reads that.
    """

    path: Path
    config: ModelConfig
    family: str
    """Of the source, as its config.json called it."""
    format: str
    """`huggingface` or `gguf`."""
    tensors: TensorFolder
    """Under the names of `Transformer.state_dict()`."""
    carried: TensorFolder
    """Under the source's names."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The data table of the run that the weights were trained in; empty where they come from elsewhere."""

    def source(self) -> dict[str, Any]:
        """source.json: `config` of the source, and `tensors` by name: status, dtype, shape, sha256.

        Raises:
            CheckpointError: unreadable or something else.
        """
        record = read_json(folder_file(self.path, SOURCE), _OWN_JSON_BYTES)
        tensors = record.get("tensors")
        if not isinstance(record.get("config"), dict) or not isinstance(tensors, dict):
            raise CheckpointError(f"{self.path / SOURCE}: must hold `config` and `tensors`; import again")
        for name, entry in tensors.items():
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("status", "dtype")):
                raise CheckpointError(f"{self.path / SOURCE}: says too little of tensor {name!r}; import again")
        return record


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    path: Path
    family: str
    config: ModelConfig
    loaded: int
    """Source tensors that fill the model, copies included."""
    dequantized: int
    """Of these, FP8 ones."""
    carried: Mapping[str, str]
    """Source tensors kept verbatim -> why."""
    nbytes: int
    """Of the new folder."""
    resumed: int
    """Source tensors that an interrupted import had done."""
    seconds: float
    notes: tuple[str, ...]
    """What else a careful reader wants to know."""
    warnings: tuple[str, ...] = ()
    """What everybody must know: where the source contradicted itself, and what was taken for what it does not say."""


def read_imported(path: Path, *, checksums: bool = False) -> Imported:
    """Open an imported folder.

    Args:
        path: the folder.
        checksums: read every file and compare its SHA-256; sizes are always compared.

    Raises:
        CheckpointError: incomplete, damaged, or with a configuration that is none.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: no {MANIFEST}, so it is no finished import")
    names = _check_manifest(path, checksums)
    raw = read_json(folder_file(path, CONFIG))
    model, source = raw.get("model"), raw.get("source")
    if not isinstance(model, dict) or not isinstance(source, dict):
        raise CheckpointError(f"{path / CONFIG}: must hold `model` and `source`; import again")
    family, kind = source.get("family"), source.get("format")
    if not isinstance(family, str) or not isinstance(kind, str):
        raise CheckpointError(f"{path / CONFIG}: `source` must name `family` and `format`; import again")
    carried = f"{CARRIED}.safetensors"
    extra = TensorFolder.of_files([folder_file(path, carried)] if carried in names else [])
    data = raw.get(DATA)
    config, tensors = model_of(raw, path / CONFIG), TensorFolder.open(path)
    return Imported(path, config, family, kind, tensors, extra, data if isinstance(data, dict) else {})


def _check_manifest(path: Path, checksums: bool) -> set[str]:
    """The files that the manifest names, all of them there and of their size."""
    files = read_json(path / MANIFEST, _OWN_JSON_BYTES).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path / MANIFEST}: must list `files`; import again")
    for name, entry in files.items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            raise CheckpointError(f"{path / MANIFEST}: gives no size for {name!r}; import again")
        file = folder_file(path, name)
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: damaged: it has {size} bytes, not {entry['bytes']}; make it again")
        if checksums and sha256(file) != entry.get("sha256"):
            raise CheckpointError(f"{file}: damaged: it does not have its recorded checksum; make it again")
    return set(files)


@final
class ImportedWriter:
    """An imported folder in the making: fill `weights` and `carried`, then `finish`. A context manager."""

    def __init__(self, folder: Path, weights: Sequence[TensorSpec], carried: Sequence[TensorSpec]) -> None:
        """Begin in a workspace, or go on with what an interrupted process left there.

        Raises:
            RunError: the disk is full or the folder unwritable.
        """
        self._folder = folder
        self.weights = TensorStore(folder, weights)
        """Under our names."""
        self.carried = TensorStore(folder, carried, CARRIED, shard_bytes=None) if carried else None
        """Under the source's names; None when there is nothing to carry."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self._stores():
            store.__exit__()

    def _stores(self) -> list[TensorStore]:
        return [self.weights] if self.carried is None else [self.weights, self.carried]

    def finish(
        self,
        config: ModelConfig,
        source: Mapping[str, str],
        record: Mapping[str, Any],
        files: Mapping[str, bytes],
        data: Mapping[str, Any] | None = None,
        *,
        quiet: bool = True,
    ) -> list[WrittenFile]:
        """Check the weights, write the small files, and the manifest last; all files.

        Args:
            config: of the model.
            source: `family` and `format`.
            record: what `Imported.source` gives back.
            files: tokenizer and the like, verbatim, by name.
            data: table of the run that the weights were trained in; None: they were not trained here.
            quiet: no progress.

        Raises:
            CheckpointError: the disk does not give back what was written.
            RunError: the disk is full or the folder unwritable.
        """
        written = [file for store in self._stores() for file in store.finish(quiet=quiet)]
        small: dict[str, bytes] = dict(files)
        ends = {key: record["config"][key] for key in (ENDS,) if record["config"].get(key) is not None}
        ends |= {} if data is None else {DATA: dict(data)}
        small[CONFIG] = _json({"model": config.model_dump(mode="json"), "source": dict(source), **ends})
        small[SOURCE] = _json(record)
        written += [write_file(self._folder / name, data) for name, data in small.items()]
        entries = {file.name: {"bytes": file.nbytes, "sha256": file.sha256} for file in written}
        written.append(write_file(self._folder / MANIFEST, _json({"format": _FORMAT, "files": entries})))
        return written


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
