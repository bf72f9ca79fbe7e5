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
    methods = (peer.open, peer.generate, peer.prefill, peer.logits)
    operations = {method.__name__: method for method in methods}
    serve(operations, versions={"llama_cpp": llama_cpp.__version__})


if __name__ == "__main__":
    main()
