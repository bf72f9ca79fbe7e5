"""Routers. A new one is a file with its frozen config and module, and a line in ROUTERS.

Every router is built as `Router(config, hidden_size, num_experts, experts_per_token, vocab_size)` and called as
`router(hidden [tokens, hidden], tokens [tokens], constraint) -> RoutingDecision`; `router.reset(draw, frequencies)`
gives what it holds beside its weights first values. Its config says `learned`, `scores_sum_to_one`,
`num_parameters(hidden_size, num_experts)` and `selects_with_bias` (then the module has a buffer `selection_bias
[experts]`); one that limits groups is a `GroupsConfig`. Everybody else asks these, and knows no router by its name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from finemoe.core.config import Config, union_of
from finemoe.model.moe.routers.group_limited import GroupLimitedConfig, GroupLimitedRouter
from finemoe.model.moe.routers.hash_layer import HashLayerConfig, HashLayerRouter
from finemoe.model.moe.routers.sigmoid_biased import SigmoidBiasedConfig, SigmoidBiasedRouter
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig, SoftmaxTopKRouter

ROUTERS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "group_limited": (GroupLimitedConfig, GroupLimitedRouter),
    "hash_layer": (HashLayerConfig, HashLayerRouter),
    "sigmoid_biased": (SigmoidBiasedConfig, SigmoidBiasedRouter),
    "softmax_topk": (SoftmaxTopKConfig, SoftmaxTopKRouter),
}
RouterConfig: Any = union_of(config for config, _ in ROUTERS.values())
