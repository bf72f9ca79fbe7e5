"""Throughputs and memory that others have published: what the planner is fitted on, and what it is judged on.

NVIDIA's are of Megatron-Bridge, docs/performance-summary-archive.md at 0a25f91, releases 25.09, 25.11 and 26.02. Their
routing is forced to balance; runs that drop tokens are left out. Who fits and who judges follows from the order of
POINTS alone, every second one each, drawn up before anything was fitted. BESIDE are more rows of the same archive, of
no part in the fit. Two published figures tell no layout and can be neither: DeepSeek 67B at 300.6K H800-hours a
trillion tokens (V2 report), and V3 on B200 at 651 to 918 tokens a second (pytorch.org, March 2026).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import resolve
from finemoe.parallel.planner.devices import Precision
from finemoe.parallel.planner.schedules import Schedule

Stack = Literal["tuned", "torch"]
"""What a run's software is: kernels made for the device (Megatron, DeepSeek's own), or PyTorch's (torchtitan)."""


@dataclass(frozen=True)
class Point:
    """One published throughput, with all that a plan needs to know of the run."""

    name: str
    model: str
    device: str
    devices: int
    precision: Precision
    tensor: int
    pipeline: int
    virtual: int
    expert: int
    context: int
    sequences: int
    """[sequences] A step."""
    micro_batch: int
    """[sequences]"""
    seq_len: int
    rate: float
    """[tokens/s] A device, as published."""
    schedule: Schedule = "interleaved"
    stack: Stack = "tuned"
    once_a_node: bool = True
    graphs: bool = False
    source: str = ""


