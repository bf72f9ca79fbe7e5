"""The method `grpo`: its data are answers that the model writes while it learns, judged and compared in groups."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import final

from finemoe.core.seeds import derive
from finemoe.data.conversations.questions import Question
from finemoe.generation.config import SamplingConfig
from finemoe.methods.grpo.batch import RolloutBatch
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.objective import PolicyGradient
from finemoe.methods.grpo.prompts import Prompts
from finemoe.methods.grpo.rollouts import Rollouts, judgeable
from finemoe.methods.grpo.source import Asked, OwnEngine
from finemoe.methods.grpo.watch import FirstFailures
from finemoe.methods.live import live_terms
from finemoe.methods.measuring import HeldOutFigures
from finemoe.methods.rewards import Judged, Rewards
from finemoe.methods.setting import Setting
from finemoe.model.transformer import Transformer
from finemoe.training.balancing import MoveBiases
from finemoe.training.gradients import Clip
from finemoe.training.method import Group, Method, Prompt, Shown


@dataclass(frozen=True)
class _Examined:
    prompt: str
    asked: str
    """The prompt with its template."""
    references: tuple[str, ...]
    text: str
    ended: bool
    tokens: int
    value: float | None
    by_name: Mapping[str, Judged]


@final
@dataclass(frozen=True)
class Examination:
    """Held-out prompts, answered once at temperature 1 and once greedily, and judged."""

    prompts: Prompts
    rewards: Rewards
    config: GRPOConfig
    seed: int

    def __call__(self, model: Transformer) -> HeldOutFigures:
        """Means over them; the answers at temperature 1 come from the same streams each time."""
        asked = self.prompts.sides["validation"][: self.config.validation_prompts]
        drawn = self._answers(model, asked, 1.0)
        greedy = self._answers(model, asked, 0.0)
        rewards = [one.value for one in drawn if one.value is not None]
        values: dict[str, float | None] = {"validation_reward": sum(rewards) / len(rewards) if rewards else None}
        for name in drawn[0].by_name:
            for prefix, found in (("reward_", drawn), ("greedy_reward_", greedy)):
                judged = [one.by_name[name].value for one in found if one.by_name[name].verdict != "error"]
                if judged:
                    values[f"validation_{prefix}{name}"] = sum(judged) / len(judged)
        values["validation_failed_share"] = 1 - len(rewards) / len(drawn)
        values["validation_length"] = sum(one.tokens for one in drawn) / len(drawn)
        values["validation_cut_share"] = sum(not one.ended for one in drawn) / len(drawn)
        samples = [
            {
                "prompt": one.prompt,
                **({"asked": one.asked} if one.asked != one.prompt else {}),
                **({"references": list(one.references)} if one.references else {}),
                "answer": one.text,
                "ended": one.ended,
                "value": one.value,
                "verdicts": {name: judged.verdict for name, judged in one.by_name.items()},
            }
            for one in drawn[: self.config.samples]
        ]
        return HeldOutFigures(values, {}, tuple(samples))

    def _answers(self, model: Transformer, asked: tuple[Question, ...], temperature: float) -> list[_Examined]:
        sampling = SamplingConfig(
            seed=derive(self.seed, "examination"), temperature=temperature, max_new_tokens=self.config.answer_tokens
        )
        source = OwnEngine(model, self.prompts.tokenizer, nullcontext)
        drawn = [one for (one,) in source([Asked(one.ids, (number,)) for number, one in enumerate(asked)], sampling)]
        tokenizer = self.prompts.tokenizer
        judgeables = [judgeable(tokenizer, prompt, one) for prompt, one in zip(asked, drawn, strict=True)]
        scored = self.rewards.score(judgeables)
        return [
            _Examined(
                prompt.text,
                one.asked,
                one.references,
                one.text,
                one.ended,
                one.num_tokens,
                judged.value,
                judged.by_name,
            )
            for prompt, one, judged in zip(asked, judgeables, scored, strict=True)
        ]


def build(config: GRPOConfig, setting: Setting) -> Method[RolloutBatch]:
    """The method, on the prompts of `setting`.

    Raises:
        ConfigError: there is no model to begin with.
        DataError: nothing can be asked, or a reward compares with what no record has.
    """
    prompts = Prompts.read(setting, config.template, config.answer_tokens)
    rewards = Rewards(
        config.rewards,
        deadline_seconds=config.reward_seconds,
        memory_bytes=config.reward_memory,
        on_failure=FirstFailures(config),
        keys="method.",
    )
    data = Rollouts(config, prompts, rewards, setting)
    live = live_terms(setting, mtp=False)

    def select(name: str) -> Group | None:
        return Group() if config.moves(name) else None

    return Method(
        data=data,
        objective=PolicyGradient(config, prompts.tokenizer.vocab_size),
        measure=Examination(prompts, rewards, config, setting.seed),
        select=select,
        prepare=(data.prepare,),
        before_update=(data.figures, Clip(setting.max_gradient_norm)),
        after_update=(MoveBiases(setting.balancing),),
        state={"rollouts": data},
        writes={"rollouts.jsonl": data.take_lines},
        warns=data.warns,
        hurry=data.hurry,
        finish=data.finish,
        close=rewards.close,
        shows=shown_of(config),
        asks=lambda: (Prompt(one.ids, one.references) for one in data.asked()),
        notes=(*_sentences(config, prompts, rewards), f"added to the loss: {', '.join(live) or 'nothing'}"),
    )


def shown_of(config: GRPOConfig) -> tuple[Shown, ...]:
    """Figures of the live line; a reward that says whether the form is right is the share of answers that keep it."""
    forms = [one.name or one.kind for one in config.rewards if one.kind == "format"]
    return (
        Shown("reward", ("reward",)),
        Shown("length", ("length",)),
        Shown("kl", ("kl",)),
        Shown("dead", ("dead_groups",), percent=True),
        *(Shown(name, (f"reward_{name}",), percent=True) for name in forms),
        Shown("rollout/reward/update", ("time_rollout", "time_reward", "time_update"), percent=True),
        Shown("clip", ("clip_share",), percent=True),
        Shown("entropy", ("entropy",)),
        Shown("mismatch", ("expert_mismatch",), percent=True),
        Shown("cut", ("cut_share",), percent=True),
    )


def _sentences(config: GRPOConfig, prompts: Prompts, rewards: Rewards) -> tuple[str, ...]:
    """What is asked, what it is worth, and how experts are chosen, in words."""
    counts = {side: len(found) for side, found in prompts.sides.items()}
    few = min(config.validation_prompts, counts["validation"])
    held_out = f"{counts['validation']:,} held out"
    if few < counts["validation"]:
        held_out += f", of which the first {few:,} are asked at every measurement (method.validation_prompts)"
    asked = f"{counts['train']:,} prompts to train on, {config.group} answers each; {held_out}"
    per = "1 step" if config.updates == 1 else f"{config.updates} steps"
    held = f"held to the reference by {config.beta:g}" if config.beta else "no reference"
    replayed = {
        "off": "experts are chosen anew when an answer is learnt",
        "update": "experts stay for all steps on a rollout as they were before the first",
        "rollout": "experts are those that wrote the answer",
    }
    return (
        asked,
        *_answered(config),
        f"reward: {rewards.sentence}",
        f"{per} on each rollout; {held}; {replayed[config.replay]}",
    )


def _answered(config: GRPOConfig) -> tuple[str, ...]:
    """By whom, where it is not this process."""
    if config.server is None:
        return ()
    follows = "which is given every new policy" if config.server.weights == "update" else "whose weights never change"
    return (f"answers come from {config.server.url}, {follows}; those to held-out prompts are written here",)
