"""The register tile of `gemm.h` and how many columns it packs at once: chosen for this processor by measuring.

Makers of processors differ in how many products a cycle ends and in what the second cache holds, so that no tile is the
best everywhere. What is chosen changes no bit of any result: every sum is made in the same order by each of them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finemoe.core.logs import logger

TILES = tuple((f"-DFINEMOE_TILE={tile}", f"-DFINEMOE_BLOCK={block}") for block in (512, 256, 1024) for tile in (0, 1))
"""Sets of flags; the first is what `gemm.h` has by itself."""
CLEARLY = 0.9
"""Another is taken where it needs at most this share of the first one's time: less is noise, or not worth a word."""
_SOURCE = Path(__file__).parent / "probe" / "products.cpp"
_ROUNDS = 7
_PATIENCE = 60.0  # seconds for one measurement, on however busy a machine

Timer = Callable[[Sequence[Path]], Sequence[float]]
"""Seconds of each of several programs."""


def in_turns(programs: Sequence[Path]) -> list[float]:
    """The least that each says of itself, run in turns, so that a busy moment meets all of them.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: one does not run, or says no number.
    """
    best = [float("inf")] * len(programs)
    for _ in range(_ROUNDS):
        for number, program in enumerate(programs):
            said = subprocess.run([program], capture_output=True, check=True, timeout=_PATIENCE).stdout
            best[number] = min(best[number], float(said))
    return best


def fastest(compiler: str, flags: Sequence[str], timer: Timer = in_turns) -> tuple[str, ...]:
    """Flags of the fastest of TILES, beside `flags`; none where those name a tile, or where it cannot be measured.

    Args:
        compiler: path of a C++ compiler.
        flags: with which the kernels are compiled.
        timer: measures; tests give their own.
    """
    if any(flag.startswith("-DFINEMOE_TILE") for flag in flags):
        return ()
    try:
        with tempfile.TemporaryDirectory(prefix="finemoe-tile-", ignore_cleanup_errors=True) as folder:
            programs = [Path(folder) / f"products-{number}" for number in range(len(TILES))]
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(
                    pool.map(
                        lambda one: _compiled(compiler, (*flags, *one[0]), one[1]), zip(TILES, programs, strict=True)
                    )
                )
            seconds = timer(programs)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.debug("no tile was measured: %s", error)
        return ()
    best = min(range(len(TILES)), key=lambda number: seconds[number])
    said = ", ".join(f"{' '.join(tile)} {one * 1e3:.4g} ms" for tile, one in zip(TILES, seconds, strict=True))
    logger.debug("tiles: %s", said)
    if not seconds[best] <= CLEARLY * seconds[0]:
        return ()
    logger.info(
        "products take %.2f of the usual tile's time with %s", seconds[best] / seconds[0], " ".join(TILES[best])
    )
    return TILES[best]


def _compiled(compiler: str, flags: Sequence[str], program: Path) -> None:
    command = [compiler, *flags, str(_SOURCE), "-o", str(program)]
    subprocess.run(command, capture_output=True, check=True, timeout=5 * _PATIENCE)
