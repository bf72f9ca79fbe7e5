"""Rejection sampling: a model answers prompts, rewards judge what it wrote, and what is worth enough is kept.

DeepSeekMath's RFT (2402.03300 section 5.2.1) keeps what is right of a model's own answers, and DeepSeek-R1's third
stage (2501.12948 section 2.3.3) what a table of rewards finds good, of a model that GRPO has trained; `sft` learns it.
Drawing, writing and going on are those of `sampling.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from pydantic import PositiveFloat, PositiveInt

from finemoe.checkpoint.language_model import LanguageModel, Weights
from finemoe.core.config import Config, parse, read_tables
from finemoe.core.errors import ConfigError, DataError
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of
from finemoe.data.conversations.messages import Message
from finemoe.data.conversations.wording import Wording
from finemoe.generation.sequence import Sequence as Completed
from finemoe.methods.distillation.sampling import TOO_LONG, Asked, Choice, Drawing, Prompts, Sampled
from finemoe.methods.rewards import Answer, AnswerReward, Rewards, RewardsTables, Scored
from finemoe.text.tokenizer import Tokenizer

SAID_BEFORE, DID_NOT_END, UNJUDGED = "said before", "did not end", "could not be judged by"
_ROUNDING = 1e-9  # of a sum of weights that people write as decimals


class RewardTables(Config):
    """What answers are worth: a file of `finemoe rejection --rewards`, or the keys of [method] that GRPO has for it."""

    rewards: RewardsTables = (AnswerReward(),)
    """What an answer is worth: entries of REWARDS, each with a weight; they are added."""
    reward_seconds: PositiveFloat = 10.0
    """[s] Deadline of one answer's rewards; what takes longer is an error, and the answer is left out."""
    reward_memory: PositiveInt = 2 << 30
    """[bytes] Most that a process which judges answers may take."""


class _Settings(Config):
    """What is asked for beside rewards, and how."""

    at_least: float
    template: Wording | None


