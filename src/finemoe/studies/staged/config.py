"""`[study]` of a recipe with stages: over which seeds, what every stage's model is asked, and what is claimed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finemoe.core.config import Config
from finemoe.core.errors import ConfigError
from finemoe.data.conversations.wording import Wording
from finemoe.data.corpora import CorpusConfig
from finemoe.data.problems.corpus import ProblemsCorpus
from finemoe.methods.rewards import AnswerReward, RewardsConfig
from finemoe.studies.statistics import Relation

SHARES = ("right", "greedy", "majority", "any")
"""Of answers or questions: no more than 1."""
FIGURES = (*SHARES, "length", "flops", "all_flops")
"""Of every stage that trains; beside them the mean value of each reward but the first, by its name."""


class ExaminationConfig(Config):
    """What the model of every stage is asked when it is done: the same of all of them."""

    corpus: CorpusConfig = ProblemsCorpus()
    """Whose held-out records are asked."""
    template: Wording = "{prompt}"
    """How a prompt is put, with {prompt} in it."""
    num_prompts: PositiveInt = 200
    """[prompts] Held out that are asked, at most."""
    samples: Annotated[int, Field(ge=2)] = 16
    """[answers] To each: the K of Maj@K and Pass@K."""
    temperature: PositiveFloat = 1.0
    """[factor] At which they are drawn; one more is written greedily."""
    answer_tokens: PositiveInt = 128
    """[tokens] Longest answer."""
    rewards: Annotated[tuple[RewardsConfig, ...], Field(min_length=1)] = (AnswerReward(),)
    """The first says what is right; the others are told by name."""
    reward_seconds: PositiveFloat = 10.0
    """[s] Deadline of one answer's rewards; an answer that takes longer cannot be counted, and its stage fails."""
    reward_memory: PositiveInt = 2 << 30
    """[bytes] Most that a process which judges answers may take."""


class TunedConfig(Config):
    """A key of a stage that is tried with several values, on a seed of its own; the best is what all seeds get."""

    stage: str
    """Its name."""
    key: str = "optimizer.learning_rate"
    """Of its recipe."""
    values: Annotated[tuple[float, ...], Field(min_length=2)]
    """[value] That are tried."""
    figure: str = "right"
    """Which is highest with the best value; the first of equals is taken."""


class ClaimConfig(Config):
    """One figure of a stage against one of another, seed by seed."""

    id: str
    """A short name."""
    statement: str
    """What is claimed, as a sentence."""
    a: str
    """STAGE.FIGURE, such as "zero.right"."""
    b: str
    """What it is set against."""
    relation: Relation = "higher"
    """How `a` stands to `b`. That a share is "no_higher" stays undecided where `b` is within the margin of 1."""
    margin: NonNegativeFloat = 0.02
    """[of the figure] Within which two count as equal."""
    source: str = ""
    """Paper and section."""
    printed: str = ""
    """The paper's own figures for the same."""


class StudyConfig(Config):
    """What `finemoe paper RECIPE` does with the stages of a recipe."""

    title: str = "A study of stages"
    """Of its page."""
    note: str = ""
    """What a reader should know of the claims."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """[number] Of the runs: the whole recipe once with each."""
    tuning_seed: NonNegativeInt = 1000
    """[number] On which values are tried, none of the others."""
    parallel: PositiveInt | None = None
    """[processes] Seeds that run at once, one thread each. None: as many as there are cores."""
    examination: ExaminationConfig = ExaminationConfig()
    """What every stage's model is asked."""
    tuned: tuple[TunedConfig, ...] = ()
    """What is tried before: all trials one after the other, in one process, whatever `parallel` says."""
    claims: tuple[ClaimConfig, ...] = ()
    """What is judged."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, given in (
            ("seeds", [str(one) for one in self.seeds]),
            ("claims", [one.id for one in self.claims]),
            ("tuned", [f"{one.stage}.{one.key}" for one in self.tuned]),
        ):
            twice = [one for one, number in Counter(given).items() if number > 1]
            if twice:
                raise ValueError(f"`{name}` has {twice[0]} twice")
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} is one of `seeds`: a value must not be judged where it was chosen"
            )
        return self

    @property
    def figures(self) -> tuple[str, ...]:
        """What is known of every stage that trains."""
        return (*FIGURES, *(one.name or one.kind for one in self.examination.rewards[1:]))

    def check_stages(self, trained: Iterable[str], source: str) -> None:
        """Raises ConfigError where a claim or a trial is of a stage or figure that is not there."""
        known = list(trained)
        for one in self.tuned:
            where = f"{source}: study.tuned of {one.stage}"
            _require(one.stage in known, f"{where}: no stage that trains is called so; those are: {', '.join(known)}")
            _require(one.figure in self.figures, f"{where}: figure {one.figure!r} is none of {', '.join(self.figures)}")
        for claim in self.claims:
            for side in (claim.a, claim.b):
                stage, _, figure = side.partition(".")
                where = f"{source}: study.claims, {claim.id}: {side!r}"
                _require(stage in known, f"{where} names no stage that trains; those are: {', '.join(known)}")
                _require(figure in self.figures, f"{where} names none of the figures {', '.join(self.figures)}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
