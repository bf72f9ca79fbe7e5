"""The data of GRPO, which the model writes itself: rollouts by position, drawn when the first of their steps comes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from finemoe.core.errors import OutageError
from finemoe.core.logs import logger
from finemoe.core.seeds import derive
from finemoe.data.conversations.questions import Question
from finemoe.generation.config import SamplingConfig
from finemoe.methods.grpo.advantages import outcome, process
from finemoe.methods.grpo.batch import RolloutBatch, packed
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.prompts import Prompts
from finemoe.methods.grpo.rollout import (
    Answer,
    Drawn,
    Group,
    Rollout,
    Routes,
    Scored,
    figures,
    lines,
    restored,
    saved,
)
from finemoe.methods.grpo.scoring import Policies
from finemoe.methods.grpo.served import FOLDER, FromServer
from finemoe.methods.grpo.source import Asked, OwnEngine, Source
from finemoe.methods.grpo.watch import Watch, remedy
from finemoe.methods.rewards import Answer as Judgeable
from finemoe.methods.rewards import Rewards
from finemoe.methods.rewards import Scored as Judged
from finemoe.methods.setting import Setting
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer
from finemoe.training.method import Saved
from finemoe.training.report import StepReport

_IN_VAIN = 3
"""[rollouts] In a row of which no answer could be judged, before a run that has learnt something ends."""
_REFERENCE = "reference."
"""What its tensors are called by in a checkpoint, before their own names."""


@final
class Rollouts:
    """`training.method.TrainingData` and `Stateful`: answers by position, the policy's own.

    A pure function of the position, of the weights when a rollout began, and of what is saved: the rollout itself.
    """

    def __init__(self, config: GRPOConfig, prompts: Prompts, rewards: Rewards, setting: Setting) -> None:
        """Nothing is asked yet.

        Args:
            config: of the method.
            prompts: what is asked.
            rewards: what answers are worth.
            setting: of the run; a sequence of a step is an answer.
        """
        self._config, self._prompts, self._rewards = config, prompts, rewards
        self._per_step, self._start_from = setting.sequences_per_step, setting.start_from
        self._size = self._per_step * config.steps_per_rollout
        self._directory, self._length = setting.directory, setting.data.sequence_length
        self._sampling = SamplingConfig(
            seed=derive(setting.seed, "rollouts"),
            temperature=config.temperature,
            max_new_tokens=config.answer_tokens,
            tempered_logprobs=config.temperature != 1,
        )
        self._source: Source | None = None
        self._policies: Policies | None = None
        self._rollout: Rollout | None = None
        self._prompts_used, self._in_vain = 0, 0
        self._watch, self._told_of_trouble = Watch(config), False
        self._unwritten: list[dict[str, Any]] = []
        self._spent = {"time_rollout": 0.0, "time_reward": 0.0, "time_scoring": 0.0}
        self._stepped: float | None = None
        """When the step began that is under way."""
        self._ended = False

    # ---- of the data ----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._prompts.tokenizer

    @property
    def sequences_per_epoch(self) -> int:
        """Answers to all prompts."""
        return len(self._prompts.sides["train"]) * self._config.group * self._config.inner_epochs

    @property
    def companions(self) -> Mapping[str, str]:
        """The plain template, where the model is asked by it."""
        return self._prompts.companions

    @property
    def report(self) -> Mapping[str, Any]:
        """What is asked, and which reward model judges: a function of the user's may be mended, and is not in it."""
        mark = self._rewards.models_sha256
        return {**self._prompts.report, **({} if mark is None else {"reward_model_sha256": mark})}

    def token_frequencies(self) -> Tensor:
        """[ids] counts in the prompts."""
        return self._prompts.token_frequencies()

    def asked(self) -> Iterator[Question]:
        """Prompts in the order of the first epoch."""
        train, shuffled = self._prompts.sides["train"], self._config.order == "shuffled"
        return (train[self._prompts.at(place, shuffled=shuffled)] for place in range(len(train)))

    def batch(self, position: int, num_sequences: int) -> RolloutBatch:
        """Answers `position` to `position + num_sequences` of the run, written now where they are not there yet."""
        self._stepped = time.perf_counter() if self._stepped is None else self._stepped
        number, within = divmod(position, self._size * self._config.inner_epochs)
        if self._rollout is not None and number < self._rollout.number:  # what was looked at before the first step
            self._rollout, self._prompts_used, self._unwritten, self._in_vain = None, 0, [], 0
        if self._rollout is None or self._rollout.number != number:
            self._rollout = self._make(number)
        first = within % self._size
        part = slice(first, first + num_sequences)
        answers, scored = self._rollout.answers[part], self._rollout.scored[part]
        replay = _replayed(self._config, answers, scored)
        if within < self._per_step:  # nothing has moved: what the step itself finds is old, its ratio 1 to the last bit
            scored = tuple(replace(one, old=None) for one in scored)
        return packed(answers, scored, replay)

    # ---- of the run -----------------------------------------------------------------------------------------------

    def prepare(self, model: Transformer, begins: bool) -> None:
        """Answer by `model` from now on, at the precision of training, or by a server; keep a copy as the reference.

        Raises:
            ConfigError: the server cannot do what is needed.
            OutageError: it does not answer.
        """
        device = model.embedding.weight.device.type
        autocast: Callable[[], Any] = nullcontext
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

            def autocast() -> Any:
                # Weights that autocast casts without gradients must not be those that the step then finds cast.
                return torch.autocast(device, dtype=dtype, cache_enabled=False)

        ids = self.tokenizer.vocab_size
        self._policies = Policies(self._config, model, self._start_from, autocast, ids, begins=begins)
        self._source = OwnEngine(model, self.tokenizer, autocast)
        if self._config.server is not None and self._directory is not None:
            server, says = self._config.server, self._policies.of_policy
            first = Asked(self._prompts.sides["train"][0].ids, (0,))
            follows = begins or server.weights == "update"
            self._source = source = FromServer(
                self._config, model, self.tokenizer, says, self._directory, first, self._sampling, self._length,
                follows, lambda: self._ended,
            )  # fmt: skip
            if begins:
                source.probe()

    def hurry(self) -> None:
        """A person asks the run to end: who does not answer is waited for no longer."""
        self._ended = True
        self._rewards.hurry()

    def finish(self) -> None:
        """Nothing is asked any more: what lies there for a server is as large as the run's own weights."""
        if self._config.server is not None and self._directory is not None:
            shutil.rmtree(self._directory / FOLDER, ignore_errors=True)

    def state(self) -> Saved:
        """The rollout that is learnt from, and what is needed of the reference."""
        kept, policies = saved(self._rollout, self._prompts_used), self._known.state()
        tensors = {f"{_REFERENCE}{name}": one for name, one in policies.tensors.items()}
        return Saved({**kept.tensors, **tensors}, {**kept.values, **policies.values, "watch": self._watch.values(),
                                "in_vain": self._in_vain, "files": self._rewards.files})  # fmt: skip

    def restore(self, state: Saved) -> None:
        """As it was.

        Raises:
            CheckpointError: the reference cannot be had again.
        """
        own = {name: one for name, one in state.tensors.items() if not name.startswith(_REFERENCE)}
        self._rollout, self._prompts_used = restored(Saved(own, state.values))
        self._watch.put(state.values["watch"])
        self._in_vain = int(state.values.get("in_vain", 0))
        now, before = self._rewards.files, state.values.get("files", {})
        if others := [name for name, mark in before.items() if now.get(name) != mark]:
            logger.warning("reward %s: its file is another than before; the run goes on by it", " and ".join(others))
        reference = {name.removeprefix(_REFERENCE): one for name, one in state.tensors.items() if name not in own}
        self._known.restore(Saved(reference, state.values))

    @property
    def _known(self) -> Policies:
        assert self._policies is not None  # the run was prepared
        return self._policies

    def figures(self, parameters: Mapping[str, Any], norm: Tensor) -> dict[str, float]:
        """`training.method.BeforeUpdate`: what the rollout came to, which the step learns from; shares of its time.

        A step's time is that from its first batch to here, before the optimizer's update: what is measured and saved
        between steps is no part of it, unless a step was passed over.
        """
        assert self._rollout is not None
        assert self._stepped is not None  # a step begins with its batches
        passed, self._stepped = time.perf_counter() - self._stepped, None
        shares = {name: min(1.0, seconds / passed) for name, seconds in self._spent.items()}
        shares["time_update"] = max(0.0, 1 - shares["time_rollout"] - shares["time_reward"])
        self._spent = dict.fromkeys(self._spent, 0.0)
        return {**self._rollout.figures, **shares}

    def warns(self, report: StepReport) -> list[str]:
        """What people should know of a step; of a rollout at its first."""
        within = (report.step - 1) % self._config.updates
        said = self._watch.step(report.terms, within)
        if (trouble := self._rewards.trouble) is not None and not self._told_of_trouble:
            said.append(trouble)
        self._told_of_trouble = trouble is not None
        if self._rollout is not None and not within:
            found = self._rollout.figures
            said += self._watch.after(found) + self._watch.failures(found["failed_share"], self._rewards.last_error)
        return said

    def take_lines(self) -> list[dict[str, Any]]:
        """What is to be written to rollouts.jsonl, once."""
        taken, self._unwritten = self._unwritten, []
        return taken

    # ---- a rollout ------------------------------------------------------------------------------------------------

    def _make(self, number: int) -> Rollout:
        assert self._source is not None
        assert self._policies is not None
        every = self._config.reference_every
        if every is not None and number and number % every == 0:
            self._policies.renew_reference()
        began = time.perf_counter()
        self._source.renew(number)
        self._spent["time_rollout"] += time.perf_counter() - began
        wanted = self._size // self._config.group
        groups, rounds = list(self._ask(wanted, 0)), 0
        asked = wanted
        discarded: list[Group] = []
        while rounds < self._config.dynamic_sampling and (dead := [one for one in groups if not one.alive]):
            rounds += 1
            fresh = list(self._ask(len(dead), asked))
            asked += len(dead)
            better = [one for one in fresh if one.alive]
            alive = [one for one in groups if one.alive]
            groups = [*alive, *better, *dead][:wanted]
            discarded += [*dead[wanted - len(alive) - len(better) :], *(one for one in fresh if not one.alive)]
        answers = [one for place, group in enumerate(groups) for one in group.answers(place)]
        made = Rollout(number, tuple(answers), (), figures(groups, answers, asked))
        whole = number % self._config.keep_rollouts == 0
        self._unwritten += lines(made, number * self._config.updates + 1, groups, discarded, whole=whole)
        self._require_judged(groups, number)  # what could not be judged can be read all the same
        self._prompts_used += asked
        began = time.perf_counter()
        scored = self._policies.scores(answers)
        self._spent["time_scoring"] += time.perf_counter() - began
        return replace(made, scored=tuple(scored))

    def _require_judged(self, groups: Sequence[Group], number: int) -> None:
        """Go on without a single answer that was judged for a few rollouts at most, and not with the first.

        Raises:
            OutageError: nothing is learnt any more.
        """
        judged = any(one.value is not None for group in groups for one in group.judged)
        self._in_vain = 0 if judged else self._in_vain + 1
        if judged or (number and self._in_vain < _IN_VAIN):
            return
        which = f"the last {self._in_vain} rollouts" if number and self._in_vain > 1 else "a rollout"
        raise OutageError(
            f"no answer of {which} could be judged, so that nothing is learnt; the last as {self._rewards.last_error}: "
            f"{remedy(self._config, self._rewards.last_error)}"
        )

    def _ask(self, count: int, after: int) -> Iterator[Group]:
        """`count` prompts behind the first `after` of this rollout, each answered by a group."""
        assert self._source is not None
        places = [self._prompts_used + after + number for number in range(count)]
        shuffled = self._config.order == "shuffled"
        items = [self._prompts.at(place, shuffled=shuffled) for place in places]
        train, group = self._prompts.sides["train"], self._config.group
        asked = [
            Asked(train[item].ids, tuple(range(place * group, (place + 1) * group)))
            for place, item in zip(places, items, strict=True)
        ]
        began = time.perf_counter()
        drawn = self._source(asked, self._sampling)
        drew = time.perf_counter()
        judgeables = [
            judgeable(self.tokenizer, train[item], one)
            for item, answers in zip(items, drawn, strict=True)
            for one in answers
        ]
        judged, put = iter(self._rewards.score(judgeables)), iter(judgeables)
        self._spent["time_rollout"] += drew - began
        self._spent["time_reward"] += time.perf_counter() - drew
        for item, answers in zip(items, drawn, strict=True):
            found = [next(judged) for _ in answers]
            said = [next(put) for _ in answers]
            yield Group(item, said, answers, found, self._advantages(answers, found))

    def _advantages(self, drawn: Sequence[Drawn], judged: Sequence[Judged]) -> list[list[float]]:
        """Of each token of the answers of a group."""
        config, lengths = self._config, [len(one.completion) for one in drawn]
        if config.supervision == "outcome":
            whole = outcome([one.value for one in judged], config.scale)
            return [[advantage] * length for advantage, length in zip(whole, lengths, strict=True)]
        steps = [
            None if one.value is None else _in_tokens(self.tokenizer, written, one)
            for written, one in zip(drawn, judged, strict=True)
        ]
        return process(steps, lengths, config.scale)


