"""llama.cpp in a process of its own: `python -m benchmarks.speed.llama_cpp_peer THREADS`; without finemoe."""

from __future__ import annotations

import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from benchmarks.speed.serving import serve

_CONTEXT = 1024
_FLOAT32 = 0  # ggml's number for the type of the cache


class Peer:
    """One model, and what is asked of it. Every method is an operation."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.model: llama_cpp.Llama

    def open(self, path: str) -> dict[str, Any]:
        """Load a GGUF file; the cache in float32 as everywhere, a prompt in one batch."""
        self.model = llama_cpp.Llama(
            path,
            n_ctx=_CONTEXT,
            n_batch=512,
            n_ubatch=512,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            type_k=_FLOAT32,
            type_v=_FLOAT32,
            verbose=False,
        )
        return {}

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Greedy decoding: seconds to the first token, and seconds of one of the `count` that follow."""
        started = time.perf_counter()
        times, ids = [], []
        self.model.reset()
        self._read(prompt)
        for number in range(1 + count):
            if number:
                self._read(ids[-1:])
            ids.append(int(self._last().argmax()))
            times.append(time.perf_counter())
        return {"first": times[0] - started, "seconds": (times[-1] - times[0]) / max(1, count), "ids": ids}

    def batch(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Parallel decoding: seconds of one of the `count` tokens of each prompt behind its first."""
        settings = llama_cpp.llama_context_default_params()
        each = len(prompts[0]) + 1 + count
        settings.n_ctx, settings.n_seq_max = max(512, len(prompts) * each), len(prompts)
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.type_k = settings.type_v = _FLOAT32
        settings.kv_unified, settings.no_perf = True, True
        context = llama_cpp.llama_init_from_model(self.model._model.model, settings)
        try:
            feeds = [(number, place, token) for number, ids in enumerate(prompts) for place, token in enumerate(ids)]
            ends = {(number, len(ids) - 1) for number, ids in enumerate(prompts)}
            found: list[list[int]] = [[] for _ in prompts]
            for first in range(0, len(feeds), 512):
                self._feed(context, feeds[first : first + 512], ends, found)
            started = time.perf_counter()
            for step in range(count):
                ends = {(number, len(ids) + step) for number, ids in enumerate(prompts)}
                feeds = [(number, place, found[number][-1]) for number, place in sorted(ends)]
                self._feed(context, feeds, ends, found)
            return {"seconds": (time.perf_counter() - started) / max(1, count), "ids": found}
        finally:
            llama_cpp.llama_free(context)

    def _feed(
        self, context: Any, feeds: list[tuple[int, int, int]], ends: set[tuple[int, int]], found: list[list[int]]
    ) -> None:
        """One pass over (sequence, place, token); what follows those at `ends` is added to `found`."""
        batch = llama_cpp.llama_batch_init(len(feeds), 0, 1)
        batch.n_tokens = len(feeds)
        for row, (number, place, token) in enumerate(feeds):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, place, 1
            batch.seq_id[row][0], batch.logits[row] = number, (number, place) in ends
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for row, (number, place, _) in enumerate(feeds):
            if (number, place) in ends:
                pointer = llama_cpp.llama_get_logits_ith(context, row)
                found[number].append(int(np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),)).argmax()))
        llama_cpp.llama_batch_free(batch)

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds from the prompt to the first token."""
        return {"seconds": self.generate(prompt, 0)["first"]}

    def logits(self, prompt: list[int]) -> dict[str, Any]:
        """Of the token after the prompt."""
        self.model.reset()
        self._read(prompt)
        return {"logits": self._last().tolist()}

    def _read(self, tokens: list[int]) -> None:
        self.model.eval(tokens)

    def _last(self) -> Any:
        """[vocab], the logits of the last token."""
        pointer = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),))


def main() -> None:
    """Serve."""
    peer = Peer(int(sys.argv[1]))
    methods = (peer.open, peer.generate, peer.prefill, peer.logits, peer.batch)
    operations = {method.__name__: method for method in methods}
    serve(operations, versions={"llama_cpp": llama_cpp.__version__})


if __name__ == "__main__":
    main()
