"""FLOPs of a stage: training, what GRPO computes beside it, and answers that are written for a later stage."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.checkpoint.open import read_model_config
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.model.size import measure
from finemoe.runs.config import read_config
from finemoe.training.directory import read_metrics


def trained_flops(folder: Path, summary: Mapping[str, Any]) -> float:
    """Of a run. A token that is trained costs three times what one costs that is read; one that is written costs as
    much as one that is read, since what was read before is kept.

    GRPO's are those of the tokens it learnt, and reads of the same ones: by the engine that wrote them, by the
    reference where there is one, and by the policy as it was before several steps. Of other methods nothing is added:
    what a reference or a teacher reads beside them is not counted.
    """
    training = float(summary["training_flops"])
    run = read_config(folder / "config.json")
    method = run.method
    if not isinstance(method, GRPOConfig):
        return training
    learnt = run.training.tokens_per_step // run.data.sequence_length * method.steps_per_rollout / method.group
    asked = [one["figures"]["prompts_asked"] for one in read_metrics(folder) if one.get("figures")]
    more = statistics.fmean(asked) / learnt if asked else 1.0  # dynamic sampling asks more than it learns
    reads = more + bool(method.beta) + (method.updates > 1)
    return training * (1 + reads / 3 / method.inner_epochs)


def sampled_flops(model: Path, answers: Path, drawn: int) -> float:
    """Of answers that a model wrote: as many as were drawn, as long as those that were kept are on the mean; without
    reading the prompts."""
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        return 0.0
    tokens = statistics.fmean(one["origin"]["tokens"] for one in lines)
    return drawn * tokens * measure(read_model_config(model), int(tokens) + 1).training_flops_per_token / 3
