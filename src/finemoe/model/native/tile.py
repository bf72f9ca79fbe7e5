"""The register tile of `gemm.h` and how many columns it packs at once: chosen for this processor by measuring.

Makers of processors differ in how many products a cycle ends and in what the second cache holds, so that no tile is the
best everywhere. What is chosen changes no bit of any result: every sum is made in the same order by each of them.
"""

from __future__ import annotations

from finemoe.core.extension import Probe

PRODUCTS = Probe(
    "probe/products.cpp",
    tuple((f"-DFINEMOE_TILE={tile}", f"-DFINEMOE_BLOCK={block}") for block in (512, 256, 1024) for tile in (0, 1)),
)
"""Of every tile and number of columns how long the products of a mixture take, forward and backward."""
