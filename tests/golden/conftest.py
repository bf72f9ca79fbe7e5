"""The corpus that the tests of this folder train on."""

import pytest

pytest.register_assert_rewrite("runs.tiny_runs")

from runs.tiny_runs import corpus  # noqa: E402

__all__ = ["corpus"]
