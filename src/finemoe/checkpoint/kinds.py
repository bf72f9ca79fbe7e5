"""What lies at a path, told by the names of files and the keys of one config.json.

Nothing here needs torch: a path that leads nowhere is said at once.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Literal

from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.core.contents import explanation
from finemoe.core.errors import CheckpointError

Opened = Literal["run", "imported", "huggingface", "gguf"]
Kind = Literal["run", "checkpoint", "imported", "huggingface", "gguf", "tensors", "unknown"]
"""`checkpoint`: one of a run, which opens as a run does. `tensors`: a .safetensors file alone."""

CONFIG, SOURCE, MANIFEST = "config.json", "source.json", "manifest.json"
STATE = "state.json"
"""Of a checkpoint of a run; an import has none."""
COMPARISON = "compare.json"
"""Of the folder of a comparison, and of a study of the papers' claims: what is compared."""
ANSWERS = "answers.jsonl"
"""Of a stage that has a model answer questions."""
JOURNAL = ".model.journal"
"""Of a conversion that goes on, or was interrupted."""
_MOST_NAMED = 10


def kind_of(path: str | os.PathLike[str]) -> Opened:
    """What lies at `path`, as something that can be opened; nothing but config.json is read.

    Raises:
        CheckpointError: nothing that finemoe opens.
    """
    path = Path(path)
    kind = _known(path)
    if kind is None or kind == "tensors":
        if several := several_models(path):
            raise CheckpointError(f"{path}: {several}")
        hint = _unfinished(path)
        if not hint and not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            hint = f"; if it is a name on the hub, `finemoe import {path} DIR` fetches it"
        what = "neither a run, nor an imported or Hugging Face folder (no config.json that says so), nor a .gguf file"
        if path.is_file() and (held := explanation(path, frozenset())) is not None:
            what += f"; it {held}"
        raise CheckpointError(f"{path}: {what if path.exists() else 'there is nothing here'}{hint}")
    return "run" if kind == "checkpoint" else kind


def several_models(path: Path) -> str | None:
    """Where `path` holds several models and is none, a comparison or a folder of runs: what to name instead."""
    is_comparison = (path / COMPARISON).is_file()
    models = models_below(path) if path.is_dir() else []
    if not is_comparison and not models:
        return None
    what = "a comparison of several runs" if is_comparison else "a folder of several runs"
    if not models:
        return f"{what}, none of which has a checkpoint yet: `finemoe resume {path}` goes on"
    listed = ", ".join(map(str, models[:_MOST_NAMED]))
    more = f" and {len(models) - _MOST_NAMED} more" if len(models) > _MOST_NAMED else ""
    return f"{what}; name one of them: {listed}{more}"


def models_below(path: Path) -> list[Path]:
    """Runs in the folders within `path`, and in the comparisons there, that have a checkpoint."""
    places = ("*", "*/*", "arms/*/*", "*/arms/*/*")
    return sorted({one.parents[1] for place in places for one in path.glob(f"{place}/checkpoints/step-*")})


def stages_below(path: Path) -> list[Path]:
    """Folders of the stages of a recipe, `1-NAME`, `2-NAME` and so on, that were begun; none without a first."""
    begun = (one.parent for name in (CONFIG, ANSWERS) for one in path.glob(f"*-*/{name}"))
    numbered = {(int(name[1]), one) for one in begun if (name := re.fullmatch(r"([1-9][0-9]*)-[a-z0-9-]+", one.name))}
    return [one for _, one in sorted(numbered)] if any(number == 1 for number, _ in numbered) else []


def likely_kind(path: Path) -> Kind:
    """The same for what may be damaged or unfinished: where its content does not say, names of files do."""
    if (path / JOURNAL).exists() and not is_imported(path):  # a kill may leave one in an import that is complete
        return "unknown"
    with contextlib.suppress(CheckpointError, OSError):
        kind = _known(path)
        if kind is not None:
            return kind
    if (path / SOURCE).exists():
        return "imported"
    if (path / "checkpoints").is_dir():
        return "run"
    return "huggingface" if (path / CONFIG).exists() or any(path.glob("*.safetensors")) else "unknown"


def _known(path: Path) -> Literal["run", "checkpoint", "imported", "huggingface", "gguf", "tensors"] | None:
    """The one decision, for what is whole.

    Raises:
        CheckpointError: config.json would decide, and cannot be read.
    """
    if path.is_file():
        return "gguf" if path.suffix.lower() == ".gguf" else "tensors" if path.suffix == ".safetensors" else None
    if is_imported(path):
        return "imported"
    if (path / STATE).exists():
        return "checkpoint"
    if (path / CONFIG).is_file():
        keys = read_config(path)
        if "model_type" in keys or ("architectures" in keys and "model" not in keys):
            return "huggingface"
        if "model" in keys:
            return "imported" if "source" in keys else "run"
    return "run" if (path / "checkpoints").is_dir() else None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in `folder`, whoever wrote it.

    Raises:
        CheckpointError: it cannot be read; where it is a run's, with what to put in its place.
    """
    try:
        return read_json(folder_file(folder, CONFIG))
    except CheckpointError as error:
        copies = sorted((folder / "checkpoints").glob(f"step-*/{CONFIG}"))
        if not copies:
            raise
        why = str(error).removeprefix(f"{folder / CONFIG}: ")
        raise CheckpointError(
            f"{folder / CONFIG}: the configuration of this run is damaged: {why}. Put it back: each checkpoint of the "
            f"run holds a copy, such as {copies[-1]}"
        ) from error


def is_imported(path: Path) -> bool:
    """Whether `path` is a folder that an import made; a run's checkpoint has no source.json."""
    return (path / MANIFEST).is_file() and (path / SOURCE).is_file()


def require_there(path: Path) -> None:
    """Check that there is anything at `path`, be it a link that leads nowhere.

    Raises:
        CheckpointError: there is nothing.
    """
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path}: no such file or folder{_unfinished(path)}")


def _unfinished(path: Path) -> str:
    partial = Path(f"{path}.partial")
    return (
        f"; interrupted work lies in {partial}: give the command that began it again to finish it"
        if partial.exists()
        else ""
    )
