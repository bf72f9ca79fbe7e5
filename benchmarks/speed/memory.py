"""Peak memory of training, each side in a process of its own that does nothing else."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.speed.context import Context
from benchmarks.speed.steps import OURS, sizes, write_models
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import ratios

HALVES = "finemoe, moments in bf16"
_STEPS = 2
MOMENTS = {"finemoe": "fp32", HALVES: "bf16"}
_REPEATS = 3  # processes of each side: sizes vary little


def memory(context: Context) -> list[Row]:
    """Rows of peak memory, above what the imports take and as a whole."""
    config, tokens = sizes(context)
    peaks: dict[str, list[tuple[int, int]]] = {"finemoe": [], HALVES: [], "transformers": []}
    with tempfile.TemporaryDirectory() as temporary:
        context.watch("writing the model")
        run, folder = write_models(config, Path(temporary))
        for number in range(1 if context.quick else min(_REPEATS, context.repeats)):
            for name, path in (("finemoe", run), (HALVES, run), ("transformers", folder)):
                context.watch(f"{name}, {number + 1}")
                peak = _peak(context, name, path, tokens)
                if peak is not None:
                    peaks[name].append(peak)
    return rows_of(peaks)


def _peak(context: Context, name: str, path: Path, tokens: list[list[int]]) -> tuple[int, int] | None:
    """Resident bytes of the process when everything is imported, and its peak after `_STEPS` steps."""
    with ExitStack() as stack:
        own = name != "transformers"
        peer = stack.enter_context(context.own() if own else context.peer(name, name))
        if peer is None:
            return None
        peer.ask("open", path=str(path))
        peer.ask("train", tokens=tokens, **({"kernels": {OURS: None}, "moments": MOMENTS[name]} if own else {}))
        for _ in range(_STEPS):
            peer.ask("step", **({"trainer": OURS} if own else {"experts": "grouped_mm"}))
        return peer.ready["resident"], peer.ask("memory")["peak"]


def rows_of(peaks: dict[str, list[tuple[int, int]]]) -> list[Row]:
    """What the pairs of imported and peak bytes say."""
    note = f"{_STEPS} steps, glibc's allocator as each program sets it, transformers with its own choice (grouped_mm)"
    ours = {"above": [b - a for a, b in peaks["finemoe"]], "whole": [b for _, b in peaks["finemoe"]]}
    halves = [b - a for a, b in peaks[HALVES]]
    if not peaks["transformers"]:
        whole = Measured("finemoe", ours["whole"], "B")
        return [Row("memory", "peak memory of training, GB", whole, None, [b / 1e9 for b in whole.samples], note=note)]
    theirs = {"above": [b - a for a, b in peaks["transformers"]], "whole": [b for _, b in peaks["transformers"]]}
    sides = {key: (Measured("finemoe", ours[key], "B"), Measured("transformers", theirs[key], "B")) for key in ours}
    values = {key: ratios(ours[key], theirs[key]) for key in ours}
    what = "peak memory / transformers"
    return [
        Row("memory", what, *sides["above"], values["above"], target=0.72, stretch=0.65, note=note),
        Row(
            "memory",
            "  with moments in bf16",
            Measured(HALVES, halves, "B"),
            sides["above"][1],
            ratios(halves, theirs["above"]),
            target=0.60,
            stretch=0.50,
        ),
        Row("memory", "  with what imports take", *sides["whole"], values["whole"]),
    ]
