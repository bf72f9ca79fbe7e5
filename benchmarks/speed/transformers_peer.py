"""transformers in a process of its own: `python -m benchmarks.speed.transformers_peer THREADS`; without finemoe."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from benchmarks.speed.device import device_memory, forget_peak, settle
from benchmarks.speed.serving import memory, serve

LEARNING_RATE = 1e-5


class Times(transformers.StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Peer:
    """One model, and what is asked of it. Every method is an operation."""

    def __init__(self) -> None:
        self.model: Any
        self.tokens: torch.Tensor
        self.optimizer: torch.optim.Optimizer
        self.device = "cpu"
        self.bf16 = False

    def open(self, path: str, device: str = "cpu") -> dict[str, Any]:
        """Load a folder with everything that the library chooses by itself, in float32."""
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
        self.device = device
        config = self.model.config
        self.model.generation_config.eos_token_id = None
        return {"experts": config._experts_implementation, "attention": config._attn_implementation}

    def train(self, tokens: list[list[int]], bf16: bool = False) -> dict[str, Any]:
        """Get ready for training: AdamW as ours, fused and with two groups; bf16 under autocast, as ours."""
        self.tokens, self.bf16 = torch.tensor(tokens, device=self.device), bf16
        self.model.train()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        return {}

    def use(self, experts: str) -> dict[str, Any]:
        """Choose how experts are computed."""
        self.model.set_experts_implementation(experts)
        return {}

    @torch.no_grad()
    def loss(self) -> dict[str, Any]:
        """Mean cross-entropy of the batch."""
        return {"loss": self._loss().item()}

    def _loss(self) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss: torch.Tensor = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
            return loss

    def step(self, experts: str) -> dict[str, Any]:
        """One training step."""
        self.use(experts)
        settle(self.device)
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        found = {"loss": loss.item(), "norm": norm.item()}
        settle(self.device)
        return {"seconds": time.perf_counter() - started, **found}

    def measured_step(self, experts: str) -> dict[str, Any]:
        """One training step whose memory on the device is counted."""
        forget_peak(self.device)
        return {**self.step(experts), **device_memory(self.device)}

    def memory(self) -> dict[str, Any]:
        """Resident bytes, now and at most."""
        return {**memory(), **device_memory(self.device)}

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Greedy decoding: seconds to the first token, and seconds of one of the `count` that follow."""
        times = Times()
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1 + count,
            do_sample=False,
            stopping_criteria=[times],
        )
        first, last = times.seen[0], times.seen[-1]
        ids_found = found[0, len(prompt) :].tolist()
        return {"first": first - started, "seconds": (last - first) / max(1, count), "ids": ids_found}

    @torch.no_grad()
    def batch(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Greedy decoding of all at once: seconds of one of the `count` tokens of each behind its first."""
        times, ids = Times(), torch.tensor(prompts)
        options = {"max_new_tokens": 1 + count, "do_sample": False, "stopping_criteria": [times]}
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds = (times.seen[-1] - times.seen[0]) / max(1, count)
        return {"seconds": seconds, "ids": found[:, ids.shape[1] :].tolist()}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds from the prompt to the first token."""
        return {"seconds": self.generate(prompt, 0)["first"]}

    @torch.no_grad()
    def logits(self, prompt: list[int]) -> dict[str, Any]:
        """Of the token after the prompt."""
        return {"logits": self.model(input_ids=torch.tensor([prompt])).logits[0, -1].tolist()}


def main() -> None:
    """Serve."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(sys.argv[1]))
    peer = Peer()
    methods = (peer.open, peer.train, peer.use, peer.loss, peer.step, peer.memory, peer.generate, peer.prefill)
    operations = {method.__name__: method for method in (*methods, peer.logits, peer.measured_step, peer.batch)}
    serve(operations, versions={"transformers": transformers.__version__, "transformers' torch": torch.__version__})


if __name__ == "__main__":
    main()
