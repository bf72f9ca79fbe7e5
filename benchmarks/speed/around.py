"""Around training: text to batches, starting up, and how long a checkpoint keeps training waiting."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
from benchmarks.speed.context import Context
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, Samples, calling, interleave, ratios

from finemoe.core.logs import read_json_lines
from finemoe.data import Loader, SkipReport, StdlibCorpus, TokenShards, TokenSource, prepare
from finemoe.data.shards import TokenWriter, open_streams
from finemoe.runs.config import RunConfig, resolve_run
from finemoe.runs.run import train
from finemoe.text import Tokenizer

_TEXT_BYTES = 8_000_000
_LENGTH = 512
_STEPS, _EVERY = 12, 4  # of the runs whose checkpoints are timed
_RUNS = 4  # of each kind; one takes seconds
_SECONDS = 20.0


def text(context: Context) -> list[Row]:
    """Documents to packed batches, beside the bare tokenizer on the same documents."""
    corpus = StdlibCorpus(max_bytes=_TEXT_BYTES // 8 if context.quick else _TEXT_BYTES)
    texts = [document.text for document in corpus.documents(SkipReport(quiet=True))]
    context.watch("training a tokenizer")
    tokenizer = Tokenizer.train(texts[: len(texts) // 4], 2048)
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_json())

    def pack_all() -> None:
        with tempfile.TemporaryDirectory() as folder:
            with TokenWriter(Path(folder), ["train"], tokenizer) as writer:
                for one in texts:
                    writer.add("train", one)
                writer.finish()
            shards = TokenShards((TokenSource("train", 1.0, open_streams(Path(folder))["train"]),))
            end = tokenizer.end_of_text_id
            loader = Loader(shards, sequence_length=_LENGTH, packing="concatenate", end_of_text_id=end, seed=0)
            for position in range(0, loader.sequences_per_epoch - 16, 16):
                loader.batch(position, 16)

    contestants = [
        Contestant("finemoe", calling(pack_all)),
        Contestant("encode_batch", calling(lambda: plain.encode_batch(texts, add_special_tokens=False))),
    ]
    samples = interleave(contestants, context.repeats, budget=context.seconds(_SECONDS), watch=context.watch)
    nbytes = sum(len(one.encode()) for one in texts)
    rates = {name: [nbytes / seconds for seconds in times] for name, times in samples.items()}
    sides = [Measured(name, rate, "B/s") for name, rate in rates.items()]
    note = "ours writes, syncs, checks and maps the tokens, and cuts every batch of an epoch; encode_batch only encodes"
    what = "tokenise and pack, speed / encode_batch"
    return [Row("text", what, *sides, ratios(rates["finemoe"], rates["encode_batch"]), higher=True, note=note)]


def start_up(context: Context) -> list[Row]:
    """`finemoe --help`, beside an interpreter that does nothing."""
    commands = {"finemoe --help": ["-m", "finemoe", "--help"], "python -c pass": ["-c", "pass"]}

    def process(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)

    contestants = [Contestant(name, calling(lambda a=a: process(a))) for name, a in commands.items()]  # type: ignore[misc]
    samples = interleave(contestants, context.repeats, budget=context.seconds(5.0), watch=context.watch)
    ours, bare = (Measured(name, samples[name]) for name in commands)
    return [Row("start-up", "finemoe --help", ours, bare, ours.samples, unit="s", target=0.3)]


def checkpoint(context: Context) -> list[Row]:
    """How long training stands still for a checkpoint, by the run's own record, and how much longer the run takes."""
    records: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # A step must take longer than writing does in the background, or saves would wait for each other.
        every, once = (_run_config(folder, context.quick, saves) for saves in (_EVERY, _STEPS))
        context.watch("preparing the text")
        prepare(every.data)
        numbers = iter(range(10_000))

        def run(config: RunConfig) -> None:
            directory = folder / f"run-{next(numbers)}"
            train(config, out=directory, quiet=True)
            if config is every:
                lines = read_json_lines(directory / "metrics.jsonl")
                records.append([line for line in lines if line["kind"] == "checkpoint"])

        contestants = [
            Contestant("saving", calling(lambda: run(every))),
            Contestant("not saving", calling(lambda: run(once))),
        ]
        samples = interleave(contestants, min(_RUNS, context.repeats), watch=context.watch)
    return stall_rows(records[1:], samples)  # the first run warmed up


def stall_rows(records: list[list[dict[str, Any]]], samples: Samples) -> list[Row]:
    """What the runs noted of their checkpoints, the last of which training waits for, and what the whole runs took."""
    stalls = [statistics.median(line["stall_seconds"] for line in lines[:-1]) for lines in records]
    writes = [lines[-1]["write_seconds"] for lines in records]
    pairs = zip(samples["saving"], samples["not saving"], strict=True)
    longer = [max(0.0, (often - seldom) / (_STEPS // _EVERY - 1)) for often, seldom in pairs]
    write = Measured("write", writes)
    note = (
        f"checkpoints: of {_STEPS} steps after every {_EVERY}; stall: what the run notes of all but the last; longer: "
        "what the run takes more than one that saves at the end alone, for each"
    )
    return [
        Row(
            "checkpoint",
            "checkpoint, stall / write",
            Measured("stall", stalls),
            write,
            ratios(stalls, writes),
            note=note,
        ),
        Row("checkpoint", "  run longer / write", Measured("longer", longer), write, ratios(longer, writes)),
    ]


def _run_config(folder: Path, quick: bool, checkpoint_every: int) -> RunConfig:
    """A short run of a model of 18 million parameters, whose checkpoints have 220 MB."""
    raw: dict[str, Any] = {
        "name": "stall",
        "model": {"preset": "tiny-moe", "hidden_size": 256, "num_layers": 2 if quick else 8},
        "data": {
            "corpus": {"kind": "stdlib", "max_bytes": 1_000_000},
            "sequence_length": 256,
            "cache_dir": str(folder / "cache"),
            "max_validation_tokens": 1024,
        },
        "training": {
            "steps": _STEPS,
            "tokens_per_step": 256 if quick else 4096,
            "evaluate_every": _STEPS,
            "checkpoint_every": checkpoint_every,
            "keep_checkpoints": 1,
        },
    }
    return resolve_run(raw, "the benchmark")
