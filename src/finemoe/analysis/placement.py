"""Where the experts of a model should lie when it is served by many devices, from a load that was recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.analysis.provenance import made_by
from finemoe.core.errors import ConfigError
from finemoe.core.files import storage_error
from finemoe.core.reading import decode_json
from finemoe.parallel.planner.placement import place_layers


def placement(
    load: str | os.PathLike[str], *, gpus: int, redundant: int = 0, groups: int = 1, nodes: int = 1
) -> dict[str, Any]:
    """Place the experts of every layer, with copies of those most asked for (`parallel.planner.placement`).

    Args:
        load: folder of a report of `finemoe analyze load`, or its results.json; the last model of it counts.
        gpus: devices that hold the experts, each the same number.
        redundant: slots beyond one an expert.
        groups: of the router, which are kept on one node each; 1: none.
        nodes: the devices lie on.

    Returns:
        Slots by device, copies, and largest over mean load of a device before and after, by layer and as a mean.

    Raises:
        ConfigError: no such report, or numbers that do not go together.
        RunError: it cannot be read.
    """
    path = Path(load)
    file = path / "results.json" if path.is_dir() else path
    found = _read(file)
    if not isinstance(found, Mapping) or found.get("kind") != "load" or not found.get("series"):
        raise ConfigError(
            f"{path}: holds no recorded load; make one with `finemoe analyze load MODEL --out DIR`, and give DIR"
        )
    last = found["series"][-1]
    loads = {number: layer["load"] for number, layer in last["layers"].items()}
    placed = place_layers(loads, gpus, redundant=redundant, groups=groups, nodes=nodes)
    return {"kind": "placement", "model": last["path"], "load": str(path), **placed, **made_by()}


def _read(file: Path) -> Any:
    try:
        return decode_json(file.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file}: no such report; make one with `finemoe analyze load MODEL --out {file.parent}`"
        ) from error
    except OSError as error:
        raise storage_error(file, error) from error
    except ValueError:
        return None
