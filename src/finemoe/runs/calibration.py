"""Which kernels a run uses: measured once for a machine and a shape, then remembered.

The same layer may be fastest one way on this processor and another way on the next, and at another width: a rule would
be a guess. The measurement takes a second or two and is kept in `kernels.json` of the cache folder.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finemoe.core.environment import cache_folder, processor
from finemoe.core.locks import exclusive_lock
from finemoe.core.logs import logger
from finemoe.core.reading import decode_json, reason_of
from finemoe.model import native
from finemoe.model.backends import EXPERT_KERNELS, backend_for
from finemoe.model.config import BlockConfig, Kernels, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.moe.dispatch import LocalDispatch
from finemoe.model.moe.experts import GroupedExperts
from finemoe.model.moe.layer import MoEConfig, routed_output
from finemoe.model.transformer import Transformer

_ROUNDS, _SECONDS = 7, 1.5  # of measuring; whichever ends first, after two rounds
_MOST_TOKENS, _MOST_WEIGHTS = 4096, 1 << 26  # of what is measured; experts are left out of layers that are larger

_MOST_VOCABULARY, _MOST_SEQUENCE, _MOST_BLOCK_TOKENS = 8192, 256, 1024  # of the block that products are chosen by
_PRODUCTS = ("native", "torch")
_FORMAT = 3  # of what is remembered; the first measured a SwiGLU alone, and had "torch" multiply in C++
_PATIENCE = 60.0  # seconds to wait for another process that measures

Candidates = Mapping[str, Callable[[], object]]
Timer = Callable[[Candidates, torch.device], Mapping[str, float]]
"""Seconds of each candidate."""


@dataclass(frozen=True)
class Chosen:
    """Kernels without any "auto", and why."""

    kernels: Kernels
    reason: str
    """For people: what was measured, or nothing where all was given."""


def seconds_of(candidates: Candidates, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate, measured in turns, so that a busy moment meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        for name, run in candidates.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - started)
        if turn >= 2 and time.perf_counter() - began > _SECONDS:
            break
    return {name: statistics.median(values) for name, values in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose(
    config: ModelConfig, kernels: Kernels, *, tokens: int, device: torch.device, bf16: bool, timer: Timer = seconds_of
) -> Chosen:
    """`kernels` with every "auto" replaced by what is fastest, forward and backward, for `tokens` at once.

    Args:
        timer: measures; tests give their own.
    """
    reasons = []
    layers = [block.feed_forward for block in config.blocks]
    moe = next((layer for layer in reversed(layers) if isinstance(layer, MoEConfig)), None)
    changes: dict[str, Any] = {}
    setting = _Setting(config.hidden_size, min(tokens, _MOST_TOKENS), device, bf16, timer)
    if kernels.products == "auto":
        width = moe.expert_hidden_size * max(1, moe.num_shared_experts) if moe else 0
        dense = next((layer for layer in layers if isinstance(layer, DenseConfig)), None)
        changes["products"], reason = setting.products(config, kernels, dense.ffn_hidden_size if dense else width)
        reasons.append(reason)
    if kernels.experts == "auto" and moe is not None:
        changes["experts"], reason = setting.experts(moe)
        reasons.append(reason)
    return Chosen(kernels.model_copy(update=changes), "; ".join(reason for reason in reasons if reason))


@dataclass(frozen=True)
class _Setting:
    hidden_size: int
    tokens: int
    device: torch.device
    bf16: bool
    timer: Timer

    def products(self, config: ModelConfig, kernels: Kernels, width: int) -> tuple[str, str]:
        """torch or native, for all that they decide: a block of the model with a SwiGLU of this width, and the loss.

        A SwiGLU alone would mislead: norms, rotation, attention and the loss change with it, and gain more. Nothing to
        choose where native cannot run.
        """
        if self.device.type != "cpu" or self.bf16 or not native.available():
            return "torch", ""
        attention = config.blocks[0].attention
        block = BlockConfig(attention=attention, feed_forward=DenseConfig(ffn_hidden_size=width))
        vocab = min(config.vocab_size, _MOST_VOCABULARY)
        small = config.model_copy(update={"blocks": (block,), "mtp": (), "vocab_size": vocab})
        length = min(self.tokens, _MOST_SEQUENCE)
        tokens = torch.arange(max(1, min(self.tokens, _MOST_BLOCK_TOKENS) // length) * length).view(-1, length) % vocab

        def candidates() -> Candidates:
            chosen = {name: kernels.model_copy(update={"products": name, "recompute": False}) for name in _PRODUCTS}
            return {name: partial(_pass, self._drawn(Transformer(small, one)), tokens) for name, one in chosen.items()}

        what = f"block of {attention.kind} {attention.num_heads} and swiglu {width}, vocabulary {vocab}"
        return self._remembered("products", what, candidates)

    def experts(self, moe: MoEConfig) -> tuple[str, str]:
        """The fastest of EXPERT_KERNELS, every expert taking its even share of the tokens."""
        per_expert = 3 * self.hidden_size * moe.expert_hidden_size
        count = max(1, min(moe.num_routed_experts, _MOST_WEIGHTS // per_expert))
        k = min(moe.experts_per_token, count)
        share = self.tokens * moe.experts_per_token / moe.num_routed_experts
        tokens = max(1, round(share * count / k))

        def candidates() -> Candidates:
            scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(0)).to(self.device)
            gates = torch.full((tokens, k), 1 / k, device=self.device)
            decision = RoutingDecision(scores.topk(k).indices, gates, scores, logits=None)
            made = {}
            for name in self._names():
                layer = self._drawn(
                    GroupedExperts(
                        count,
                        self.hidden_size,
                        moe.expert_hidden_size,
                        backend_for(Kernels.model_validate({"experts": name})),
                    )
                )
                forward = partial(_routed, layer, decision)
                made[name] = self._step(layer, forward, self._states(tokens))
            return made

        what = f"{count} experts of {moe.expert_hidden_size}, {k} a token"
        return self._remembered("experts", what, candidates)

    def _names(self) -> list[str]:
        """Kernels that differ here: `native` falls back to another one where it cannot run."""
        usable = self.device.type == "cpu" and not self.bf16 and native.available()
        return [name for name in EXPERT_KERNELS if name != "auto" and (name != "native" or usable)]

    def _states(self, tokens: int) -> Tensor:
        states = torch.randn(tokens, self.hidden_size, generator=torch.Generator().manual_seed(1))
        return states.to(self.device).requires_grad_()

    def _drawn(self, module: nn.Module) -> Any:
        """With weights of their usual size: subnormal numbers would be slow. The run's own draws stay as they are."""
        generator = torch.Generator().manual_seed(2)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)
        return module.to(self.device)

    def _step(self, module: nn.Module, forward: Callable[[Tensor], Tensor], states: Tensor) -> Callable[[], object]:
        def run() -> None:
            module.zero_grad()
            states.grad = None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                output = forward(states)
            output.backward(torch.ones_like(output))

        return run

    def _remembered(self, kind: str, what: str, candidates: Callable[[], Candidates]) -> tuple[str, str]:
        """The fastest candidate and its reason, from the cache if it was measured before."""
        path = cache_folder() / "kernels.json"
        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        parts = (machine, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", what)
        shape = (f"{self.tokens} tokens of {self.hidden_size}", "bf16" if self.bf16 else "fp32")
        key = ", ".join((f"{kind} {_FORMAT}", *parts, *shape, "native" if native.available() else "no native"))
        seconds = _known(path, key, kind) or self._measured(path, key, kind, candidates)
        best = min(seconds, key=lambda name: seconds[name])
        times = ", ".join(f"{name} {_time(seconds[name])}" for name in sorted(seconds, key=lambda n: seconds[n]))
        return best, f"{kind}: {times}"

    def _measured(self, path: Path, key: str, kind: str, candidates: Callable[[], Candidates]) -> Mapping[str, float]:
        """Measured by one process at a time, so that they agree and do not disturb each other."""
        with ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive_lock(path.with_suffix(".lock"), patience=_PATIENCE))
            except (OSError, TimeoutError) as error:
                logger.debug("%s cannot be locked: %s", path, error)
            found = _known(path, key, kind)  # by another process, meanwhile
            if found is None:
                logger.debug("measuring %s", key)
                found = {name: round(value, 6) for name, value in self.timer(candidates(), self.device).items()}
                _write(path, {**_read(path, say=True), key: found})
            return found


