"""The published folders that imports and exports are tried on."""

from __future__ import annotations

from pathlib import Path

from checkpoint.huggingface.published import (
    LLAMA,
    MIXTRAL,
    TIED,
    V3,
    V3_FP8,
)

ALL = {"llama": LLAMA, "tied": TIED, "mixtral": MIXTRAL, "v3": V3, "v3_fp8": V3_FP8}


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
