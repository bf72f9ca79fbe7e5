"""Tokens a second through the server beside the bare engine: python -m benchmarks.load.throughput MODEL

The engine has the process that measures, the server one of its own with its clients in another: all share the machine's
cores, as they would. Both write the same greedy texts, in turn, several times; the medians and their quotient are what
counts. Time to the first token is of the server, as a client sees it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.load.clients import streams
from benchmarks.load.server import Server


def prompts_of(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Ids of tokens; no two prompts share anything, nor do those of two seeds: nothing is found in the cache."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]


def through_server(address: str, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Tokens a second, and the median of the seconds to a first token."""
    told = {"model": "model", "max_tokens": tokens, "temperature": 0, "finemoe": {"ignore_end": True}}
    return streams(address, [{**told, "prompt": prompt} for prompt in prompts])


def clients() -> None:
    """A process of its own: reads what to ask from stdin, and answers with figures."""
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(through_server(asked["address"], asked["prompts"], asked["tokens"])), flush=True)


def bare(engine: Any, prompts: list[list[int]], tokens: int) -> float:
    """Tokens a second of the engine itself."""
    from finemoe.generation import SamplingConfig

    sampling = SamplingConfig(temperature=0.0, max_new_tokens=tokens, ignore_end=True)
    began = time.perf_counter()
    found = engine.generate([tuple(prompt) for prompt in prompts], sampling)
    return sum(len(one.completion) for one in found) / (time.perf_counter() - began)


def main() -> None:
    """Measures, and prints JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.throughput", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--clients", type=int, action="append", default=[])
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve-clients", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_clients:
        clients()
        return
    from finemoe.checkpoint.language_model import open_language_model
    from finemoe.generation.engine import engine_for

    opened = open_language_model(options.model)
    vocab = opened.tokenizer.vocab_size
    asking = [sys.executable, "-m", "benchmarks.load.throughput", "--serve-clients"]
    report = {}
    with (
        Server(options.model, 64) as server,
        subprocess.Popen(asking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as others,
    ):
        assert others.stdin is not None
        assert others.stdout is not None
        for count in options.clients or [1, 8, 32]:
            rates: dict[str, list[float]] = {"engine": [], "server": [], "first": []}
            for number in range(options.repeats + 1):
                prompts = prompts_of(count, options.length, vocab, 100 * count + number)
                asked = json.dumps({"address": server.address, "prompts": prompts, "tokens": options.tokens})
                engine = engine_for(opened)
                own = bare(engine, prompts, options.tokens)
                print(asked, file=others.stdin, flush=True)
                served, first = json.loads(others.stdout.readline())
                if number:  # the first warms up
                    for name, value in (("engine", own), ("server", served), ("first", first)):
                        rates[name].append(value)
            quotients = [a / b for a, b in zip(rates["server"], rates["engine"], strict=True)]
            report[str(count)] = {
                "engine_tokens_per_second": round(statistics.median(rates["engine"]), 1),
                "server_tokens_per_second": round(statistics.median(rates["server"]), 1),
                "ratio": round(statistics.median(quotients), 3),
                "first_token_seconds": round(statistics.median(rates["first"]), 3),
            }
            print(f"{count} clients: {report[str(count)]}", file=sys.stderr)
        others.stdin.close()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
