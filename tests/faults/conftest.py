"""The corpus that the tests of this folder train on."""

from runs.tiny_runs import corpus

__all__ = ["corpus"]
