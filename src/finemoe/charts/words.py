"""Words that several reports share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finemoe.charts.numbers import Results, count


def listed(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def model_and_text(results: Results) -> str:
    """Model, text and date in one line."""
    domains = results["text"]["domains"]
    tokens = sum(domain["tokens"] for domain in domains.values())
    read = f"{count(tokens)} tokens in {len(domains)} domain{'s' if len(domains) > 1 else ''}"
    return " · ".join((results["model"]["source"], read, str(results.get("date") or "")[:10]))


def footer(version: Any) -> str:
    """The last line of every page."""
    return f"Made by finemoe {version or ''}".rstrip() + ". This file needs no network."
