"""What the engine is asked for in a benchmark. Also runs on checkouts from before it was one engine (`--before`)."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finemoe.generation import Engine, Request, SamplingConfig

Prompts = Sequence[Sequence[int]]


class EngineOperations:
    """One model, and what is asked of engines around it. Every method is an operation."""

    def __init__(self) -> None:
        self.model: Any

    def open_model(self, path: str) -> dict[str, Any]:
        """Load a run."""
        from finemoe.checkpoint.open import load_model

        self.model = load_model(Path(path))
        return {}

    def batch(self, prompts: Prompts, count: int) -> dict[str, Any]:
        """Greedy decoding of all at once: seconds of one of the `count` tokens of each behind its first."""
        engine, ids = self._asked(prompts, [1 + count] * len(prompts))
        found: dict[int, list[int]] = {id: [] for id in ids}
        begun = 0.0
        while any(len(tokens) <= count for tokens in found.values()):
            for event in engine.step():
                found[event.sequence.id].append(event.token_id)
            if not begun and all(found.values()):
                begun, have = time.perf_counter(), sum(map(len, found.values()))
        tokens = sum(map(len, found.values())) - have
        seconds = (time.perf_counter() - begun) / max(1, tokens) * len(prompts)
        return {"seconds": seconds, "ids": list(found.values())}

    def first_token(self, prompt: Sequence[int], others: Prompts) -> dict[str, Any]:
        """Seconds from a request to its first token, while `others` decode; its engine is warm without others too."""
        engine, _ = self._asked([list(reversed(prompt))], [2])
        while engine.busy:
            engine.step()
        waiting = {engine.submit(Request(tuple(other), _greedy(1000))) for other in others}
        while waiting:
            waiting -= {event.sequence.id for event in engine.step()}
        started = time.perf_counter()
        new = engine.submit(Request(tuple(prompt), _greedy(1)))
        while all(event.sequence.id != new for event in engine.step()):
            pass
        return {"seconds": time.perf_counter() - started}

    def many(self, prompts: Prompts, counts: Sequence[int], reuse: bool = True) -> dict[str, Any]:
        """Seconds until requests of these lengths are all answered."""
        started = time.perf_counter()
        engine, _ = self._asked(prompts, counts, **({} if reuse else {"reuse": False}))
        tokens = sum(1 for _ in engine.events())
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    def speculate(self, prompts: Prompts, count: int, guess: str | None) -> dict[str, Any]:
        """Seconds of one greedy token, prompt after prompt, with guesses of the model's own module or without."""
        from finemoe.generation.speculation import FromModule

        seconds, tokens, texts = 0.0, 0, []
        guessed, right, passes = 0, 0, 0
        for prompt in prompts:
            guesses = {"guesses": FromModule(self.model, most=2)} if guess == "module" else {}
            engine, _ = self._asked([prompt], [1 + count], **guesses)
            text: list[int] = []
            while not text:
                text += [event.token_id for event in engine.step()]
            started, first = time.perf_counter(), len(text)
            while engine.busy:
                text += [event.token_id for event in engine.step()]
            seconds += time.perf_counter() - started
            tokens += len(text) - first
            texts.append(text)
            acceptance = engine.acceptance
            guessed, right = guessed + sum(acceptance.guessed), right + sum(acceptance.right)
            passes += acceptance.passes
        return {
            "seconds": seconds / max(1, tokens),
            "ids": texts,
            "accepted": right / max(1, guessed),
            "tokens_per_pass": sum(map(len, texts)) / max(1, passes),
        }

    def _asked(self, prompts: Prompts, counts: Sequence[int], **options: Any) -> tuple[Any, list[int]]:
        """An engine and the ids of its requests; what it can remember is enough for all."""
        if "max_sequences" in inspect.signature(Engine.__init__).parameters:
            options.setdefault("max_sequences", 64)
        engine = Engine(self.model, **options)
        asked = zip(prompts, counts, strict=True)
        return engine, [engine.submit(Request(tuple(prompt), _greedy(count))) for prompt, count in asked]


def _greedy(count: int) -> SamplingConfig:
    return SamplingConfig(temperature=0.0, max_new_tokens=count)


def main() -> None:
    """Serve the engine of the sources that lie first on the path."""
    import sys

    import torch
    from benchmarks.speed.serving import serve

    torch.set_num_threads(int(sys.argv[1]))
    own = EngineOperations()
    serve({"open": own.open_model, "many": own.many}, versions={"torch": torch.__version__})


if __name__ == "__main__":
    main()