def _routed(experts: GroupedExperts, decision: RoutingDecision, states: Tensor) -> Tensor:
    return routed_output(LocalDispatch(), experts, states, decision, None, decision.gate_weights)[0]


def _pass(model: Transformer, tokens: Tensor) -> None:
    """Forward, loss and backward."""
    model.zero_grad()
    hidden = model(tokens).hidden.flatten(0, 1)
    weights = torch.ones(len(hidden))
    model.backend.cross_entropy_sum(hidden, model.head_weight, tokens.flatten(), weights).backward()


def _known(path: Path, key: str, kind: str) -> Mapping[str, float] | None:
    """What was measured for `key`; None where it was not, or for kernels that there are not."""
    found = _read(path).get(key)
    return (
        found if found and found.keys() <= {"experts": EXPERT_KERNELS.keys(), "products": {*_PRODUCTS}}[kind] else None
    )


def _read(path: Path, *, say: bool = False) -> dict[str, dict[str, float]]:
    """What was measured before; a file that is missing or damaged only costs measuring again."""
    try:
        found = decode_json(path.read_bytes())
        known = {
            key: {name: float(value) for name, value in seconds.items()} for key, seconds in found.items() if seconds
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if say and path.exists():
            logger.warning("%s: %s; it is written anew", path, reason_of(error))
        return {}
    return {key: seconds for key, seconds in known.items() if all(0 <= value < 3600 for value in seconds.values())}


def _write(path: Path, measured: Mapping[str, Mapping[str, float]]) -> None:
    """In one rename; where the cache cannot be written, the next run measures again."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".kernels-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(measured, file, indent=1)
        Path(name).replace(path)
    except OSError as error:
        logger.debug("%s cannot be written: %s", path, error)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
