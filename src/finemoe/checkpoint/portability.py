"""Which other programs run the export of a model: known from its configuration, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.checkpoint.gguf.metadata import describe
from finemoe.checkpoint.huggingface.families import FAMILIES, representable_as
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig

WHEN_EXPORTED = "when exported: "


@dataclass(frozen=True)
class Portability:
    """Where a model goes when it is exported without any option."""

    family: str | None
    """Its Hugging Face `model_type`; None: none computes it."""
    native: bool
    """transformers has a class for that family."""
    architecture: str | None
    """Its GGUF architecture; None: llama.cpp has none."""
    missing: str | None
    """Why llama.cpp has none."""

    @property
    def short(self) -> str:
        """The programs in a letter each: T for transformers, L for llama.cpp."""
        return "".join(letter for letter, runs in (("T", self.native), ("L", self.architecture)) if runs) or "–"

    def sentence(self) -> str:
        """A line for the start of a training."""
        if self.native:
            theirs = f"transformers runs it ({self.family})"
        elif self.family is not None:
            theirs = f"transformers has no class for it ({self.family})"
        else:
            theirs = "no Hugging Face family computes it"
        ours = f"llama.cpp runs it ({self.architecture})" if self.architecture else f"not llama.cpp: {self.missing}"
        return f"{WHEN_EXPORTED}{theirs}; {ours}"


def portability(config: ModelConfig) -> Portability:
    """Where `config` can be exported to: the first family that computes it, and the GGUF architecture."""
    family = next((name for name, refused in representable_as(config).items() if refused is None), None)
    architecture = missing = None
    try:
        architecture = describe(config, config.max_positions or 1).architecture
    except CheckpointError as error:
        missing = str(error)
    return Portability(family, family is not None and FAMILIES[family].native, architecture, missing)
