"""finemoe: train, compare, inspect and sample fine-grained mixture-of-experts language models.

The public names are resolved on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, whose import alone takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from finemoe.checkpoint.open import load_chat_template, load_model, load_tokenizer
    from finemoe.core.errors import FinemoeError
    from finemoe.model.config import ModelConfig
    from finemoe.model.transformer import Transformer
    from finemoe.runs.run import Run, resume, train
    from finemoe.studies.compare import Comparison, compare
    from finemoe.text import Tokenizer

_HOME = {
    "Comparison": "finemoe.studies.compare",
    "FinemoeError": "finemoe.core.errors",
    "ModelConfig": "finemoe.model.config",
    "Run": "finemoe.runs.run",
    "Tokenizer": "finemoe.text",
    "Transformer": "finemoe.model.transformer",
    "compare": "finemoe.studies.compare",
    "load_chat_template": "finemoe.checkpoint.open",
    "load_model": "finemoe.checkpoint.open",
    "load_tokenizer": "finemoe.checkpoint.open",
    "resume": "finemoe.runs.run",
    "train": "finemoe.runs.run",
}

__all__ = [
    "Comparison",
    "FinemoeError",
    "ModelConfig",
    "Run",
    "Tokenizer",
    "Transformer",
    "compare",
    "load_chat_template",
    "load_model",
    "load_tokenizer",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'finemoe' has no attribute {name!r}")
