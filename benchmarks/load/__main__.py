"""finemoe serve under load on the loopback address: python -m benchmarks.load MODEL

Clients ask at the same time, for texts of random lengths, whole or in pieces, under grammars and with experts switched
off; some go away in the middle, some send what is no request. Every text is compared with the one that the same request
was given when it was alone. At the end nothing may be missing, no answer be another's, no status be 5xx, no block of
the cache be held, and memory must not have grown with the number of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from benchmarks.load.server import Server

KINDS = ("whole", "stream", "gone", "odd")
_SHARES = (45, 40, 10, 5)
_ODD = (
    b"", b"{", b"[" * 5000, b'{"model": 3}', b'{"model":"none","prompt":"x"}', b"\xff\xfe", b'{"prompt":"x"}',
    b'{"model":"MODEL","prompt":"x","best_of":2}', b'{"model":"MODEL","prompt":"x","temperature":1e999}',
)  # fmt: skip
_PATIENCE = 120.0
_WORDS = "def class import return self for in if x = ( ) [ ] : the of and 1 2 3"


@dataclass
class Tally:
    """What happened."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    """Requests whose text was not the one that they get alone."""
    lost: list[str] = field(default_factory=list)
    """Requests that got no whole answer, and why."""
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Requests so far, resident bytes of the server."""


def requests_of(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Different things to ask."""
    draw = random.Random(seed)
    words = _WORDS.split()
    found = []
    for number in range(count):
        prompt = " ".join(draw.choices(words, k=draw.randint(1, 40)))
        body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": draw.randint(1, 48), "seed": number}
        body["temperature"] = draw.choice([0, 0, 0.7, 1.0])
        own: dict[str, Any] = {"ignore_end": True}
        if number % 6 == 0:
            own = {"regex": "[a-z]{3,12}(, [a-z]{3,12})*"}
        if number % 9 == 0:
            own["experts"] = {"shared": False}
        if number % 10 == 0:
            body["n"] = 2
        found.append({**body, "finemoe": own})
    return found


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, list[str]]:
    """Status, and the texts of all choices."""
    while True:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 429:
            break
        await asyncio.sleep(float(answer.headers["retry-after"]) * random.random())
    texts = [choice["text"] for choice in answer.json()["choices"]] if answer.status_code == 200 else []
    return answer.status_code, texts


async def pieces(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> tuple[int, list[str]]:
    """The same from a stream; or only its beginning, and the connection is dropped."""
    texts = [""] * body.get("n", 1)
    while True:
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code == 429:
                await asyncio.sleep(random.random())
                continue
            ended, chunks = False, 0
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
                    chunks += 1
                    if leave_after is not None and chunks >= leave_after:
                        return answer.status_code, []
            if leave_after is None and not ended:
                raise RuntimeError("the stream broke off")
            return answer.status_code, texts


async def one(client: httpx.AsyncClient, body: dict[str, Any], alone: list[str], kind: str, tally: Tally) -> None:
    """Ask, and compare."""
    began = time.monotonic()
    tally.kinds[kind] += 1
    try:
        if kind == "odd":
            odd = random.choice(_ODD).replace(b"MODEL", body["model"].encode())
            answer = await client.post("/v1/completions", content=odd, headers={"content-type": "application/json"})
            tally.statuses[answer.status_code] += 1
            if not 400 <= answer.status_code < 500 or "error" not in answer.json():
                tally.wrong.append({"odd": odd[:80].decode(errors="replace"), "status": answer.status_code})
            return
        leave = random.randint(1, 4) if kind == "gone" else None
        status, texts = await (whole(client, body) if kind == "whole" else pieces(client, body, leave))
        tally.statuses[status] += 1
        if kind == "gone":
            return
        if texts != alone:
            tally.wrong.append({"request": body, "alone": alone, "got": texts, "status": status})
    except (httpx.HTTPError, RuntimeError, ValueError) as error:
        waited = f"after {time.monotonic() - began:.0f} s, {len(tally.seconds)} others done"
        tally.lost.append(f"{kind} {waited}: {type(error).__name__} {error}: {json.dumps(body)[:300]}")
        print(tally.lost[-1], file=sys.stderr)
        if isinstance(error, httpx.ReadTimeout):  # what is the server doing?
            with contextlib.suppress(httpx.HTTPError):
                seen = [line for line in (await client.get("/metrics")).text.splitlines() if "completions{" in line]
                print("\n".join(seen), file=sys.stderr)
    finally:
        tally.seconds.append(time.monotonic() - began)


async def load(server: Server, bodies: list[dict[str, Any]], options: argparse.Namespace) -> Tally:
    """All of it."""
    tally, limits = Tally(), httpx.Limits(max_connections=options.clients + 8)
    async with httpx.AsyncClient(base_url=server.address, timeout=_PATIENCE, limits=limits) as client:
        alone = [(await whole(client, body))[1] for body in bodies]
        print(f"{len(bodies)} requests asked one by one", file=sys.stderr)
        begun, end = 0, time.monotonic() + 60 * options.minutes if options.minutes else None

        async def visitor() -> None:
            nonlocal begun
            while (time.monotonic() < end) if end else (begun < options.requests):
                begun += 1
                if begun % 100 == 0:
                    tally.memory.append((begun, server.resident()))
                if begun % 1000 == 0:
                    print(f"{begun:,} requests, {len(tally.wrong)} wrong, {len(tally.lost)} lost", file=sys.stderr)
                number = random.randrange(len(bodies))
                (kind,) = random.choices(KINDS, _SHARES)
                await one(client, bodies[number], alone[number], kind, tally)

        await asyncio.gather(*(visitor() for _ in range(options.clients)))
        await asyncio.sleep(1)
        tally.memory.append((begun, server.resident()))
    return tally


def slope(points: list[tuple[int, int]]) -> float:
    """Bytes a request, of the second half: the first fills caches."""
    half = points[len(points) // 2 :]
    if len({x for x, _ in half}) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in half], [y for _, y in half]).slope


def main() -> int:
    """Returns 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, help="instead of a number of requests")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--different", type=int, default=200, help="different requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    random.seed(options.seed)
    with Server(options.model, options.clients) as server:
        began = time.monotonic()
        tally = asyncio.run(load(server, requests_of(server.name, options.different, options.seed), options))
        report = {
            "seconds": round(time.monotonic() - began, 1),
            "clients": options.clients,
            "requests": dict(tally.kinds),
            "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
            "lost": len(tally.lost),
            "wrong": len(tally.wrong),
            "median_seconds": round(statistics.median(tally.seconds), 3),
            "memory_first_mb": round(tally.memory[0][1] / 1e6, 1),
            "memory_last_mb": round(tally.memory[-1][1] / 1e6, 1),
            "bytes_a_request": round(slope(tally.memory), 1),
            "blocks_held": server.blocks(),
            "examples": [*tally.lost[:3], *tally.wrong[:3]],
        }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    bad = tally.lost or tally.wrong or report["blocks_held"] or any(status >= 500 for status in tally.statuses)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
