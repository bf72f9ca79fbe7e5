"""Dense models: DeepSeek LLM, DeepSeek-Coder, the bases of the distilled R1 models, SmolLM2.

Sources: DeepSeek LLM (2401.02954) Table 2, DeepSeek-Coder (2401.14196) section 3, DeepSeek-R1 (2501.12948) section 2.4
for which bases were taken. What those do not print (vocabularies, rotary bases, context, norm epsilons, the shapes of
the Llama, Qwen and SmolLM2 bases) is as in the configurations released with the weights.
"""

from __future__ import annotations

from typing import Any

from finemoe.model.presets.preset import Preset, Table, attention, dense


def _llm(layers: int, hidden: int, width: int, heads: Table) -> Table:
    return {
        "vocab_size": 102_400,
        "hidden_size": hidden,
        "num_layers": layers,
        "max_positions": 4096,
        "attention": heads,
        "feed_forward": dense(width),
    }


DEEPSEEK_LLM: dict[str, Preset] = {
    "deepseek-llm-7b": Preset("MHA", _llm(30, 4096, 11008, attention(32, 128)), 4096, {11008: 8 / 3 * 4096}),
    "deepseek-llm-67b": Preset(
        "GQA, 8 key heads", _llm(95, 8192, 22016, attention(64, 128, 8)), 4096, {22016: 8 / 3 * 8192}
    ),
}


def _coder(summary: str, layers: int, hidden: int, width: int, num_kv_heads: int | None = None) -> Preset:
    # The released form: trained on 4K tokens, then stretched to 16K by a larger base and positions divided by 4.
    rope = {"theta": 100_000.0, "layout": "half_split", "scaling": {"kind": "linear", "factor": 4.0}}
    model = {
        "vocab_size": 32_256,
        "hidden_size": hidden,
        "num_layers": layers,
        "max_positions": 16_384,
        "attention": attention(hidden // 128, 128, num_kv_heads, rope=rope),
        "feed_forward": dense(width),
    }
    return Preset(summary, model, 4096)


DEEPSEEK_CODER: dict[str, Preset] = {
    "deepseek-coder-1.3b": _coder("MHA, 16K context", 24, 2048, 5504),
    "deepseek-coder-6.7b": _coder("MHA, 16K context", 32, 4096, 11008),
    "deepseek-coder-33b": _coder("GQA, 16K context", 62, 7168, 19200, 8),
}

_LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ROPE = {"theta": 500_000.0, "layout": "half_split", "scaling": {**_LLAMA3, "original_max_positions": 8192}}


def _base(summary: str, vocab: int, layers: int, hidden: int, width: int, heads: Table, norm_eps: float) -> Preset:
    model = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": layers,
        "max_positions": 131_072,
        "norm_eps": norm_eps,
        "attention": heads,
        "feed_forward": dense(width),
    }
    return Preset(summary, model, 32_768)  # the distillation's


def _qwen(num_heads: int, num_kv_heads: int, theta: float) -> Table:
    rope: dict[str, Any] = {"theta": theta, "layout": "half_split"}
    return attention(num_heads, 128, num_kv_heads, qkv_bias=True, rope=rope)


def _llama(num_heads: int) -> Table:
    return attention(num_heads, 128, 8, rope=_LLAMA3_ROPE)


R1_DISTILL: dict[str, Preset] = {
    "deepseek-r1-distill-qwen-1.5b": _base("Qwen2.5-Math", 151_936, 28, 1536, 8960, _qwen(12, 2, 1e4), 1e-6),
    "deepseek-r1-distill-qwen-7b": _base("Qwen2.5-Math", 152_064, 28, 3584, 18944, _qwen(28, 4, 1e4), 1e-6),
    "deepseek-r1-distill-qwen-14b": _base("Qwen2.5", 152_064, 48, 5120, 13824, _qwen(40, 8, 1e6), 1e-5),
    "deepseek-r1-distill-qwen-32b": _base("Qwen2.5", 152_064, 64, 5120, 27648, _qwen(40, 8, 1e6), 1e-5),
    "deepseek-r1-distill-llama-8b": _base("Llama 3.1", 128_256, 32, 4096, 14336, _llama(32), 1e-5),
    "deepseek-r1-distill-llama-70b": _base("Llama 3.3", 128_256, 80, 8192, 28672, _llama(64), 1e-5),
}

SMOLLM2: dict[str, Preset] = {
    "smollm2-135m": Preset(
        "GQA, tied, 8K context",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "num_layers": 30,
            "tie_embeddings": True,
            "init_std": 0.0417,  # 1 / sqrt(576)
            "norm_eps": 1e-5,
            "max_positions": 8192,
            "attention": attention(9, 64, 3, rope={"theta": 100_000.0, "layout": "half_split"}),
            "feed_forward": dense(1536),
        },
        8192,
    ),
}