_V3 = "DeepSeek-V3 report, 2412.19437: 180K H800-hours a trillion tokens, 2.664M for 14.8T"
_V2 = "DeepSeek-V2 report, 2405.04434: 172.8K H800-hours a trillion tokens; devices are not printed, 1024 are assumed"
_16B = "torchtitan issue 1789, micro-batch lowered to fit; 4 is assumed"
_NOUS = "NousResearch/torchtitan 19, with DeepEP; sequences of 4096 are assumed"
_Row = tuple[str, str, str, int, Precision, int, int, int, int, int, int, int, int, float]
_OF_THE_ISSUE: tuple[_Row, ...] = (
    # model, device, release, devices, precision, TP, PP, VP, EP, CP, sequences, micro-batch, length, tokens/s a device
    ("deepseek-v3", "h800", _V3, 2048, "fp8", 1, 16, 1, 64, 1, 15360, 1, 4096, 1543),
    ("deepseek-v2", "h800", _V2, 1024, "bf16", 1, 16, 1, 8, 1, 9216, 1, 4096, 1608),
    ("deepseek-v3", "h100", "25.09", 1024, "fp8", 2, 8, 4, 64, 1, 8192, 1, 4096, 1297),
    ("deepseek-v3-no-mtp", "gb300", "25.11", 256, "bf16", 1, 2, 4, 32, 1, 4096, 1, 4096, 3848),
    ("deepseek-v3-no-mtp", "gb300", "25.11", 256, "fp8", 1, 2, 4, 32, 1, 4096, 1, 4096, 4357),
    ("deepseek-v3", "gb300", "26.02", 256, "fp8", 1, 2, 8, 32, 1, 4096, 2, 4096, 4612),
    ("deepseek-v3-no-mtp", "gb200", "25.11", 256, "bf16", 1, 4, 4, 64, 1, 4096, 1, 4096, 3139),
    ("deepseek-v3-no-mtp", "gb200", "25.11", 256, "fp8", 1, 8, 4, 32, 1, 4096, 1, 4096, 4018),
    ("deepseek-v3", "gb200", "26.02", 256, "fp8", 1, 4, 4, 64, 1, 4096, 1, 4096, 3955),
    ("deepseek-v3", "b200", "25.11", 256, "fp8", 1, 16, 1, 8, 1, 2048, 1, 4096, 2139),
    ("deepseek-v3", "b200", "26.02", 256, "fp8", 1, 16, 1, 8, 1, 4096, 1, 4096, 2689),
    ("qwen3-235b-a22b", "h100", "25.11", 256, "fp8", 2, 8, 4, 32, 1, 2048, 1, 4096, 1575),
    ("qwen3-235b-a22b", "h100", "26.02", 256, "fp8", 2, 8, 4, 32, 1, 8192, 1, 4096, 1633),
    ("qwen3-235b-a22b", "gb300", "25.11", 256, "bf16", 1, 4, 12, 16, 1, 8192, 2, 4096, 6131),
    ("qwen3-235b-a22b", "gb200", "25.11", 256, "bf16", 1, 8, 3, 32, 1, 8192, 1, 4096, 4916),
    ("qwen3-30b-a3b", "h100", "25.11", 16, "fp8", 1, 2, 24, 8, 1, 512, 2, 4096, 5275),
    ("qwen3-30b-a3b", "gb300", "25.11", 8, "fp8", 1, 1, 1, 8, 1, 512, 4, 4096, 28934),
    ("qwen3-30b-a3b", "gb200", "25.11", 8, "fp8", 1, 1, 1, 8, 1, 512, 4, 4096, 23766),
    ("llama3-8b", "h100", "25.11", 8, "fp8", 1, 1, 1, 1, 1, 128, 1, 8192, 14451),
    ("llama3-70b", "h100", "25.11", 64, "fp8", 4, 8, 5, 1, 1, 128, 1, 8192, 1602),
    ("llama3-405b", "h100", "25.11", 1024, "fp8", 8, 8, 8, 1, 2, 512, 1, 8192, 292),
    ("deepseek-v3-16b", "h100", _16B, 8, "bf16", 1, 1, 1, 8, 1, 32, 4, 4096, 11600),
    ("qwen3-30b-a3b", "b200", _NOUS, 8, "bf16", 1, 1, 1, 8, 1, 64, 8, 4096, 14796),
)
_MORE: tuple[_Row, ...] = (
    ("deepseek-v3", "b300", "26.02", 256, "fp8", 1, 16, 1, 8, 1, 4096, 1, 4096, 2983),
    ("qwen3-30b-a3b", "gb300", "26.02", 8, "fp8", 1, 1, 1, 8, 1, 512, 8, 4096, 30376),
    ("qwen3-30b-a3b", "gb200", "26.02", 8, "fp8", 1, 1, 1, 8, 1, 512, 4, 4096, 26084),
    ("qwen3-30b-a3b", "b300", "26.02", 8, "fp8", 1, 1, 1, 8, 1, 512, 8, 4096, 29521),
    ("qwen3-30b-a3b", "b200", "26.02", 8, "fp8", 1, 1, 1, 8, 1, 512, 1, 4096, 9691),
    ("qwen3-30b-a3b", "h100", "26.02", 16, "fp8", 1, 2, 12, 8, 1, 1024, 1, 4096, 5113),
    ("qwen3-235b-a22b", "gb300", "26.02", 256, "fp8", 1, 4, 1, 32, 1, 8192, 2, 4096, 6583),
    ("qwen3-235b-a22b", "gb200", "26.02", 256, "fp8", 1, 8, 1, 32, 1, 8192, 1, 4096, 5448),
    ("qwen3-235b-a22b", "b300", "26.02", 256, "fp8", 1, 8, 4, 8, 1, 8192, 1, 4096, 2691),
    ("qwen3-235b-a22b", "b200", "26.02", 256, "fp8", 1, 8, 1, 8, 1, 8192, 1, 4096, 3805),
    ("qwen3-235b-a22b", "b200", "25.11", 64, "fp8", 1, 8, 2, 8, 1, 1024, 1, 4096, 3269),
    ("qwen3-30b-a3b", "b200", "25.11", 8, "fp8", 1, 1, 1, 8, 1, 512, 1, 4096, 9299),
    ("llama3-70b", "h100", "26.02", 64, "fp8", 4, 8, 5, 1, 1, 256, 1, 8192, 1621),
    ("llama3-405b", "h100", "26.02", 1024, "fp8", 8, 8, 8, 1, 2, 1536, 1, 8192, 311),
    ("llama3-8b", "b200", "25.11", 8, "fp8", 1, 1, 1, 1, 1, 128, 2, 8192, 30624),
    ("llama3-8b", "gb200", "25.11", 8, "fp8", 1, 1, 1, 1, 1, 128, 2, 8192, 31508),
    ("llama3-8b", "gb300", "25.11", 8, "fp8", 1, 1, 1, 1, 1, 128, 2, 8192, 37556),
    ("llama3-405b", "b200", "25.11", 128, "fp8", 4, 8, 8, 1, 2, 64, 1, 8192, 661),
    ("llama3-405b", "gb200", "26.02", 256, "fp8", 4, 16, 4, 1, 1, 1536, 1, 8192, 793),
    ("llama3-405b", "gb300", "26.02", 256, "fp8", 4, 8, 4, 1, 1, 1536, 1, 8192, 988),
)


