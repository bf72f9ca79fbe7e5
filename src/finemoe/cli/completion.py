"""What the shell offers after a tab: names of models, tasks, runs and recipes, found without importing torch.

Every function takes what has been typed so far and gives what it may become. Where nothing is found, the shell offers
files, as it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

_MOST = 200  # offered; more helps nobody
_DEPTH = 3  # folders below the current one in which recipes and runs are looked for
_SECTIONS = (
    "run model data training method trainable optimizer schedule kernels balancing mtp parallel stage study "
    "comparison matching routing budget tuning"
)
_TASKS = (
    "text lambada hellaswag piqa arc_easy arc_challenge openbookqa winogrande race_middle race_high mmlu ceval cmmlu "
    "cluewsc chid triviaqa natural_questions drop bbh bbh_direct gsm8k math humaneval mbpp infilling"
)
"""Names that would take a second to import from where they belong; a test compares them with that."""
_COMPARISON = "compare.json"
"""The same of a file."""


def complete_preset(incomplete: str) -> list[str]:
    """Presets that begin so."""
    from finemoe.model.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def complete_tasks(incomplete: str) -> list[str]:
    """Tasks of `finemoe evaluate`, the last of a list that commas part."""
    done, comma, last = incomplete.rpartition(",")
    taken = set(done.split(","))
    return [f"{done}{comma}{name}" for name in _TASKS.split() if name.startswith(last) and name not in taken]


def complete_section(incomplete: str) -> list[str]:
    """Tables of a recipe."""
    return [name for name in _SECTIONS.split() if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Recipes: TOML files here, in recipes/, and below the folder that is being typed."""
    return _found(incomplete, "*.toml", lambda path: path.is_file())


def complete_run(incomplete: str) -> list[str]:
    """Run directories: those with a config.json and metrics beside it."""
    found = _found(incomplete, "metrics.jsonl", lambda path: (path.parent / "config.json").is_file())
    return sorted({str(Path(name).parent) for name in found})


def complete_resumable(incomplete: str) -> list[str]:
    """What can go on: comparisons, which stand for their runs, and the other runs."""
    whole = {str(Path(name).parent) for name in _found(incomplete, _COMPARISON, Path.is_file)}
    alone = (name for name in complete_run(incomplete) if not any(Path(name).is_relative_to(one) for one in whole))
    return sorted({*whole, *alone})


def complete_model(incomplete: str) -> list[str]:
    """What `finemoe size` measures: presets, recipes and runs."""
    return [*complete_preset(incomplete), *complete_recipe(incomplete), *complete_run(incomplete)]


def _found(incomplete: str, pattern: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Paths that begin with `incomplete`, up to `_DEPTH` folders down; unreadable and hidden folders are passed by."""
    folder, typed = Path(incomplete).parent, Path(incomplete).name
    if incomplete.endswith("/") or not incomplete:
        folder, typed = Path(incomplete or "."), ""
    begun = incomplete[: len(incomplete) - len(typed)]
    return sorted(f"{begun}{name}" for name in islice(_below(folder, typed, pattern, wanted, _DEPTH), _MOST))


def _below(folder: Path, typed: str, pattern: str, wanted: Callable[[Path], bool], depth: int) -> Iterator[str]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(typed) or entry.name.startswith("."):
            continue
        if entry.match(pattern) and wanted(entry):
            yield entry.name
        elif depth and entry.is_dir() and not entry.is_symlink():
            yield from (f"{entry.name}/{name}" for name in _below(entry, "", pattern, wanted, depth - 1))
