"""The engine: many sequences at once, a newcomer among them, shared beginnings, mixed lengths, guesses."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import shapes
from benchmarks.speed.context import Context
from benchmarks.speed.decoding import PROMPT, programs, timed
from benchmarks.speed.process import Peer, PeerError
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, Samples, interleave, ratios

from finemoe.model.config import ModelConfig

_TOKENS = 16
_SECONDS = 40.0
_SAME = 0.9  # of the greedy tokens of two programs behind the same text; rounding decides between near ties


def batches_llama(context: Context) -> list[Row]:
    """A dense model."""
    return _batches(context, "batch-llama", "Llama", shapes.llama_model(4 if context.quick else 16))


def batches_v3(context: Context) -> list[Row]:
    """A mixture with latent attention."""
    return _batches(context, "batch-v3", "V3", shapes.v3_decoder(3 if context.quick else 10))


def _batches(context: Context, key: str, name: str, config: ModelConfig) -> list[Row]:
    rows: list[Row] = []
    with programs(context, config) as running:
        for count in (8, 32):
            prompts = shapes.token_ids(config, count, PROMPT)
            if "transformers" in running and key == "batch-v3":
                _choose_experts(context, running["transformers"], prompts)
            _same_tokens(context, f"{key}, {count}", running, prompts)
            samples = timed(context, running, "batch", prompts=prompts, count=_TOKENS)
            rows += _batch_rows(key, f"decode {name}, {count} at once", count, samples)
    return rows


def _choose_experts(context: Context, peer: Peer, prompts: list[list[int]]) -> None:
    """The fastest of transformers' ways to compute experts for this many sequences."""
    seconds: dict[str, float] = {}
    for way in ("eager", "batched_mm", "grouped_mm"):
        try:
            peer.ask("use", experts=way)
            peer.ask("batch", prompts=prompts, count=1)
            seconds[way] = float(peer.ask("batch", prompts=prompts, count=2)["seconds"])
        except PeerError as error:
            context.note(f"transformers' {way} experts were left out for {len(prompts)} sequences: {error}")
    best = min(seconds, key=lambda way: seconds[way])
    peer.ask("use", experts=best)
    context.note(f"transformers computes experts by {best} for {len(prompts)} sequences, the fastest of its ways")


def _same_tokens(context: Context, what: str, running: dict[str, Peer], prompts: list[list[int]]) -> None:
    """All write nearly the same, or nothing is compared.

    Raises:
        PeerError: one does not.
    """
    texts = {name: peer.ask("batch", prompts=prompts, count=3)["ids"] for name, peer in running.items()}
    ours = texts.pop("finemoe")
    for name, found in texts.items():
        alike = [_alike(mine[:4], theirs[:4]) for mine, theirs in zip(ours, found, strict=True)]
        same = sum(same for same, _ in alike) / sum(looked for _, looked in alike)
        context.checks[f"{what}: share of the same greedy tokens, {name}"] = same
        if same < _SAME:
            raise PeerError(f"{name}: only {same:.0%} of its greedy tokens are ours")


def _alike(mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, int]:
    """How many tokens are the same, and how many followed the same text: from the first other one on, none does."""
    same = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
    return same, min(same + 1, len(mine))


def _batch_rows(key: str, what: str, count: int, samples: Samples) -> list[Row]:
    rates = {name: [count / seconds for seconds in found] for name, found in samples.items()}
    sides = {name: Measured(name, rate, "tokens/s") for name, rate in rates.items()}
    goals = {"transformers": {"target": 2.0, "stretch": 3.0}, "llama.cpp": {"target": 1.0, "stretch": 1.3}}
    return [
        Row(key, f"{what}, speed / {name}", sides["finemoe"], sides[name], found, higher=True, **goals[name])
        for name, found in ((name, ratios(rates["finemoe"], rates[name])) for name in goals if name in rates)
    ]


def requests(context: Context) -> list[Row]:
    """Requests that come and go, ours beside ours: on the Llama shape, so that nothing but the engine differs."""
    config = shapes.llama_model(4 if context.quick else 16)
    vocab = config.vocab_size
    with tempfile.TemporaryDirectory() as temporary, context.own() as own:
        context.watch("writing the model")
        run = shapes.write_run(config, Path(temporary) / "run", 1024)
        own.ask("open", path=str(run))
        rows = [_first_token(context, own, vocab), _shared(context, own, vocab)]
        return rows + _mixed(context, own, run, vocab)


