"""Kimi K2: DeepSeek-V3 in every field, under a `model_type` of its own. Its code lies in its repository."""

from __future__ import annotations

from finemoe.checkpoint.huggingface.families.deepseek_v3 import V3_DEFAULTS, read_v3, write_v3
from finemoe.checkpoint.huggingface.family import Family

FAMILY = Family("kimi_k2", "DeepseekV3ForCausalLM", read_v3, write_v3, defaults=V3_DEFAULTS, native=False, modules=True)
