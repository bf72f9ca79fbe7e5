"""`finemoe.runs.planning.in_double` with an error in it: some gradients stay what each copy made of them."""

from __future__ import annotations

import sys
from typing import Any

from finemoe.parallel.processes import Processes
from finemoe.runs.planning.in_double import main

LEFT_OUT = 8  # rows: those of routers of eight experts among them

right = Processes.sum_gradients


def all_but_some(self: Processes, parameters: Any) -> None:
    """What copies do, but for weights of so many rows."""
    right(self, [one for one in parameters if one.shape[0] != LEFT_OUT])


if __name__ == "__main__":
    Processes.sum_gradients = all_but_some  # type: ignore[method-assign]
    sys.exit(main(*sys.argv[1:]))
