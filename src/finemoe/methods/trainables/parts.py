"""Names for parts of a model, so that a recipe can freeze or adapt them without knowing parameter names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from finemoe.core.errors import ConfigError
from finemoe.model.transformer import Transformer

PARTS = {
    "embeddings": r"(embedding|head)\.weight",
    "attention": r"(.*\.)?attention\..*",
    "routers": r"(.*\.)?feed_forward\.router\..*",
    "experts": r"(.*\.)?feed_forward\.experts\..*",
    "shared_experts": r"(.*\.)?feed_forward\.shared_(experts|gate)\..*",
    "dense": r"(.*\.)?feed_forward\.(gate|up|down)_proj(\..*)?",
    "norms": r"(.*[._])?norm\.weight",
    "mtp": r"mtp\..*",
}
"""By the name that a recipe gives: a pattern of parameter names. Whatever is in `mtp` is in another part too."""


def matches(name: str, wanted: Sequence[str]) -> bool:
    """Whether a parameter is in any of `wanted`: names of PARTS, or globs of parameter names."""
    return any(re.fullmatch(PARTS[one], name) is not None if one in PARTS else fnmatchcase(name, one) for one in wanted)


def require_known(model: Transformer, wanted: Sequence[str], field: str) -> None:
    """Refuse a name that means nothing in this model.

    Raises:
        ConfigError: it matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for one in wanted:
        if not any(matches(name, (one,)) for name in names):
            raise ConfigError(
                f"{field}: {one!r} matches no parameter of the model: use {', '.join(PARTS)}, or a glob such as "
                f"'blocks.0.*' of names such as {names[0]} and {names[-1]}"
            )
