"""What the machine can do at most, measured again and again through a run: products and reading memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from benchmarks.speed.timing import Spread, calling
from torch import Tensor
from torch.nn import functional as F

from finemoe.model import native
from finemoe.model.native.linear import linear

SIZES = (768, 1024, 1536, 2048, 3072)
"""Of the square matrices of torch.mm."""
READ_BYTES = 400_000_000
_COLUMNS = 4000
REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "amax": torch.amax,
    "norm": torch.linalg.vector_norm,
    "dot": lambda tensor: torch.dot(*tensor.chunk(2)),
    "torch product with one row": lambda tensor: F.linear(torch.ones(1, _COLUMNS), tensor.view(-1, _COLUMNS)),
}
_CALLS = 3  # of which the best counts


class Peaks:
    """Samples of both peaks. One sample is the best of all sizes, or of all reductions."""

    def __init__(self, sizes: Sequence[int] = SIZES, read_bytes: int = READ_BYTES) -> None:
        self._sizes = sizes
        self._read_bytes = read_bytes
        self.samples: dict[str, list[float]] = {"gemm": [], "bandwidth": []}
        """FLOP/s and bytes/s."""
        self.best: dict[str, str] = {}
        """Which size and which reduction the last samples are of."""

    def measure(self) -> None:
        """Take a sample of each."""
        self._add("gemm", {f"{size}": _product_rate(size) for size in self._sizes})
        tensor = torch.ones(self._read_bytes // 4)
        readers = dict(REDUCTIONS)
        if native.available():  # torch's reductions do not always reach what the memory gives
            readers["native product with one row"] = _native_product
        seconds = {name: _best_seconds(lambda f=f: f(tensor)) for name, f in readers.items()}  # type: ignore[misc]
        self._add("bandwidth", {name: tensor.nbytes / one for name, one in seconds.items()})

    def _add(self, name: str, rates: Mapping[str, float]) -> None:
        self.best[name] = max(rates, key=lambda key: rates[key])
        self.samples[name].append(rates[self.best[name]])

    def spreads(self) -> dict[str, Spread]:
        """Median and quartiles of what was measured so far."""
        return {name: Spread.of(samples) for name, samples in self.samples.items() if samples}


def _native_product(tensor: Tensor) -> Tensor:
    return linear(torch.ones(1, _COLUMNS), tensor.view(-1, _COLUMNS))


def _product_rate(size: int) -> float:
    left, right = torch.randn(size, size), torch.randn(size, size)
    output = torch.empty(size, size)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=output))


def _best_seconds(function: Callable[[], Tensor]) -> float:
    function()
    return min(calling(function)() for _ in range(_CALLS))
