"""The benchmarks are scripts beside the package, not a part of it: let the tests import them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
