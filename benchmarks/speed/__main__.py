"""finemoe's speed beside its peers', in one run: python -m benchmarks.speed

Every ratio is of repetitions in turn, in both orders, on this machine and in this run. transformers is in the [dev]
extra; llama.cpp (llama-cpp-python) is optional. --peer names an interpreter that has them. A whole run writes
benchmarks/results/speed.json; one of some parts, or a quick one, writes only where --out says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed import around, decoding, engine, layers, memory, operations, server, small, steps, sweeps
from benchmarks.speed.context import Context
from benchmarks.speed.process import PeerError
from benchmarks.speed.progress import Watch
from benchmarks.speed.table import Row, show

from finemoe.core.environment import environment
from finemoe.core.memory import keep_freed_pages

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed.json"


@dataclass(frozen=True)
class Part:
    """Some rows that are measured together."""

    what: str
    run: Callable[[Context], list[Row]]
    seconds: float
    """About how long it takes on two cores."""


PARTS = {
    "layer-512": Part("an MoE layer of width 512 beside a dense one", layers.wide, 30),
    "layer-128": Part("the same at width 128", layers.narrow, 20),
    "operations": Part("attention, norms, loss and products beside plain torch", operations.operations, 75),
    "step": Part("a training step beside transformers, and validation", steps.training, 180),
    "dense-x16": Part("a step beside that of a dense model of the same size", steps.same_size, 60),
    "memory": Part("peak memory beside transformers", memory.memory, 100),
    "decode-llama": Part("generating, Llama shape, beside transformers and llama.cpp", decoding.llama, 120),
    "decode-v3": Part("generating, V3 shape", decoding.deepseek, 150),
    "small-llama": Part("weights of 8 and 4 bits beside llama.cpp, Llama shape", small.llama, 90),
    "small-v3": Part("the same, V3 shape", small.deepseek, 120),
    "batch-llama": Part("8 and 32 sequences at once, Llama shape", engine.batches_llama, 180),
    "batch-v3": Part("the same, V3 shape", engine.batches_v3, 240),
    "requests": Part("a newcomer, shared beginnings, mixed lengths (--before)", engine.requests, 240),
    "guesses": Part("one text with guesses of its prediction module (--trained)", engine.guesses, 60),
    "server": Part("the server beside llama.cpp's own (--gguf)", server.served, 240),
    "text": Part("tokenising and packing", around.text, 25),
    "start-up": Part("finemoe --help", around.start_up, 10),
    "checkpoint": Part("how long a checkpoint stops training", around.checkpoint, 80),
    "growth": Part("exponents of cost", sweeps.growth, 180),
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        epilog="\n".join(["parts:", *(f"  {name:13} {part.what}" for name, part in PARTS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=list(PARTS), metavar="PART", help="repeatable; see below")
    parser.add_argument("--growth", action="store_true", help="the exponents alone: --only growth")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="repetitions, at least (default: 7)")
    parser.add_argument("--quick", action="store_true", help="small models, 3 repetitions: to see that it works")
    parser.add_argument("--peer", default=sys.executable, metavar="PYTHON", help="interpreter that has the peers")
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout with the engine of fixed slots")
    parser.add_argument(
        "--trained", type=Path, metavar="RUN", action="append", default=[], help="of mtp.toml, mtp-dense.toml"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="with a tokenizer, for the servers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every program")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the JSON")
    found = parser.parse_args(given)
    if found.repeats < 1 or found.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if found.growth:
        found.only = [*(found.only or []), "growth"]
    if found.quick:
        found.repeats = min(found.repeats, 3)
    return found


def run(context: Context, names: Sequence[str], watch: Watch) -> tuple[list[Row], list[str]]:
    """All parts, with the machine's peaks measured before, between and after; their rows, and which parts failed."""
    rows: list[Row] = []
    failed: list[str] = []
    for name in names:
        watch.part(name)
        watch.tell("peaks of the machine")
        context.peaks.measure()
        try:
            rows += PARTS[name].run(context)
        except PeerError as error:
            failed.append(name)
            context.note(f"{name} failed: {error}")
        except Exception as error:  # the figures of the other parts are not lost
            failed.append(name)
            traceback.print_exc()
            context.note(f"{name} failed: {type(error).__name__}: {error}")
    context.peaks.measure()
    return rows, failed


def to_json(context: Context, rows: Sequence[Row], seconds: float, given: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured, with all samples, versions and machine."""
    peaks = context.peaks.spreads()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(["python", "-m", "benchmarks.speed", *given]),
        "quick": context.quick,
        "repeats": context.repeats,
        "threads": context.threads,
        "seconds": round(seconds, 1),
        "environment": environment(),
        "peers": context.versions,
        "kernels": context.kernels,
        "peaks": {
            name: {
                "unit": {"gemm": "FLOP/s", "bandwidth": "B/s"}[name],
                "median": spread.median,
                "quartiles": [spread.low, spread.high],
                "best": context.peaks.best[name],
                "raw": context.peaks.samples[name],
            }
            for name, spread in peaks.items()
        },
        "rows": [row.to_dict(peaks) for row in rows],
        "growth": [growth.to_dict() for growth in context.growth],
        "checks": context.checks,
        "notes": context.notes,
    }


def _write(out: Path | None, whole: bool, results: dict[str, Any]) -> None:
    place = out or (RESULTS if whole else None)
    if place is None:
        print("Not written: this was not a whole run; --out FILE writes it.", file=sys.stderr)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(place)


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a part failed."""
    given = sys.argv[1:] if given is None else given
    wanted = arguments(given)
    torch.set_num_threads(wanted.threads)
    keep_freed_pages()  # as `finemoe train`; plain torch in this process has it too
    names = [name for name in PARTS if wanted.only is None or name in wanted.only]
    watch = Watch({name: PARTS[name].seconds for name in names})
    context = Context(
        wanted.repeats,
        wanted.quick,
        wanted.threads,
        wanted.peer,
        wanted.before,
        tuple(wanted.trained or ()),
        wanted.gguf,
        watch.tell,
    )
    started = time.perf_counter()
    try:
        rows, failed = run(context, names, watch)
    finally:
        watch.close()
    seconds = time.perf_counter() - started
    notes = [*dict.fromkeys(row.note for row in rows if row.note), *context.notes]
    title = f"finemoe beside its peers, {wanted.repeats} repetitions or more, {wanted.threads} threads"
    if wanted.quick:
        title += " (quick: small models, these are no results)"
    show(rows, context.growth, context.peaks.spreads(), notes, f"{title}, {seconds / 60:.0f} min")
    whole = wanted.only is None and not wanted.quick and not failed and wanted.repeats >= 7
    _write(wanted.out, whole, to_json(context, rows, seconds, given))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
