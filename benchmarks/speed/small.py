"""Generating with weights of 8 and 4 bits: one GGUF file, opened by finemoe as it is stored, and by llama.cpp."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.speed import shapes
from benchmarks.speed.context import Context
from benchmarks.speed.decoding import PROMPT, READ, same_logits, timed
from benchmarks.speed.process import Peer
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Samples, ratios

from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.model.config import ModelConfig

FORMATS = {"Q8_0": "8 bits", "Q4_0": "4 bits"}
_TOKENS = 16
_TOLERANCE = 0.2  # of logits, relative to the largest: llama.cpp rounds what it multiplies by to 8 bits


def llama(context: Context) -> list[Row]:
    """A dense model."""
    return _generating(context, "small-llama", "Llama", shapes.llama_model(4 if context.quick else 16))


def deepseek(context: Context) -> list[Row]:
    """A mixture with latent attention."""
    return _generating(context, "small-v3", "V3", shapes.v3_decoder(3 if context.quick else 10))


@contextmanager
def programs(context: Context, config: ModelConfig, form: str) -> Iterator[tuple[dict[str, Peer], int]]:
    """Both, with the same file open, and its bytes."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        context.watch(f"writing the model, {form}")
        run, file = shapes.write_run(config, Path(temporary) / "run", 1024), Path(temporary) / "model.gguf"
        export_gguf(run, file, dtype=form, tokenizer=False, quiet=True)
        running = {"finemoe": stack.enter_context(context.own())}
        peer = stack.enter_context(context.peer("llama.cpp", "llama_cpp"))
        if peer is not None:
            running["llama.cpp"] = peer
        running["finemoe"].ask("open", path=str(file), small="stored")
        if peer is not None:
            peer.ask("open", path=str(file))
        yield running, file.stat().st_size


def _generating(context: Context, key: str, name: str, config: ModelConfig) -> list[Row]:
    rows = []
    short, long = shapes.token_ids(config, 1, PROMPT)[0], shapes.token_ids(config, 1, READ)[0]
    for form, bits in FORMATS.items():
        with programs(context, config, form) as (running, size):
            same_logits(context, f"{key} {form}", running, short, _TOLERANCE)
            decoded = timed(
                context, running, "generate", prompt=short, count=_TOKENS // 2 if context.quick else _TOKENS
            )
            read = timed(context, running, "prefill", prompt=long)
        rows += _rows(key, f"{name}, {bits}", decoded, read, f"{form}: a file of {size / 1e6:.0f} MB")
    return rows


def _rows(key: str, name: str, decoded: Samples, read: Samples, note: str) -> list[Row]:
    rates = {program: [1 / seconds for seconds in samples] for program, samples in decoded.items()}
    ours = Measured("finemoe", rates["finemoe"], "tokens/s")
    if "llama.cpp" not in rates:
        return [Row(key, f"decode {name}", ours, None, rates["finemoe"], higher=True, note=note)]
    theirs = Measured("llama.cpp", rates["llama.cpp"], "tokens/s")
    decode = ratios(rates["finemoe"], rates["llama.cpp"])
    prefill = ratios(read["llama.cpp"], read["finemoe"])
    first = Measured("finemoe", read["finemoe"]), Measured("llama.cpp", read["llama.cpp"])
    return [
        Row(
            key,
            f"decode {name}, speed / llama.cpp",
            ours,
            theirs,
            decode,
            higher=True,
            target=1.0,
            stretch=1.15,
            note=note,
        ),
        Row(key, f"prefill {name}, speed / llama.cpp", *first, prefill, higher=True, target=1.0, stretch=1.3),
    ]
