"""A recipe of stages that takes seconds: sums modulo 5, a model of one layer, and claims about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.core.errors import FinemoeError
from finemoe.studies.fleet import Outcome
from finemoe.studies.staged.worker import Job, run

RECIPE = """
seed = 0
[model]
hidden_size = 16
num_layers = 1
vocab_size = 257
attention = { kind = "grouped_query", num_heads = 1, num_kv_heads = 1, head_dim = 16 }
[model.feed_forward]
kind = "moe"
num_routed_experts = 4
num_shared_experts = 1
experts_per_token = 2
expert_hidden_size = 16
router = { kind = "softmax_topk" }
[training]
threads = 1
memory_check = false

[[stage]]
name = "base"
[stage.data]
corpus = { kind = "problems", problem = "running_sum", count = 200, validation_count = 20, difficulty = 3 }
packing = "isolate"
sequence_length = 32
[stage.training]
steps = 2
tokens_per_step = 128

[[stage]]
name = "answers"
start_from = "base"
[stage.sample]
corpus = { kind = "problems", problem = "running_sum", count = 20, validation_count = 20, difficulty = 3 }
rewards = [{ kind = "length", longest = 100, cushion = 10 }]
at_least = -1
n = 1
template = "{prompt}"
max_new_tokens = 6

[[stage]]
name = "zero"
start_from = "base"
[stage.method]
kind = "grpo"
template = "{prompt}"
answer_tokens = 6
group = 4
validation_prompts = 4
[stage.data]
corpus = { kind = "problems", problem = "running_sum", count = 50, validation_count = 20, difficulty = 3 }
sequence_length = 16
[stage.training]
steps = 2
tokens_per_step = 128
[stage.optimizer]
learning_rate = 1e-4

[study]
title = "Sums"
note = "They are small."
seeds = [0, 1]
[study.examination]
corpus = { kind = "problems", problem = "running_sum", count = 50, validation_count = 20, difficulty = 3 }
num_prompts = 6
samples = 4
answer_tokens = 6
[[study.examination.rewards]]
kind = "answer"
[[study.examination.rewards]]
kind = "format"
name = "form"
form = "markers"
opens = "<"
closes = ">"
[[study.tuned]]
stage = "zero"
values = [1e-5, 1e-3]
[[study.claims]]
id = "longer"
statement = "What was trained more has taken more"
a = "zero.all_flops"
b = "base.all_flops"
source = "nowhere"
printed = "1 against 2"
[[study.claims]]
id = "same"
statement = "Length is the same"
a = "zero.length"
b = "base.length"
relation = "equal"
margin = 10.0
"""


def written(folder: Path, text: str = RECIPE) -> Path:
    """The recipe as a file."""
    path = folder / "sums.toml"
    path.write_text(text)
    return path


def seeds_here(jobs: Mapping[str, Job], parallel: int, description: str, *, quiet: bool) -> Outcome:
    """In place of processes: one seed after the other, in this one."""
    outcome: Any = Outcome()
    for name, job in jobs.items():
        try:
            run(job)
        except FinemoeError as error:
            outcome.failures[name] = str(error)
    return outcome
