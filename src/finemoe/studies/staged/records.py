"""What is known of the stages of one seed that are done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.core.reading import read_object
from finemoe.studies.staged.family import line, parents
from finemoe.studies.staged.worker import examined, failures_of


def records_of(home: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of every stage that is done, with the FLOPs of all that it came from."""
    mend = "remove it, and the same command writes it again"
    family = parents(raw["stage"])
    found: dict[str, Any] = {
        name: read_object(examined(home, name), mend) for name in family if examined(home, name).exists()
    }
    for name, record in found.items():
        own, every = record["flops"], sum(found[one]["flops"] for one in line(name, family) if one in found)
        record["all_flops"] = every
        if "figures" in record:
            record["figures"] |= {"flops": own, "all_flops": every}
    return found


def failed_of(home: Path) -> dict[str, str]:
    """Why stages could not be run, by name; those that come from them were left out."""
    path = failures_of(home)
    return read_object(path, "remove it, and the same command writes it again") if path.exists() else {}