def _first_token(context: Context, own: Peer, vocab: int) -> Row:
    draw = random.Random(1)
    prompt, others = _ids(draw, vocab, 128), [_ids(draw, vocab, PROMPT) for _ in range(16)]
    contestants = [
        Contestant("alone", own.timer("first_token", prompt=prompt, others=[])),
        Contestant("among 16", own.timer("first_token", prompt=prompt, others=others)),
    ]
    samples = interleave(contestants, context.repeats, watch=context.watch)
    ours, alone = Measured("among 16", samples["among 16"]), Measured("alone", samples["alone"])
    what = "first token of 128, among 16 that decode / alone"
    values = ratios(samples["among 16"], samples["alone"])
    return Row("requests", what, ours, alone, values, target=3.0, stretch=2.0)


def _shared(context: Context, own: Peer, vocab: int) -> Row:
    draw, count = random.Random(2), 8 if context.quick else 32
    beginning = _ids(draw, vocab, 512)
    prompts = [[*beginning, *_ids(draw, vocab, 16)] for _ in range(count)]
    contestants = [
        Contestant(name, own.timer("many", prompts=prompts, counts=[16] * count, reuse=reuse))
        for name, reuse in (("shared", True), ("apart", False))
    ]
    samples = interleave(contestants, context.repeats, watch=context.watch)
    what = f"{count} requests that share 512 tokens, speed / without reuse"
    values = ratios(samples["apart"], samples["shared"])
    sides = Measured("shared", samples["shared"]), Measured("apart", samples["apart"])
    return Row("requests", what, *sides, values, higher=True, target=3.0, stretch=6.0)


def _mixed(context: Context, own: Peer, run: Path, vocab: int) -> list[Row]:
    if context.before is None:
        context.note("200 mixed requests were left out: --before names a checkout with the engine of fixed slots")
        return []
    draw, count = random.Random(3), 20 if context.quick else 200
    prompts = [_ids(draw, vocab, draw.choice((8, 16, 32, 64, 128, 256))) for _ in range(count)]
    counts = [draw.choice((4, 8, 16, 32, 64)) for _ in prompts]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(context.before / "src"), "."])}
    command = [sys.executable, "-m", "benchmarks.speed.own_engine", str(context.threads)]
    with Peer("the engine before", command, environment) as before:
        before.ask("open", path=str(run))
        contestants = [
            Contestant(name, peer.timer("many", prompts=prompts, counts=counts), at_most=3)
            for name, peer in (("blocks", own), ("slots", before))
        ]
        samples = interleave(contestants, 3, watch=context.watch)
    values = ratios(samples["slots"], samples["blocks"])
    sides = Measured("blocks", samples["blocks"]), Measured("slots", samples["slots"])
    what = f"{count} requests of mixed length, speed / fixed slots"
    return [Row("requests", what, *sides, values, higher=True, target=1.3, stretch=2.0)]


def guesses(context: Context) -> list[Row]:
    """Greedy texts of models that were trained with a prediction module, with its guesses and without."""
    if not context.trained:
        context.note("guesses were left out: --trained names a run of recipes/mtp.toml or mtp-dense.toml")
    return [row for run in context.trained for row in _guesses(context, run)]


def _guesses(context: Context, run: Path) -> list[Row]:
    from finemoe.checkpoint.language_model import open_language_model

    opened = open_language_model(run)
    name = "mixture" if opened.model.config.blocks[-1].feed_forward.kind == "moe" else "dense"
    texts = ("def main(", "class Reader:\n", "import os\n", "    for name in names:\n", '"""Return', "if __name__ ==")
    prompts = [opened.encode(text) for text in texts]
    count = 32 if context.quick else 128
    with context.own() as own:
        own.ask("open", path=str(run))
        found = {guess: own.ask("speculate", prompts=prompts, count=count, guess=guess) for guess in (None, "module")}
        if found[None]["ids"] != found["module"]["ids"]:
            raise PeerError("the texts with guesses are not those without")
        context.checks[f"guesses, {name}: share of the module's that were right"] = found["module"]["accepted"]
        context.checks[f"guesses, {name}: tokens a pass"] = found["module"]["tokens_per_pass"]
        contestants = [
            Contestant(name, own.timer("speculate", prompts=prompts, count=count, guess=guess))
            for name, guess in (("with guesses", "module"), ("without", None))
        ]
        samples = interleave(contestants, context.repeats, budget=context.seconds(_SECONDS), watch=context.watch)
    rates = {name: [1 / seconds for seconds in found] for name, found in samples.items()}
    sides = (Measured(name, rates[name], "tokens/s") for name in ("with guesses", "without"))
    values = ratios(rates["with guesses"], rates["without"])
    return [
        Row(
            "guesses", f"one text, {name}, MTP guesses / without", *sides, values, higher=True, target=1.25, stretch=1.5
        )
    ]


def _ids(draw: random.Random, vocab: int, count: int) -> list[int]:
    return [draw.randrange(vocab) for _ in range(count)]
