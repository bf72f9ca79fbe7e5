"""What a card says of its expert: shared by the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def leading(card: Mapping[str, Any]) -> int | None:
    """Number of the domain that the expert takes the largest part of; None for one that took nothing."""
    rates = [each["rate"] for each in card["domains"]]
    return rates.index(max(rates)) if card["assignments"] else None
