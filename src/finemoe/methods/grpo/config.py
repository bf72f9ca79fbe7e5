"""What the method `grpo` can be told; the defaults are DeepSeekMath's, and R1's group of 16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finemoe.core.config import Config
from finemoe.data.conversations.wording import Wording
from finemoe.methods.grpo.advantages import Scale
from finemoe.methods.rewards import AnswerReward, RewardsTables
from finemoe.methods.setting import Kept, MethodConfig, no_room

Normalize = Literal["sequence", "token", "constant"]
Ratio = Literal["token", "sequence", "gspo"]
Replay = Literal["off", "update", "rollout"]
COMPARING = ("answer", "number", "latex", "expression", "tests", "reasoning_gym")
"""Kinds of rewards that say whether an answer is right, 0 to 1."""


class ServerConfig(Config):
    """An OpenAI-compatible server that answers in the place of the engine of this process: ids in, ids out."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")]
    """Where it listens, such as http://127.0.0.1:8000; with or without /v1."""
    model: str | None = None
    """What it calls the model. None: the one that it has."""
    api_key_env: str | None = None
    """Name of the environment variable that holds its key. None: it asks for none."""
    weights: Literal["update", "fixed"] = "update"
    """update: before every rollout the policy is written below the run's folder, and the server is told to load it;
    fixed: its weights never change, so that answers are another policy's."""
    form: Literal["finemoe", "huggingface"] = "finemoe"
    """In which the policy is written: as a checkpoint, for `finemoe serve`, or as a Hugging Face folder."""
    at_once: PositiveInt = 4
    """[requests] Under way at the same time, each for up to 16 answers."""
    timeout_seconds: PositiveFloat = 600.0
    """[s] For one request, or for the loading of weights."""
    patience_seconds: NonNegativeFloat = 300.0
    """[s] That a server which cannot be reached, or is busy, is asked again; then the run is saved and ends."""
    bound: PositiveFloat = 0.1
    """[nats] Largest mean difference between its log-probabilities and our own, of one answer before anything is
    trained: what differs more is another model."""