def _point(row: _Row) -> Point:
    (
        model,
        device,
        note,
        devices,
        precision,
        tensor,
        pipeline,
        virtual,
        expert,
        context,
        sequences,
        micro,
        length,
        rate,
    ) = row
    schedule: Schedule = "1f1b" if virtual == 1 else "interleaved"
    if device == "h800":
        schedule = "dualpipe" if model == "deepseek-v3" else "zb1p"
    released = f"Megatron-Bridge {note}" if note[0].isdigit() else note
    named = f"{model} on {devices} {device.upper()}, {precision.upper()}"
    # As in scripts/performance/configs there: recorded launches on Grace systems, and rows once a node but for these.
    plain = model.startswith("qwen") and (device == "h100" or (device in ("b200", "b300") and "235b" in model))
    stack: Stack = "torch" if "torchtitan" in note else "tuned"
    return Point(
        f"{named} ({note})" if note[0].isdigit() else named, model, device, devices, precision, tensor, pipeline,
        virtual, expert, context, sequences, micro, length, rate, schedule, stack, not plain,
        device in ("gb200", "gb300"), released,
    )  # fmt: skip


POINTS: tuple[Point, ...] = tuple(map(_point, _OF_THE_ISSUE))
FITTED: tuple[Point, ...] = POINTS[::2]
JUDGED: tuple[Point, ...] = POINTS[1::2]
BESIDE: tuple[Point, ...] = tuple(map(_point, _MORE))
V3_RUN: Point = POINTS[0]
V3_TOKENS = 14.8e12
V3_HOURS = 2.664e6

FLOPS: tuple[tuple[str, int, float, float], ...] = (
    ("deepseek-v3-no-mtp", 4096, 961, 3848),
    ("deepseek-v3", 4096, 338, 1297),
    ("qwen3-30b-a3b", 4096, 666, 28934),
    ("qwen3-235b-a22b", 4096, 907, 6131),
    ("llama3-8b", 8192, 744, 14451),
    ("llama3-70b", 8192, 719, 1602),
    ("llama3-405b", 8192, 737, 292),
)
"""Model, tokens of a sequence, TFLOP/s and tokens/s a device of one run each (Megatron-Bridge, as above)."""

MEMORY_MODEL = "qwen3-30b-a3b"
MEMORY: tuple[tuple[int, float], ...] = ((8, 167.93), (16, 138.75), (32, 124.58), (64, 117.50), (128, 114.78))
"""Devices and GiB of each, everything sharded over all, experts over 8 of them (NousResearch/torchtitan 19)."""


def _with_heads(vocab: int, layers: int, hidden: int, heads: int, kv_heads: int, feed_forward: Any) -> dict[str, Any]:
    attention = {"kind": "grouped_query", "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 128}
    if feed_forward["kind"] == "moe":
        attention["qk_norm"] = "head"
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": layers,
        "attention": attention,
        "feed_forward": feed_forward,
    }


def _qwen(layers: int, hidden: int, heads: int, width: int) -> dict[str, Any]:
    experts = {"kind": "moe", "num_routed_experts": 128, "experts_per_token": 8, "expert_hidden_size": width}
    return _with_heads(151_936, layers, hidden, heads, 4, {**experts, "router": {"kind": "softmax_topk"}})


def _llama(layers: int, hidden: int, heads: int, width: int) -> dict[str, Any]:
    return _with_heads(128_256, layers, hidden, heads, 8, {"kind": "dense", "ffn_hidden_size": width})


# Qwen3 (2505.09388) and Llama 3 (2407.21783), as in the configurations released with their weights.
_TABLES: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"preset": "deepseek-v3"},
    "deepseek-v3-no-mtp": {"preset": "deepseek-v3", "mtp_depth": 0},
    "deepseek-v3-16b": {"preset": "deepseek-v2-lite"},  # torchtitan's name for a model of this shape
    "deepseek-v2": {"preset": "deepseek-v2"},
    "qwen3-30b-a3b": _qwen(48, 2048, 32, 768),
    "qwen3-235b-a22b": _qwen(94, 4096, 64, 1536),
    "llama3-8b": _llama(32, 4096, 32, 14336),
    "llama3-70b": _llama(80, 8192, 64, 28672),
    "llama3-405b": _llama(126, 16384, 128, 53248),
}


@functools.cache
def model_of(name: str) -> ModelConfig:
    """The configuration of a model that a point names."""
    return expand(resolve(_TABLES[name], f"published model {name}"))
