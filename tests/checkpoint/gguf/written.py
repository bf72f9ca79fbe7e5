"""Models written as GGUF files, and the tensors that the gguf package reads in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from checkpoint.gguf.gguf_files import (
    import_folder,
)
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.model.transformer import Transformer

gguf = pytest.importorskip("gguf")


def exported(folder: Path, model: Transformer, dtype: str = "F32", **options: Any) -> Path:
    out = folder / f"{dtype}.gguf"
    export_gguf(import_folder(folder / f"from-{dtype}", model, **options), out, dtype=dtype, quiet=True)
    return out


def state_of(model: Transformer) -> dict[str, Tensor]:
    return dict(model.state_dict())


def stored(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors as the `gguf` package reads them."""
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in reader.tensors}


def rewritten(
    path: Path,
    out: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kinds: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """The same file with other tensors and some other metadata (None removes), by the `gguf` package alone."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents(), **options)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or metadata.get(key, 0) is None:
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, metadata.get(key, field.contents()), field.types[0], sub)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor), raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
