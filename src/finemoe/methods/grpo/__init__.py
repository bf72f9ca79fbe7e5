"""Group-relative policy optimisation (DeepSeekMath, 2402.03300; R1, 2501.12948): a model learns from its own answers.

By file: `config` what can be told; `prompts` what is asked; `source` who answers, `served` a server
that does, `wire` what travels to it and back; `rollout` answers as data;
`advantages` and `surrogate` the formulas; `objective` the loss on a batch; `scoring` what other policies say of it;
`rollouts` the data, by position; `watch` what people should be told; `method` all of it together.
"""

from __future__ import annotations

from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.method import build

__all__ = ["GRPOConfig", "build"]
