"""A run in float64: `python -m finemoe.runs.planning.in_double RECIPE OUT`, under torchrun or alone.

In float32 the order of additions decides near-ties of routers and the sign of gradients that are next to nothing, and
after some steps that is all that can be seen. In float64 it decides nothing: what differs is an error.
"""

from __future__ import annotations

import sys

import torch

from finemoe.core.errors import FinemoeError
from finemoe.runs.run import train


def main(recipe: str, out: str) -> int:
    """Train, and say what went wrong as the command line does; the exit status."""
    torch.set_default_dtype(torch.float64)
    try:
        train(recipe, out=out, quiet=True)
    except FinemoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
