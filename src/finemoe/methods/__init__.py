"""Floor 4: ways of training. Each is one file with a configuration and `build`, and one line in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finemoe.core.config import Config, union_of
from finemoe.methods import distillation, dpo, grpo, pretraining, reward, sft, trainables
from finemoe.methods.setting import Setting
from finemoe.training.method import Method

METHODS: dict[str, tuple[type[Config], Callable[[Any, Setting], Method[Any]]]] = {
    "pretraining": (pretraining.PretrainingConfig, pretraining.build),
    "sft": (sft.SFTConfig, sft.build),
    "dpo": (dpo.DPOConfig, dpo.build),
    "reward": (reward.RewardConfig, reward.build),
    "grpo": (grpo.GRPOConfig, grpo.build),
    "distill": (distillation.DistillConfig, distillation.build),
}
MethodConfig: Any = union_of((config for config, _ in METHODS.values()), default="pretraining")


TrainableConfig: Any = union_of((config for config, _ in trainables.TRAINABLES.values()), default="everything")


def build(config: Any, trainable: Any, setting: Setting) -> Method[Any]:
    """The method that `config` describes, its data read and checked, moving what `trainable` says; no model is needed.

    Raises:
        ConfigError, DataError: it does not fit the model, or there is not enough of it.
    """
    method = METHODS[config.kind][1](config, setting)
    return trainables.TRAINABLES[trainable.kind][1](trainable, method, setting)
