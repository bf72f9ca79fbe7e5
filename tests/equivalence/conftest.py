"""The corpus that the tests of this folder train on."""

from training.tiny_runs import corpus

__all__ = ["corpus"]