def rejection(
    model: str | os.PathLike[str] | LanguageModel,
    prompts: Prompts,
    out: str | os.PathLike[str],
    *,
    rewards: str | os.PathLike[str] | Sequence[Mapping[str, Any] | Config] | None = None,
    at_least: float = 1.0,
    n: int = 4,
    best_of: int | None = None,
    template: str | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 512,
    seed: int = 0,
    weights: Weights = "auto",
    quiet: bool = False,
) -> Sampled:
    """Have `model` answer prompts, and write what rewards find worth learning as conversations.

    Of the answers to a prompt, what did not end by itself is left out, and a text that was kept of the same prompt
    before. What fails to be judged is left out, told and counted apart: it is not taken for wrong.

    Args:
        model: as of `sample`.
        prompts: as of `sample`; rewards see whole records.
        out: a .jsonl file; where it was begun with the same settings, it is gone on with.
        rewards: a TOML file with [[rewards]], a recipe with [[method.rewards]], or such tables; None: whether the
            answer says the record's own, with the weight 1.
        at_least: [weighted sum] What an answer must be worth to be kept.
        n: answers to each prompt.
        best_of: at most so many of each prompt, those worth most, of equal ones the first drawn; None: all.
        template: how a prompt is put to a model that knows no chat, with {prompt} in it, as GRPO's; None: as the
            model's chat template has it.
        temperature, top_k, top_p, max_new_tokens, seed, weights, quiet: as of `sample`.

    Raises:
        ConfigError: settings or rewards that cannot be, or other ones than `out` was begun with.
        DataError: no prompt, or nothing of the first answers could be judged.
        RunError: `out` cannot be written, or somebody else is writing it.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    parse(_Settings, {"at_least": at_least, "template": template}, "rejection")
    tables = read_rewards(rewards)
    drawing = Drawing.of(model, prompts, out, n=n, best_of=best_of, given=given, weights=weights, wording=template)
    records = [one.question.record for one in drawing.asked]
    bounds: dict[str, Any] = {"deadline_seconds": tables.reward_seconds, "memory_bytes": tables.reward_memory}
    keys = "" if isinstance(rewards, (str, os.PathLike)) else None  # a file has them, and a stage or a list has not
    with Rewards(tables.rewards, keys=keys, **bounds) as computing:
        if not quiet:
            logger.info("%s; kept from %g on", computing.sentence, at_least)
        facts = {
            "rewards": computing.identity(),
            "at_least": at_least,
            "best_of": best_of,
            "template": template,
            "records": hashlib.sha256(json.dumps(records, default=str).encode()).hexdigest(),
        }
        choose = ByRewards(computing, drawing.opened.tokenizer, at_least, best_of, drawing.path)
        return _told(drawing.write(choose, facts, quiet=quiet), at_least, drawing)


def _told(done: Sampled, at_least: float, drawing: Drawing) -> Sampled:
    """`done`, after a warning where nothing was kept."""
    if not done.kept:
        logger.warning("%s: nothing was kept. %s", done.path, _hint(done, at_least, drawing))
    return done


def _hint(done: Sampled, at_least: float, drawing: Drawing) -> str:
    """What to do where nothing is kept, by the reason that most answers were left out for."""
    why = max(done.left_out, key=lambda reason: done.left_out[reason], default="")
    said = f"{done.left_out.get(why, 0):,} of {done.drawn:,} answers: {why}. "
    if drawing.opened.template is None and drawing.wording is None:
        plain = "the model has no chat template, and was asked by the plain one: where it was taught otherwise"
        return f'{said}Mind that {plain}, say so, as in --template "{{prompt}}"'
    if why == DID_NOT_END:
        most = drawing.given["max_new_tokens"]
        return f"{said}Raise --max-new-tokens from {most}, or ask as the model was taught (--template)"
    if why.startswith(UNJUDGED):
        return f"{said}Mend that reward"
    return f"{said}Lower --at-least from {at_least:g}, draw more (--n), or ask as the model was taught (--template)"


def read_rewards(given: str | os.PathLike[str] | Sequence[Mapping[str, Any] | Config] | None) -> RewardTables:
    """The rewards of a file, or of tables.

    Raises:
        ConfigError: they cannot be, or the file holds none.
    """
    if given is None:
        return RewardTables()
    if not isinstance(given, (str, os.PathLike)):
        return parse(RewardTables, {"rewards": [_plain(one) for one in given]}, "rewards")
    tables, source = read_tables(given), str(Path(given))
    if "rewards" in tables:
        return parse(RewardTables, tables, source)
    method = tables.get("method")
    if not isinstance(method, Mapping) or "rewards" not in method:
        stages = ", and those of a [[stage]] are not looked for" if "stage" in tables else ""
        raise ConfigError(f'{source}: has neither [[rewards]] nor [[method.rewards]]{stages}: write kind = "answer" or '
                          "another below a line [[rewards]]")  # fmt: skip
    own = {key: method[key] for key in RewardTables.model_fields if key in method}
    return parse(RewardTables, own, f"{source}: method")


def _plain(one: Mapping[str, Any] | Config) -> Any:
    return one.model_dump() if isinstance(one, Config) else one


@final
class ByRewards:
    """Keeps what is worth enough, each text of a prompt once; of that, what is worth most."""

    def __init__(
        self, rewards: Rewards, tokenizer: Tokenizer, at_least: float, best_of: int | None, path: Path
    ) -> None:
        """Nothing is judged yet.

        Args:
            rewards: what answers are worth.
            tokenizer: of the model that writes them.
            at_least: as of `rejection`.
            best_of: as of `rejection`.
            path: of what is written, for errors.
        """
        self._rewards, self._tokenizer, self._path = rewards, tokenizer, path
        self._at_least, self._best_of = at_least, best_of
        self._kept: dict[str, set[str]] = {}
        """Texts by what they answer: a prompt may stand in several records."""
        self._judged, self._told = 0, set[str]()

    def recall(self, lines: Iterable[str]) -> None:
        """As in `Choose`."""
        with damage_of(self._path, "remove it and begin again"):
            for line in lines:
                record = json.loads(line)
                *asked, said = record["messages"]
                self._of(asked, record.get("tools", ())).add(said["content"].strip())
                self._judged += 1

    def _of(self, messages: Sequence[Message], tools: Sequence[Any]) -> set[str]:
        return self._kept.setdefault(json.dumps([list(messages), list(tools)]), set())

    def __call__(self, asked: Asked, completions: Sequence[Completed | None]) -> Choice:
        """As in `Choose`.

        Raises:
            DataError: many answers, and all from the first on, could not be judged.
        """
        left_out: Counter[str] = Counter()
        before = self._of(asked.question.messages, asked.question.tools)
        alike: dict[str, list[int]] = {}
        """Numbers by what they say: each text is judged once."""
        for number, one in enumerate(completions):
            why = _unfit(one, before)
            if why is None:
                alike.setdefault(_said(one), []).append(number)
            else:
                left_out[why] += 1
        groups = list(alike.values())
        judged = self._rewards.score([self._answer(asked, completions[numbers[0]]) for numbers in groups])
        worth: dict[int, Scored] = {}
        verdicts: dict[str, Counter[str]] = {}
        for numbers, scored in zip(groups, judged, strict=True):
            for name, by_it in scored.by_name.items():
                verdicts.setdefault(name, Counter())[by_it.verdict] += len(numbers)
            if scored.value is None:
                left_out[self._tell(asked, scored)] += len(numbers)
            elif scored.value < self._at_least - _ROUNDING:
                left_out[f"worth less than {self._at_least:g}"] += len(numbers)
            else:
                worth[numbers[0]] = scored
                left_out[SAID_BEFORE] += len(numbers) - 1
        self._judged += sum(one.value is not None for one in judged)
        self._refuse_in_vain()
        kept = sorted(worth, key=lambda number: -(worth[number].value or 0.0))[: self._best_of]
        left_out["others are worth as much or more"] += len(worth) - len(kept)
        before |= {_said(completions[number]) for number in kept}
        return Choice({number: _more(worth[number]) for number in sorted(kept)}, +left_out, verdicts)

    def _answer(self, asked: Asked, one: Completed | None) -> Answer:
        assert one is not None
        assert one.text is not None
        question, put = asked.question, self._tokenizer.decode(one.prompt)
        return Answer(
            question.text, one.text.text, True, len(one.completion), question.record, question.references, put
        )

    def _tell(self, asked: Asked, scored: Scored) -> str:
        """Why there is no value, by the reward that failed; its first note is told."""
        failed = scored.failed or ""
        if failed not in self._told:
            self._told.add(failed)
            logger.warning(
                "%s: an answer could not be judged by %s, and is left out like all others that cannot: %s",
                asked.name, failed, scored.by_name[failed].note,
            )  # fmt: skip
        return f"{UNJUDGED} {failed}"

    def _refuse_in_vain(self) -> None:
        trouble = self._rewards.trouble
        if trouble is not None and not self._judged:
            raise DataError(f"{trouble}. Mend it, remove {self._path} and begin again")


def _unfit(one: Completed | None, before: set[str]) -> str | None:
    """Why a completion is not judged at all."""
    if one is None or one.text is None:
        return TOO_LONG
    if not _said(one):
        return "empty"
    if one.finish_reason != "stop":
        return DID_NOT_END
    return SAID_BEFORE if _said(one) in before else None


def _said(one: Completed | None) -> str:
    assert one is not None
    assert one.text is not None
    return one.text.text.strip()


def _more(scored: Scored) -> dict[str, Any]:
    """What it was worth, for where a line comes from; null of a reward that failed and has no weight."""
    values = {name: None if one.verdict == "error" else round(one.value, 6) for name, one in scored.by_name.items()}
    return {"reward": round(scored.value or 0.0, 6), "rewards": values}
