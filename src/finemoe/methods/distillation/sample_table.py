"""`[stage.sample]`: a stage that trains nothing, and whose model writes answers for a later one to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from finemoe.core.config import Config
from finemoe.data.conversations.wording import Wording
from finemoe.data.corpora import CorpusConfig, FilesCorpus
from finemoe.methods.distillation.rejection import rejection
from finemoe.methods.distillation.sampling import Sampled, sample
from finemoe.methods.rewards import RewardsTables


class SampleConfig(Config):
    """Answers that a model writes, of which those are kept that pass a check, or that rewards find good."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Files of records, as of `finemoe sample`."""
    corpus: CorpusConfig | None = None
    """Instead of files: a corpus, whose records to train on are asked."""
    n: PositiveInt = 4
    """[answers] To each prompt."""
    keep: Literal["all", "ended", "answer"] | None = None
    """Which of them: all, those that ended, or those that say what the record's own answer says. None: the last,
    where there are no rewards."""
    rewards: RewardsTables | None = None
    """Instead of keep: what an answer is worth, as GRPO has it, and `finemoe rejection`."""
    at_least: float | None = None
    """[weighted sum] What an answer must be worth to be kept. None: 1."""
    best_of: PositiveInt | None = None
    """[answers] At most, of each prompt: of those that are kept, the most probable, or those worth most."""
    template: Wording | None = None
    """With rewards: how a prompt is put to a model that knows no chat, with {prompt} in it. None: as the model's chat
    template has it."""
    temperature: PositiveFloat = 1.0
    """[factor] Logits are divided by it."""
    max_new_tokens: PositiveInt = 512
    """[tokens] Longest answer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompts is None) == (self.corpus is None):
            raise ValueError("give exactly one of prompts and corpus")
        if self.rewards is not None and self.keep is not None:
            raise ValueError("rewards say what is kept: leave keep out, or rewards")
        if self.rewards is None:
            for name in ("at_least", "template"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f'{name} goes with rewards: write rewards = [{{ kind = "answer" }}], or leave it out'
                    )
        # What follows would be refused when the stage is reached, after all that was trained before it.
        if self.best_of is not None and self.best_of >= self.n:
            raise ValueError(f"best_of {self.best_of} of n = {self.n} answers leaves no choice: lower it, or raise n")
        return self

    @property
    def read_from(self) -> Any:
        """The corpus whose records are asked."""
        return self.corpus or FilesCorpus(paths=self.prompts or ())

    def draw(self, model: str, out: Path, seed: int, quiet: bool) -> Sampled:
        """What `model` writes, and what of it is kept in `out`: as of `sample` and `rejection`."""
        shared: dict[str, Any] = {
            "n": self.n, "best_of": self.best_of, "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens, "seed": seed, "quiet": quiet,
        }  # fmt: skip
        prompts = self.corpus or self.prompts
        assert prompts is not None  # one of them is given
        if self.rewards is None:
            return sample(model, prompts, out, keep=self.keep or "answer", **shared)
        bound = 1.0 if self.at_least is None else self.at_least
        return rejection(model, prompts, out, rewards=self.rewards, at_least=bound, template=self.template, **shared)
