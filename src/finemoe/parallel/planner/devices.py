"""Accelerators as data: what their makers print of them. A plan asks nothing else of a device.

Peaks are of dense products, without the sparsity that data sheets double them by. Links are one way, a device: within a
domain over NVLink, beyond it over the network card that each device has in the makers' reference systems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finemoe.core.config import did_you_mean
from finemoe.core.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp8"]
Family = Literal["ampere", "hopper", "blackwell", "here"]


@dataclass(frozen=True)
class Device:
    """One accelerator, or a machine without one, in a system of many."""

    name: str
    peak: Mapping[Precision, float]
    """[FLOP/s] By the precision of the products."""
    memory: int
    """[bytes] That a process can have."""
    bandwidth: float
    """[bytes/s] Of that memory."""
    domain: int
    """[devices] Joined by `link`; beyond them there is `network`."""
    link: float
    """[bytes/s] One way, a device."""
    network: float
    """[bytes/s] One way, a device."""
    family: Family
    """Whose published times a plan's constants and interval come from."""
    source: str

    def flops(self, precision: Precision) -> float:
        """Peak in a precision.

        Raises:
            ConfigError: the device has no products of that kind.
        """
        if precision not in self.peak:
            raise ConfigError(f"{self.name} has no {precision} products: use --precision {', '.join(self.peak)}")
        return self.peak[precision]

    def counted(self, number: int) -> str:
        """So many of them in words: `64 h100`, `2 processes here`."""
        return f"{number:,} process{'es' * (number != 1)} here" if self.family == "here" else f"{number:,} {self.name}"

    def between(self, processes: int) -> float:
        """[bytes/s] What limits neighbours among so many devices: the link where one domain holds them all."""
        return self.link if processes <= self.domain else self.network


def _hopper(name: str, memory: int, bandwidth: float, link: float, source: str) -> Device:
    peak: Mapping[Precision, float] = {"fp32": 66.9e12, "bf16": 989.4e12, "fp8": 1978.9e12}
    return Device(name, peak, memory, bandwidth, 8, link, 50e9, "hopper", source)


def _blackwell(name: str, watts: int, memory: int, domain: int, network: float, source: str) -> Device:
    # One and the same chip, held back by its power: GB300's sheet prints no more dense FLOP/s than GB200's, and its
    # runs are faster by the ratio of their watts. So FLOP/s are GB200's, as printed, in proportion to power.
    bf16 = 2500e12 * watts / 1200
    peak: Mapping[Precision, float] = {"fp32": bf16 / 31, "bf16": bf16, "fp8": 2 * bf16}
    return Device(name, peak, memory, 8e12, domain, 900e9, network, "blackwell", source)


_GIB = 1 << 30
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(
            "a100", {"fp32": 19.5e12, "bf16": 312e12}, 79 * _GIB, 2.039e12, 8, 300e9, 25e9, "ampere",
            "NVIDIA A100 80GB SXM data sheet; DGX A100: one 200 Gb/s card a device",
        ),
        _hopper("h100", 79 * _GIB, 3.35e12, 450e9, "NVIDIA H100 SXM data sheet; DGX H100: one 400 Gb/s card a device"),
        _hopper(
            "h800", 79 * _GIB, 3.35e12, 200e9,
            "as H100, with NVLink cut to 400 GB/s both ways; DeepSeek-V3 (2412.19437) 3.1: 8 a node, InfiniBand",
        ),
        _hopper("h200", 139 * _GIB, 4.8e12, 450e9, "NVIDIA H200 SXM data sheet; DGX H200"),
        _blackwell("b200", 1000, 178 * _GIB, 8, 50e9, "NVIDIA DGX B200 data sheet; 178 GiB as torch reports them"),
        _blackwell("b300", 1100, 267 * _GIB, 8, 100e9, "NVIDIA DGX B300 data sheet"),
        _blackwell("gb200", 1200, 172 * _GIB, 72, 50e9, "NVIDIA GB200 NVL72 data sheet"),
        _blackwell("gb300", 1400, 259 * _GIB, 72, 100e9, "NVIDIA GB300 NVL72 data sheet"),
    )
}  # fmt: skip
"""By name. `here` is not among them: what this machine can do is measured, and handed in."""


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ConfigError: naming the closest.
    """
    if name.lower() not in DEVICES:
        raise ConfigError(f"--device {name!r}: unknown{did_you_mean(name.lower(), [*DEVICES, 'here'])}")
    return DEVICES[name.lower()]


def this_machine(
    *, product_flops: float, memory: int, bandwidth: float, processes: int = 1, precision: Precision = "fp32"
) -> Device:
    """The machine that this runs on, from what was measured on it.

    Args:
        product_flops: [FLOP/s] of one process's large products, as reached, not as printed.
        memory: [bytes] for all its processes.
        bandwidth: [bytes/s] of one process.
        processes: that share it: they talk through its memory.
        precision: of the products that were measured.
    """
    return Device(
        "here", {precision: product_flops}, memory // processes, bandwidth, processes, 0.5e9, 0.5e9, "here",
        "measured: a large product and a large copy; gloo between processes of one machine moves about 0.5 GB/s",
    )  # fmt: skip
