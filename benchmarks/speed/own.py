"""finemoe in a process of its own: `python -m benchmarks.speed.own THREADS`. It imports what a user's run would."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.speed.device import device_memory, forget_peak
from benchmarks.speed.own_engine import EngineOperations
from benchmarks.speed.serving import memory, serve
from benchmarks.speed.training import batch_of, chosen_kernels, loss_of, make_trainer, step

from finemoe.checkpoint.open import load_model
from finemoe.core.memory import keep_freed_pages
from finemoe.data.batch import TokenBatch
from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.model import native
from finemoe.model.config import Kernels
from finemoe.model.transformer import Transformer
from finemoe.training.trainer import Trainer
from finemoe.training.validation import validate


class Own:
    """One model, and what is asked of it. Every method is an operation."""

    def __init__(self) -> None:
        self.model: Transformer
        self.batch: TokenBatch
        self.trainers: dict[str, Trainer] = {}
        self.device = "cpu"
        self.engine = EngineOperations()

    def open(self, path: str, device: str = "cpu", small: str | None = None) -> dict[str, Any]:
        """Load a run, as `finemoe generate` does; `small`: its `--weights`."""
        self.model = self.engine.model = load_model(Path(path), small=small).to(device)
        self.device = device
        return {}

    def train(
        self,
        tokens: list[list[int]],
        kernels: dict[str, dict[str, Any] | None],
        bf16: bool = False,
        compiled: Sequence[str] = (),
        moments: Literal["fp32", "bf16"] = "fp32",
    ) -> dict[str, Any]:
        """Get ready for training: one trainer for each choice of kernels, on the same weights and optimizer state.

        None: what `finemoe train` chooses. `compiled`: those whose blocks go through torch.compile.
        """
        keep_freed_pages()
        native.pass_pages_on()  # as `finemoe train`
        self.batch = batch_of(tokens).to(torch.device(self.device))
        weights = self.model.state_dict(keep_vars=True)
        config = self.model.config
        for name, given in kernels.items():
            chosen = chosen_kernels(config, self.batch, self.device, bf16) if given is None else Kernels(**given)
            with torch.device("meta"):
                model = Transformer(config, chosen)
            model.load_state_dict(weights, assign=True)
            if name in compiled:
                for block in model.blocks:
                    block.compile()
            self.trainers[name] = make_trainer(model, self.batch, bf16, moments)
        first = next(iter(self.trainers.values()))
        for trainer in self.trainers.values():
            trainer.optimizers = first.optimizers  # the parameters are the same objects
        return {"kernels": {name: trainer.model.kernels.model_dump() for name, trainer in self.trainers.items()}}

    def loss(self, trainer: str) -> dict[str, Any]:
        """Mean cross-entropy of the batch."""
        with self.trainers[trainer].autocast():
            return {"loss": loss_of(self.trainers[trainer].model, self.batch)}

    def step(self, trainer: str) -> dict[str, Any]:
        """One training step."""
        return {"seconds": step(self.trainers[trainer], self.batch)}

    def validate(self, trainer: str) -> dict[str, Any]:
        """A validation pass over the batch."""
        started = time.perf_counter()
        validate(self.trainers[trainer].model, [self.batch], isolate_documents=False, bytes_per_token=1.0)
        return {"seconds": time.perf_counter() - started}

    def memory(self) -> dict[str, Any]:
        """Resident bytes, now and at most."""
        return {**memory(), **device_memory(self.device)}

    def measured_step(self, trainer: str) -> dict[str, Any]:
        """One training step whose memory on the device is counted."""
        forget_peak(self.device)
        return {**self.step(trainer), **device_memory(self.device)}

    def generate(self, prompt: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> dict[str, Any]:
        """Decoding, greedy if not told otherwise: seconds to the first token, and of one of the `count` that follow."""
        engine = Engine(self.model)
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=1 + count, seed=seed)
        started = time.perf_counter()
        engine.submit(Request(tuple(prompt), sampling))
        times, ids = [], []
        for event in engine.events():
            times.append(time.perf_counter())
            ids.append(event.token_id)
        return {"first": times[0] - started, "seconds": (times[-1] - times[0]) / max(1, count), "ids": ids}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds from the prompt to the first token."""
        return {"seconds": self.generate(prompt, 0)["first"]}

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> dict[str, Any]:
        """Of the token after the prompt."""
        hidden = self.model(torch.tensor([prompt])).hidden[:, -1]
        return {"logits": self.model.logits(hidden)[0].tolist()}


def main() -> None:
    """Serve."""
    torch.set_num_threads(int(sys.argv[1]))
    own = Own()
    methods = (own.open, own.train, own.loss, own.step, own.validate, own.memory, own.generate, own.prefill, own.logits)
    methods = (*methods, own.measured_step, *(own.engine.batch, own.engine.first_token, own.engine.many))
    methods = (*methods, own.engine.speculate)
    serve({method.__name__: method for method in methods}, versions={"torch": torch.__version__})


if __name__ == "__main__":
    main()