def judgeable(tokenizer: Tokenizer, prompt: Question, drawn: Drawn) -> Judgeable:
    """An answer as rewards read it; the token that ended it is no text."""
    ended = drawn.finish_reason == "stop"
    text = tokenizer.decode(drawn.completion[:-1] if ended else drawn.completion)
    asked = tokenizer.decode(drawn.prompt)
    return Judgeable(prompt.text, text, ended, len(drawn.completion), prompt.record, prompt.references, asked)


def _replayed(config: GRPOConfig, answers: Sequence[Answer], scored: Sequence[Scored]) -> Sequence[Routes] | None:
    """The experts that are taken, of each answer."""
    match config.replay:
        case "off":
            return None
        case "update":
            return [one.routes for one in scored]
        case "rollout":
            return [one.drawn.routes for one in answers]


def _in_tokens(tokenizer: Tokenizer, drawn: Drawn, judged: Judged) -> list[tuple[int, float]]:
    """Steps by the tokens of the answer that they end with; what is of the whole answer is the last of them."""
    whole = [] if judged.outcome is None else [(len(drawn.completion), judged.outcome)]
    decoder, ends, written = tokenizer.decoder(), [], 0
    for token in drawn.completion:
        written += len(decoder.push(token))
        ends.append(written)
    steps = [
        (next((number for number, end in enumerate(ends, 1) if end >= place), len(ends)), value)
        for place, value in judged.steps
    ]
    return [*steps, *whole]
