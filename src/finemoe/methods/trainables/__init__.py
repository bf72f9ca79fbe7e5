"""What may move, whatever the method: each is a file with a configuration and a function, and a line in TRAINABLES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finemoe.core.config import Config
from finemoe.methods.setting import Setting
from finemoe.methods.trainables import child, everything, experts, lora
from finemoe.training.method import Method

TRAINABLES: dict[str, tuple[type[Config], Callable[[Any, Method[Any], Setting], Method[Any]]]] = {
    "everything": (everything.EverythingConfig, everything.everything),
    "names": (everything.NamesConfig, everything.names),
    "experts": (experts.ExpertsConfig, experts.build),
    "lora": (lora.LoRAConfig, lora.build),
    "child": (child.ChildConfig, child.build),
}
