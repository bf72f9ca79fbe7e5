"""Generating: decoding one sequence and reading a prompt, beside transformers and llama.cpp on the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from benchmarks.speed import shapes
from benchmarks.speed.context import Context
from benchmarks.speed.process import Peer, PeerError
from benchmarks.speed.steps import write_models
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, Samples, interleave, ratios

from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.model.config import ModelConfig
from finemoe.model.size import measure

PROMPT, READ = 32, 512
"""Tokens before decoding, and of the prompt whose reading is timed."""
_TOKENS = 16  # decoded in one repetition
_TOLERANCE = 2e-3  # of logits, relative to the largest
_SECONDS = 30.0


def llama(context: Context) -> list[Row]:
    """A dense model."""
    return _generating(context, "decode-llama", "Llama", shapes.llama_model(4 if context.quick else 16))


def deepseek(context: Context) -> list[Row]:
    """A mixture with latent attention."""
    return _generating(context, "decode-v3", "V3", shapes.v3_decoder(3 if context.quick else 10))


@contextmanager
def programs(context: Context, config: ModelConfig) -> Iterator[dict[str, Peer]]:
    """finemoe, and transformers and llama.cpp where they are installed, each with the same weights loaded."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        context.watch("writing the model")
        run, folder = write_models(config, Path(temporary), length=1024)
        file = Path(temporary) / "model.gguf"
        running = {"finemoe": stack.enter_context(context.own())}
        for name, module in (("transformers", "transformers"), ("llama.cpp", "llama_cpp")):
            peer = stack.enter_context(context.peer(name, module))
            if peer is not None:
                running[name] = peer
        if "llama.cpp" in running:
            export_gguf(run, file, dtype="F32", tokenizer=False, quiet=True)
        paths = {"finemoe": run, "transformers": folder, "llama.cpp": file}
        for name, peer in running.items():
            context.watch(f"loading the model, {name}")
            peer.ask("open", path=str(paths[name]))
        yield running


def _generating(context: Context, key: str, name: str, config: ModelConfig) -> list[Row]:
    with programs(context, config) as running:
        short, long = shapes.token_ids(config, 1, PROMPT)[0], shapes.token_ids(config, 1, READ)[0]
        same_logits(context, key, running, short)
        count = _TOKENS // 2 if context.quick else _TOKENS
        decoded = timed(context, running, "generate", prompt=short, count=count)
        read = timed(context, running, "prefill", prompt=long)
    size = measure(config, PROMPT + _TOKENS)
    return rows_of(key, name, decoded, read, 4.0 * size.active_parameters_without_embedding)


def timed(context: Context, running: Mapping[str, Peer], do: str, **request: object) -> Samples:
    """Each program does the same, in turn."""
    contestants = [Contestant(name, peer.timer(do, **request)) for name, peer in running.items()]

    def watch(text: str) -> None:
        context.watch(f"{do}: {text}")

    return interleave(contestants, context.repeats, budget=context.seconds(_SECONDS), watch=watch)


def same_logits(
    context: Context, key: str, running: Mapping[str, Peer], prompt: list[int], tolerance: float = _TOLERANCE
) -> None:
    """All compute the same, or nothing is compared.

    Raises:
        PeerError: one does not.
    """
    logits = {name: np.array(peer.ask("logits", prompt=prompt)["logits"]) for name, peer in running.items()}
    ours = logits.pop("finemoe")
    for name, found in logits.items():
        difference = float(np.abs(found - ours).max() / np.abs(ours).max())
        context.checks[f"{key}: relative difference of logits, {name}"] = difference
        if difference > tolerance:
            raise PeerError(f"{name}: its logits differ from ours by {difference:.1e} of the largest")


def rows_of(key: str, name: str, decoded: Samples, read: Samples, weight_bytes: float) -> list[Row]:
    """What the seconds of one token and of one prompt say.

    Args:
        key: of the part.
        name: of the model's shape.
        decoded: seconds of one token, by program.
        read: seconds to the first token, by program.
        weight_bytes: read for one token.
    """
    rates = {program: [1 / seconds for seconds in samples] for program, samples in decoded.items()}
    sides = {program: Measured(program, rate, "tokens/s") for program, rate in rates.items()}
    note = (
        f"decode {name}: {weight_bytes / 1e6:.0f} MB of weights are read for a token, all that it passes through but "
        f"the embedding; the cache is not counted. Prefill: {READ} tokens, to the first new one"
    )
    rows = []
    for program, side in sides.items():
        share = [rate * weight_bytes for rate in rates[program]]
        goals = {"target": 0.85, "stretch": 0.95} if program == "finemoe" else {}
        what = f"decode {name}, share of bandwidth" if program == "finemoe" else f"  {program}"
        rows.append(Row(key, what, side, None, share, of="bandwidth", higher=True, note=note, **goals))
    for program, goals in (("llama.cpp", {"target": 1.0, "stretch": 1.05}), ("transformers", {})):
        if program in sides:
            values = ratios(rates["finemoe"], rates[program])
            what = f"decode {name}, speed / {program}"
            rows.append(Row(key, what, sides["finemoe"], sides[program], values, higher=True, **goals))
    ours = Measured("finemoe", read["finemoe"])
    target, stretch = (1.4, 2.0) if name == "V3" else (1.2, 1.5)
    for program in ("llama.cpp", "transformers"):
        if program in read:
            values = ratios(read[program], read["finemoe"])
            what = f"prefill {name}, speed / {program}"
            theirs = Measured(program, read[program])
            rows.append(Row(key, what, ours, theirs, values, higher=True, target=target, stretch=stretch))
    return rows