class GRPOConfig(MethodConfig):
    """Group-relative policy optimisation: a model answers, is rewarded, and makes what was rewarded more probable."""

    kind: Literal["grpo"] = "grpo"
    rewards: RewardsTables = (AnswerReward(),)
    """What an answer is worth: entries of REWARDS, each with a weight; they are added."""
    reward_seconds: PositiveFloat = 10.0
    """[s] Deadline of one answer's rewards; what takes longer is an error, and the answer leaves its group."""
    reward_memory: PositiveInt = 2 << 30
    """[bytes] Most that a process which judges answers may take."""
    template: Wording | None = None
    """How a prompt is put to a base model, with {prompt} in it: "{prompt}" alone, or R1-Zero's preamble. None: as the
    model's chat template has it."""
    order: Literal["shuffled", "given"] = "shuffled"
    """In which prompts are asked: another one in every epoch, or that of the corpus, such as from easy to hard."""
    group: Annotated[int, Field(ge=2)] = 16
    """[answers] To each prompt, compared with one another."""
    answer_tokens: PositiveInt = 128
    """[tokens] Longest answer; what is longer is cut there."""
    temperature: PositiveFloat = 1.0
    """[factor] Logits are divided by it, where answers are drawn and where they are learnt."""
    steps_per_rollout: PositiveInt = 1
    """[steps] Into which the answers of one rollout are dealt."""
    inner_epochs: PositiveInt = 1
    """[times] That the answers of one rollout are learnt."""
    supervision: Literal["outcome", "process"] = "outcome"
    """outcome: one advantage for a whole answer; process: of every step, by the rewards of those that follow."""
    scale: Scale = "std"
    """std: advantages are divided by the standard deviation of their group; none: not (Dr. GRPO, 2503.20783); raw: the
    reward itself is the advantage: right answers are learnt, others are not (Online RFT, DeepSeekMath 5.2.1)."""
    normalize: Normalize = "sequence"
    """sequence: the mean of each answer's tokens, then of answers (DeepSeekMath); token: of all tokens (DAPO,
    2503.14476); constant: sums over answer_tokens (Dr. GRPO)."""
    ratio: Ratio = "token"
    """token: of each token (DeepSeekMath); sequence: of whole answers, as V2, V3 and R1 print it; gspo: its geometric
    mean (2507.18071)."""
    clip: PositiveFloat = 0.2
    """[factor] How far below 1 a ratio still counts; and above, where clip_high says nothing else (R1: 10 for both)."""
    clip_high: PositiveFloat | None = None
    """[factor] How far above 1 a ratio still counts (DAPO has 0.28)."""
    cispo: PositiveFloat | None = None
    """[ratio] Instead of clipping: the ratio is a weight, cut off there, and every token counts (CISPO, 2506.13585)."""
    beta: NonNegativeFloat = 0.04
    """[coefficient] Of the divergence from the reference (k3); 0: there is no reference."""
    unbiased_kl: bool = False
    """The divergence is weighed by the ratio (DeepSeek-V3.2, 2512.02556), which makes its gradient unbiased."""
    reference_every: PositiveInt | None = None
    """[rollouts] After which the model becomes the reference (iterative GRPO; R1-Zero: 400 steps). None: never."""
    importance_cap: PositiveFloat | None = None
    """[ratio] Weigh each token by how much likelier the trainer finds it than who wrote it, at most so much."""
    off_policy_bound: PositiveFloat | None = None
    """[nats] Answers with a negative advantage whose tokens became less probable by more than that on the mean are left
    out (DeepSeek-V3.2)."""
    dynamic_sampling: NonNegativeInt = 0
    """[times] At most, that other prompts are asked in place of those whose answers are all worth the same (DAPO)."""
    replay: Replay = "off"
    """Experts of a token when it is learnt: off: as the router chooses then; update: as it chose before the first step
    on the rollout (R2); rollout: as when the answer was written (R3)."""
    server: ServerConfig | None = None
    """Who answers. None: an engine in this process, on the weights that are trained."""
    mtp: Literal["freeze", "drop"] = "freeze"
    """What becomes of multi-token prediction modules: left as they are, or left out of the new model."""
    validation_prompts: PositiveInt = 128
    """[prompts] Held out that are answered once at temperature 1, and once greedily, at every validation."""
    samples: NonNegativeInt = 4
    """[prompts] Of these whose answers are kept to be read."""
    keep_rollouts: PositiveInt = 10
    """[rollouts] Of every so many of them answers are written to rollouts.jsonl with ids, log-probabilities and experts
    of each token, of all others in short: about 300 bytes an answer beside its texts. Whole, each token takes some 30
    bytes more, and 4 for each expert of each layer."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "data": {"packing": "isolate"},
        "optimizer": {"learning_rate": 1e-6},
        "schedule": {"kind": "constant"},
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.server is not None and self.server.weights == "fixed" and not self._corrects:
            raise ValueError(
                'server.weights "fixed": its answers are another policy\'s from the first step on, and would be learnt '
                'as if they were the model\'s own: set importance_cap = 2, or off_policy_bound, or weights = "update"'
            )
        if self.ratio != "token":
            if self.normalize != "sequence":
                raise ValueError(
                    f'normalize "{self.normalize}" is of token ratios: ratio "{self.ratio}" has "sequence"'
                )
            if self.supervision == "process":
                raise ValueError(f'supervision "process" gives every token an advantage: ratio "{self.ratio}" has one')
            if self.unbiased_kl:
                raise ValueError(f'unbiased_kl weighs tokens: leave it out, or set ratio = "token", not "{self.ratio}"')
            if self.cispo is not None:
                raise ValueError(f'cispo weighs tokens: leave it out, or set ratio = "token" instead of "{self.ratio}"')
        if self.cispo is not None and self.clip_high is not None:
            raise ValueError("cispo is instead of clipping: leave clip_high out, or cispo")
        if not self.beta and (self.unbiased_kl or self.reference_every is not None):
            name = "unbiased_kl" if self.unbiased_kl else "reference_every"
            raise ValueError(f"{name} is of the divergence from a reference, and beta is 0: leave it out, or set beta")
        if self.updates == 1:
            if self.replay == "update":
                raise ValueError(
                    'replay "update" keeps the experts over several steps on one rollout, and there is one: raise '
                    'steps_per_rollout or inner_epochs, or set replay = "rollout" or "off"'
                )
            if self.cispo is not None or self.clip_high is not None:
                name = "cispo" if self.cispo is not None else "clip_high"
                raise ValueError(
                    f"{name} does nothing with one step on each rollout, whose ratios are 1: raise steps_per_rollout "
                    "or inner_epochs, or leave it out"
                )
        return self

    @property
    def _corrects(self) -> bool:
        """Whether it matters who wrote an answer."""
        return self.importance_cap is not None or self.off_policy_bound is not None

    @property
    def updates(self) -> int:
        """Steps on the answers of one rollout."""
        return self.steps_per_rollout * self.inner_epochs

    @property
    def high(self) -> float:
        """How far above 1 a ratio counts."""
        return self.clip if self.clip_high is None else self.clip_high

    @property
    def prepares(self) -> bool:
        """An engine, and a reference."""
        return True

    @property
    def together(self) -> int:
        """[sequences] Of a step, so that those of a rollout are whole groups."""
        return self.group // math.gcd(self.group, self.steps_per_rollout)

    def refuse(self, sequences: int, length: int) -> None:
        """A rollout of whole groups, and room for a prompt before each answer.

        Raises:
            ValueError: there is none.
        """
        if self.answer_tokens >= length:
            raise ValueError(no_room(self.answer_tokens, length))
        if sequences % self.together:
            size, unit = sequences * self.steps_per_rollout, self.together * length
            fits = [one for one in range(2, size + 1) if size % one == 0]
            group = f"method.group {min(fits, key=lambda one: abs(one - self.group))}, or " if fits else ""
            raise ValueError(
                f"the {size} answers of a rollout are no whole groups of method.group {self.group}: try {group}"
                f"training.tokens_per_step {max(1, round(sequences * length / unit)) * unit}"
            )

    def as_learnt(self) -> GRPOConfig:
        """Whose answers are learnt, and not where they are asked for."""
        fixed = self.server is not None and self.server.weights == "fixed"
        return self.model_copy(update={"server": ServerConfig(url="http://-", weights="fixed") if fixed else None})

    def moves(self, name: str) -> bool:
        """All but prediction modules."""
        return not name.startswith("mtp.")

    def kept(self, weights: int) -> tuple[Kept, ...]:
        """The reference, where there is one."""
        return (Kept("the reference", weights, "method.beta = 0, which needs none"),) if self.beta else ()
