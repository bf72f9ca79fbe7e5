"""Every test has a place of its own for its sandboxes."""

import pytest

pytest.register_assert_rewrite("sandbox.hostile")

from sandbox.hostile import place  # noqa: E402

__all__ = ["place"]
