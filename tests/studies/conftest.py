"""The corpus that the tests of this folder train on."""

import pytest

pytest.register_assert_rewrite("training.tiny_runs")

from training.tiny_runs import corpus  # noqa: E402

__all__ = ["corpus"]
