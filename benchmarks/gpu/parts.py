"""One part in a process of its own: python -m benchmarks.gpu.parts PART --out FILE.

Its parent stops it when its time is over, so that a compilation that never ends costs its own rows alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed import layers, shapes, steps
from benchmarks.speed.context import Context
from benchmarks.speed.device import seconds_on
from benchmarks.speed.peaks import Peaks
from benchmarks.speed.process import Peer, PeerError
from benchmarks.speed.shapes import LayerShape
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, Samples, fastest, interleave, ratios
from torch import Tensor

from finemoe.model.backends import backend_for
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.moe.layer import MoELayer
from finemoe.model.size import measure

LAYER = LayerShape(hidden=2048, tokens=8192, experts=64, width=1408, top_k=6, shared=2)
"""That of DeepSeekMoE 16B: 553 M parameters, 3.4 TFLOP forward and backward."""
TINY = LayerShape(hidden=32, tokens=64, experts=8, width=16, top_k=2)
KERNELS = ("grouped_mm", "sorted_slices", "loop")
DENSE = "torch dense"
OURS, COMPILED = "finemoe", "finemoe, compiled"
LENGTH = 1024
_TOLERANCE = {True: 2e-2, False: 1e-4}  # of norms, in bf16 and in float32
_LOSS_TOLERANCE = {True: 2e-2, False: 1e-4}
_CALLS = 10
_GEMM, _COPY = 8192, 1 << 30
_SECONDS = 25.0  # on one comparison, where more repetitions fit in


@dataclass
class Setting:
    """Where and how much is measured, and what has come of it."""

    device: str
    quick: bool
    """Tiny models: to see that everything works."""
    repeats: int
    bf16: bool = True
    notes: list[str] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes on the device that a training step takes at most, weights and optimizer included, by contestant."""
    peaks: dict[str, list[float]] = field(default_factory=lambda: {"gemm": [], "bandwidth": []})
    versions: dict[str, str] = field(default_factory=dict)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """Products in bf16, as a run with `training.bf16`."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16 and enabled)

    def measure_peaks(self) -> None:
        """What the device can do now: a product in bf16 of random numbers, and copying (bytes read and written)."""
        if torch.device(self.device).type != "cuda":
            peaks = Peaks(sizes=(256,), read_bytes=1_600_000)
            peaks.measure()
            for name, samples in peaks.samples.items():
                self.peaks[name] += samples
            return
        left, right = torch.randn(2, _GEMM, _GEMM, device=self.device, dtype=torch.bfloat16)
        product = torch.empty_like(left)
        source = torch.randn(_COPY // 4, device=self.device)
        target = torch.empty_like(source)
        for name, work, function in (
            ("gemm", 2.0 * _GEMM**3, lambda: torch.mm(left, right, out=product)),
            ("bandwidth", 2.0 * _COPY, lambda: target.copy_(source)),
        ):
            seconds_on(self.device, function, 3)
            self.peaks[name].append(work / seconds_on(self.device, function, _CALLS))


def both_ways(
    run: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], shape: LayerShape, setting: Setting
) -> Callable[[], Tensor]:
    """A call of forward and backward under autocast, with gradients of weights and input."""
    draw = torch.Generator().manual_seed(2)
    sizes = (1, shape.tokens, shape.hidden)
    states, gradient = (torch.randn(sizes, generator=draw).to(setting.device) for _ in range(2))
    states.requires_grad_()

    def call() -> Tensor:
        for tensor in (states, *parameters):
            tensor.grad = None
        with setting.autocast():
            output = run(states)
        output.backward(gradient.to(output.dtype))
        return output

    return call


def moe_layer(shape: LayerShape, setting: Setting) -> MoELayer:
    """A layer with drawn weights."""
    layer: MoELayer = shapes.layer(shape.hidden, shape.table()).to(setting.device)
    return layer


def with_kernel(layer: MoELayer, name: str) -> MoELayer:
    """The same weights, another kernel."""
    hidden = layer.experts.gate_up_proj.shape[2]
    with torch.device("meta"):
        other = MoELayer(layer.config, hidden, 1, backend_for(Kernels.model_validate({"experts": name})))
    other.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
    return other.train()


def forward(layer: Any, shape: LayerShape, setting: Setting) -> Callable[[Tensor], Tensor]:
    """Of states alone."""
    tokens = torch.zeros(1, shape.tokens, dtype=torch.int64, device=setting.device)

    def run(states: Tensor) -> Tensor:
        output: Tensor = layer(states, tokens, constraint=None, record=False)[0]
        return output

    return run


def dense_layer(shape: LayerShape, setting: Setting) -> layers.PlainDense:
    """A SwiGLU of as many active parameters in plain torch."""
    dense = layers.PlainDense(shape.hidden, shape.active_width)
    dense.weights = [weight.detach().to(setting.device).requires_grad_() for weight in dense.weights]
    return dense


def check(name: str, found: Tensor, expected: Tensor, setting: Setting) -> None:
    """Whether two outputs are the same but for rounding.

    Raises:
        RuntimeError: they are not, or are not numbers.
    """
    error = float((found - expected).detach().float().norm() / expected.detach().float().norm())
    setting.checks[f"{name}, relative error"] = error
    if not error < _TOLERANCE[setting.bf16]:
        raise RuntimeError(f"{name} is off by {error:.1e} of the norm")


def timed(calls: Mapping[str, Callable[[], Any]], setting: Setting) -> Samples:
    """Seconds of each, in turn."""
    number = 1 if setting.quick else _CALLS
    contestants = [
        Contestant(name, lambda call=call: seconds_on(setting.device, call, number))  # type: ignore[misc]
        for name, call in calls.items()
    ]
    return interleave(contestants, setting.repeats, budget=0.0 if setting.quick else _SECONDS)


def row(key: str, what: str, samples: Samples, ours: str, peer: str, **more: Any) -> Row:
    """One pair."""
    sides = (Measured(ours, samples[ours]), Measured(peer, samples[peer]))
    return Row(key, what, *sides, ratios(samples[ours], samples[peer]), **more)


def layer(setting: Setting) -> list[Row]:
    """Every kernel that runs on CUDA beside a dense layer."""
    shape = TINY if setting.quick else LAYER
    drawn = moe_layer(shape, setting)
    made = {name: with_kernel(drawn, name) for name in KERNELS}
    with torch.no_grad():
        states = torch.randn(1, shape.tokens, shape.hidden, device=setting.device)
        exact = forward(made["loop"], shape, setting)(states)
        for name, module in made.items():
            with setting.autocast():
                check(name, forward(module, shape, setting)(states), exact, setting)
    dense = dense_layer(shape, setting)
    weights = list(drawn.parameters())
    calls = {name: both_ways(forward(made[name], shape, setting), weights, shape, setting) for name in KERNELS}
    calls[DENSE] = both_ways(dense, dense.parameters(), shape, setting)
    samples = timed(calls, setting)
    best = fastest(samples, KERNELS)
    rows = [row("layer", f"MoE / torch dense ({best})", samples, best, DENSE)]
    rows += [row("layer", f"  {name}", samples, name, DENSE) for name in KERNELS if name != best]
    rates = [shape.flops / seconds for seconds in samples[best]]
    rows.append(_share("layer", best, rates))
    return rows


def _share(key: str, name: str, rates: list[float]) -> Row:
    return Row(key, "  share of the product peak", Measured(name, rates, "FLOP/s"), None, rates, of="gemm", higher=True)


def model(setting: Setting) -> tuple[ModelConfig, list[list[int]], int]:
    """The model of the step, its batch, and the length of a sequence."""
    quick = setting.quick
    hidden, heads, width = (64, 2, 32) if quick else (1024, 16, 512)
    config = shapes.model_config(
        {
            "vocab_size": 512 if quick else 32_768,
            "hidden_size": hidden,
            "num_layers": 2 if quick else 6,
            "attention": shapes.latent(heads, hidden // 2, hidden // 4),
            "leading": {"count": 1, "feed_forward": shapes.dense(hidden * 4)},
            "feed_forward": shapes.moe(
                8 if quick else 64, width, 2 if quick else 6, router={"kind": "sigmoid_biased", "route_scale": 2.5}
            ),
        }
    )
    length = 32 if quick else LENGTH
    return config, shapes.token_ids(config, 2 if quick else 16, length), length


def step(setting: Setting) -> list[Row]:
    """A whole training step beside transformers on the same weights, and the memory of both."""
    config, tokens, length = model(setting)
    context = _context(setting)
    with tempfile.TemporaryDirectory() as temporary:
        run, folder = steps.write_models(config, Path(temporary), length)
        with context.own() as own, context.peer("transformers", "transformers") as peer:
            own.ask("open", path=str(run), device=setting.device)
            own.ask("train", tokens=tokens, kernels={OURS: None}, bf16=setting.bf16)
            contestants = [Contestant(OURS, own.timer("step", trainer=OURS))]
            loss = own.ask("loss", trainer=OURS)["loss"]
            setting.memory[OURS] = _most(own.ask("measured_step", trainer=OURS))
            if peer is not None:
                contestants += _backends(setting, peer, folder, tokens, loss)
            samples = interleave(contestants, setting.repeats, budget=0.0 if setting.quick else _SECONDS)
    setting.notes += context.notes
    setting.versions |= context.versions
    return _step_rows(samples, measure(config, length).training_flops_per_token * len(tokens) * length)


def _context(setting: Setting) -> Context:
    return Context(setting.repeats, setting.quick, torch.get_num_threads(), sys.executable)


def _most(answer: Mapping[str, Any]) -> int:
    return int(answer.get("most", 0))


def _backends(setting: Setting, peer: Peer, folder: Path, tokens: list[list[int]], loss: float) -> list[Contestant]:
    """transformers' ways to compute experts that run here and compute what we do.

    Raises:
        RuntimeError: its loss on the same weights and batch is not `loss`.
    """
    found: list[Contestant] = []
    try:
        peer.ask("open", path=str(folder), device=setting.device)
        peer.ask("train", tokens=tokens, bf16=setting.bf16)
    except PeerError as error:
        setting.notes.append(f"transformers was left out: {error}")
        return found
    for name in ("grouped_mm", "eager"):
        who = f"transformers, {name}"
        try:
            peer.ask("use", experts=name)
            difference = abs(peer.ask("loss")["loss"] - loss)
            setting.memory[who] = _most(peer.ask("measured_step", experts=name))
        except PeerError as error:
            setting.notes.append(f"{who} was left out: {error}")
            continue
        setting.checks[f"{who}, difference of losses"] = difference
        if not difference < _LOSS_TOLERANCE[setting.bf16] * abs(loss):  # a step at a rate of 1e-5 changes far less
            raise RuntimeError(
                f"{who}: its loss on the same weights and batch is off by {difference:.3g} from {loss:.3g}"
            )
        # Eagerly every expert waits for the device: two repetitions are enough to see it.
        found.append(Contestant(who, peer.timer("step", experts=name), 2 if name == "eager" else None))
    return found


def _step_rows(samples: Samples, flops: float) -> list[Row]:
    peers = [name for name in samples if name.startswith("transformers")]
    rows = [row("step", f"training step / {name}", samples, OURS, name) for name in peers]
    return [*rows, _share("step", OURS, [flops / seconds for seconds in samples[OURS]])]


def compiled(setting: Setting) -> Iterator[Row]:
    """Whether torch.compile helps: an MoE layer, its dense peer, and every block of a model in a training step.

    One after the other, so that what is there when time is over is not lost.
    """
    shape = TINY if setting.quick else LAYER
    grouped, dense = with_kernel(moe_layer(shape, setting), "grouped_mm"), dense_layer(shape, setting)
    attempts: dict[str, Callable[[], Row]] = {
        "MoE layer": lambda: _compiled_call(
            "MoE layer", forward(grouped, shape, setting), list(grouped.parameters()), shape, setting
        ),
        DENSE: lambda: _compiled_call(DENSE, dense, dense.parameters(), shape, setting),
        "training step": lambda: _compiled_step(setting),
    }
    for name, attempt in attempts.items():
        try:
            yield attempt()
        except Exception as error:  # what the compiler cannot do is what this part is to find out
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            setting.notes.append(f"torch.compile of the {name} failed: {type(error).__name__}: {lines[0]}")


def _compiled_call(
    name: str, run: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], shape: LayerShape, setting: Setting
) -> Row:
    calls = {
        "eager": both_ways(run, parameters, shape, setting),
        "compiled": both_ways(torch.compile(run), parameters, shape, setting),
    }
    check(f"{name} compiled", calls["compiled"](), calls["eager"](), setting)
    return row("compile", f"{name}, compiled / eager", timed(calls, setting), "compiled", "eager")


def _compiled_step(setting: Setting) -> Row:
    config, tokens, length = model(setting)
    with tempfile.TemporaryDirectory() as temporary, _context(setting).own() as own:
        own.ask("open", path=str(shapes.write_run(config, Path(temporary) / "run", length)), device=setting.device)
        kernels = dict.fromkeys((OURS, COMPILED))
        own.ask("train", tokens=tokens, kernels=kernels, bf16=setting.bf16, compiled=[COMPILED])
        losses = [own.ask("loss", trainer=name)["loss"] for name in kernels]
        if not abs(losses[0] - losses[1]) < _LOSS_TOLERANCE[setting.bf16] * abs(losses[0]):
            raise PeerError(f"losses with and without torch.compile differ: {losses}")
        contestants = [Contestant(name, own.timer("step", trainer=name)) for name in kernels]
        samples = interleave(contestants, setting.repeats, budget=0.0 if setting.quick else _SECONDS)
    return row("compile", "training step, compiled / eager", samples, COMPILED, OURS)


PARTS: dict[str, Callable[[Setting], Iterable[Row]]] = {"layer": layer, "step": step, "compile": compiled}


def main(given: Sequence[str] | None = None) -> int:
    """Measure one part and write what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parts", description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args(given)
    os.environ["FINEMOE_NATIVE"] = "0"  # our C++ is for CPUs: no time to compile it here
    setting = Setting(wanted.device, wanted.quick, wanted.repeats)
    setting.measure_peaks()
    rows: list[Row] = []
    for one in PARTS[wanted.part](setting):
        rows.append(one)
        _write(wanted.out, rows, setting)
    setting.measure_peaks()
    _write(wanted.out, rows, setting)
    return 0


def _write(out: Path, rows: Sequence[Row], setting: Setting) -> None:
    """In one rename: whoever is stopped leaves a whole file or none."""
    half = out.with_suffix(".half")
    half.write_text(json.dumps({"rows": [asdict(one) for one in rows], **asdict(setting)}), encoding="utf-8")
    half.replace(out)


if __name__ == "__main__":
    raise SystemExit(main())
