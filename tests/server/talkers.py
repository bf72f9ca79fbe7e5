"""Runs with drawn weights, of a small mixture that says, thinks and calls what its text is forced to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer

CHAT = (
    "{% if tools %}[tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>]\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% if enable_thinking %}<think>{% endif %}{% endif %}{# </think> #}"
)
TEXTS = ["def main():\n    return 1\n", '{"name": "weather", "arguments": {"city": "Ulm"}}', "<think> </tool_call>"] * 5
MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_layers": 3,
    "attention": {"kind": "grouped_query", "num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
    "leading": {"count": 1, "feed_forward": {"kind": "dense", "ffn_hidden_size": 48}},
    "feed_forward": {
        "kind": "moe",
        "num_shared_experts": 1,
        "num_routed_experts": 8,
        "experts_per_token": 2,
        "expert_hidden_size": 16,
        "router": {"kind": "sigmoid_biased", "num_groups": 4, "groups_per_token": 2},
    },
    "mtp_depth": 1,
    "init_std": 0.12,
}
LENGTH = 256


def write_run(folder: Path, *, chat: bool, seed: int = 1, **changes: Any) -> Path:
    """A run with drawn weights."""
    folder.mkdir(parents=True)
    config = expand(resolve({**MODEL, **changes}, "test"))
    model = Transformer(config)
    initialize(model, seed=seed)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": LENGTH}})
    (folder / "config.json").write_text(text)
    save(folder / "checkpoints", 1, RunState(model.state_dict(), {}, {"step": 1}, text), keep=1)
    Tokenizer.train(TEXTS, vocab_size=300).save(folder / "tokenizer.json")
    if chat:
        table = {"eos_token": "<|end_of_text|>", "chat_template": CHAT}
        (folder / "tokenizer_config.json").write_text(json.dumps(table))
    return folder
