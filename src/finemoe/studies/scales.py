"""Scales at which `finemoe paper` runs: the same arms, from a minute to a night."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """One size of the study, as a comparison's recipe without its arms."""

    about: str
    recipe: Mapping[str, Any]


SCALES: Mapping[str, Scale] = {
    "trial": Scale(
        "a few minutes: shows that it runs; its verdicts mean nothing",
        {
            "seeds": [0, 1],
            "base": {"preset": "tiny-dense", "num_layers": 1, "vocab_size": 512},
            "budget": {"kind": "tokens", "value": 40_960},
            "data": {
                "max_validation_tokens": 8_192,
                "sequence_length": 128,
                "corpus": {"kind": "stdlib", "max_bytes": 1_000_000},
            },
            "training": {"tokens_per_step": 2_048, "evaluate_every": 10},
        },
    ),
    "tiny": Scale(
        "an hour or two on two cores: width 64, 2 layers, 2 M tokens a run",
        {
            "seeds": [0, 1, 2],
            "base": {"preset": "tiny-dense", "num_layers": 2},
            "budget": {"kind": "tokens", "value": 2_000_000},
            "data": {
                "max_validation_tokens": 131_072,
                "splitting": "finemoe",
            },  # as the paper in miniature was recorded
            "training": {"tokens_per_step": 4_096, "evaluate_every": 98},
        },
    ),
    "small": Scale(
        "a day on two cores: width 128, 4 layers, 8 M tokens a run",
        {
            "seeds": [0, 1, 2],
            "base": {
                "preset": "tiny-dense",
                "vocab_size": 4096,
                "hidden_size": 128,
                "num_layers": 4,
                "init_std": 0.019,
                "attention": {"num_heads": 4, "num_kv_heads": 4},
                "feed_forward": {"ffn_hidden_size": 352},
            },
            "budget": {"kind": "tokens", "value": 8_000_000},
            "data": {"max_validation_tokens": 262_144, "corpus": {"kind": "stdlib", "include_tests": True}},
            "training": {"tokens_per_step": 8_192},
            "optimizer": {"learning_rate": 3e-3},
        },
    ),
}
"""Texts are the interpreter's own standard library; `--set data.corpus...` takes others."""
