"""The server: tokens a second and time to the first token, beside llama.cpp's own server on the same GGUF file."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.load.clients import streams
from benchmarks.load.server import Server
from benchmarks.speed.context import Context
from benchmarks.speed.process import PeerError, interpreter_with
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, interleave, ratios

_TOKENS = 32
_WORDS = ("river", "stone", "seven", "under", "garden", "letter", "music", "winter", "bridge", "paper", "nine", "cloud")
_PROMPT = 24  # words
_WAIT = 120.0  # [s] for a server to open its model


def served(context: Context) -> list[Row]:
    """1, 8 and 32 clients, of both servers in turn."""
    if context.gguf is None:
        context.note("the server was left out: --gguf names a file with a tokenizer that both can serve")
        return []
    python = interpreter_with("llama_cpp.server.app", [context.python])
    if python is None:
        context.note(f"the server was left out: {context.python} has no llama-cpp-python[server]")
        return []
    rows: list[Row] = []
    with Server(context.gguf, 64) as ours, _llama_cpp(python, context.gguf, context.threads) as theirs:
        bias = _never_ending(context.gguf)
        for count in (1, 8) if context.quick else (1, 8, 32):
            firsts: dict[str, list[float]] = {"finemoe": [], "llama.cpp": []}
            rates: dict[str, list[float]] = {"finemoe": [], "llama.cpp": []}
            contestants = [
                Contestant(name, _repetition(address, count, bias, rates[name], firsts[name]))
                for name, address in (("finemoe", ours.address), ("llama.cpp", theirs))
            ]
            interleave(contestants, context.repeats, watch=context.watch)
            for samples in (rates, firsts):
                for values in samples.values():
                    del values[0]  # which warmed up
            rows += _rows(count, rates, firsts)
    return rows


def _repetition(
    address: str, count: int, bias: dict[str, int], rates: list[float], firsts: list[float]
) -> Callable[[], float]:
    def once() -> float:
        number = len(rates)
        bodies = [
            {"model": "model", "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, "logit_bias": bias}
            for prompt in _prompts(count, number)
        ]
        try:
            rate, first = streams(address, bodies)
        except (RuntimeError, OSError) as error:
            raise PeerError(str(error)) from error
        rates.append(rate)
        firsts.append(first)
        return count * _TOKENS / rate

    return once


def _prompts(count: int, number: int) -> list[str]:
    """Texts that begin differently from the first word on, and in every repetition: nothing is found in a cache."""
    words = [_WORDS[(k * k + number) % len(_WORDS)] for k in range(_PROMPT)]
    return [" ".join([f"{number} {client}:", *words[client % 7 :], *words[: client % 7]]) for client in range(count)]


def _rows(count: int, rates: dict[str, list[float]], firsts: dict[str, list[float]]) -> list[Row]:
    rate = {name: Measured(name, values, "tokens/s") for name, values in rates.items()}
    first = {name: Measured(name, values) for name, values in firsts.items()}
    clients = f"{count} client{'s' if count > 1 else ''}"
    quick = ratios(rates["finemoe"], rates["llama.cpp"])
    early = ratios(firsts["finemoe"], firsts["llama.cpp"])
    return [
        Row("server", f"{clients}, speed / llama.cpp", rate["finemoe"], rate["llama.cpp"], quick, higher=True),
        Row("server", f"{clients}, first token / llama.cpp", first["finemoe"], first["llama.cpp"], early),
    ]


def _never_ending(file: Path) -> dict[str, int]:
    """Both are told never to draw what ends a text: all write the same number of tokens."""
    from finemoe.checkpoint.open import load_tokenizer

    tokenizer = load_tokenizer(file)
    ending = {tokenizer.end_of_text_id, *tokenizer.stop_ids} - {None}
    return {str(token): -100 for token in sorted(ending)}


@contextlib.contextmanager
def _llama_cpp(python: str, file: Path, threads: int) -> Iterator[str]:
    """Its address. It takes one request at a time, and would else break off the one that runs for the next."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings: dict[str, Any] = {"model": file, "model_alias": "model", "host": "127.0.0.1", "port": port}
    settings |= {"n_ctx": 2048, "n_threads": threads, "n_threads_batch": threads, "type_k": 0, "type_v": 0}
    settings |= {"interrupt_requests": False}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([python, "-m", "llama_cpp.server", *options], stdout=said, stderr=said)
        try:
            _wait(f"http://127.0.0.1:{port}/v1/models", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _WAIT
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise PeerError("llama.cpp's server did not come up")
