"""Distillation: a student learns what a teacher makes of each next token, or what it wrote."""

from finemoe.methods.distillation.method import DistillConfig, build

__all__ = ["DistillConfig", "build"]
