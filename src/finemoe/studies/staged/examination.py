"""What the model of a stage can do: held-out questions, answered several times, judged, and counted."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from finemoe.checkpoint.language_model import open_language_model
from finemoe.core.errors import DataError
from finemoe.core.seeds import derive
from finemoe.data.conversations.forms import known_forms
from finemoe.data.conversations.messages import FormError
from finemoe.data.conversations.questions import Question, question_in, worded
from finemoe.data.corpora import read_corpus
from finemoe.data.documents.document import SkipReport
from finemoe.generation.config import SamplingConfig
from finemoe.judging import KINDS
from finemoe.methods.grpo.rollouts import judgeable
from finemoe.methods.grpo.source import Asked, OwnEngine
from finemoe.methods.rewards import Answer, Rewards, Scored
from finemoe.studies.staged.config import ExaminationConfig
from finemoe.text.answers import boxed, final_number

_SHARE = 0.05  # of a corpus that holds nothing out by itself, as of [data]


def questions(config: ExaminationConfig) -> list[Question]:
    """What records of the held-out side ask, in the corpus's order, in any form that GRPO asks; without ids.

    Raises:
        DataError: there is none, one asks nothing, or does not say what would be right where a reward needs it.
    """
    found: list[Question] = []
    for item in read_corpus(config.corpus, _SHARE, SkipReport(quiet=True), whole=True):
        if item.side == "validation" and len(found) < config.num_prompts:
            found.append(_question(item.document.name, item.document.text, config))
    if not found:
        raise DataError("study.examination.corpus holds no record out: raise its validation_count")
    return found


def _question(name: str, text: str, config: ExaminationConfig) -> Question:
    where = f"study.examination.corpus: {name}"
    try:
        found = question_in(text)
    except FormError as error:
        raise DataError(f"{where}: {error}. {known_forms()}") from error
    if not found.references:
        for one in config.rewards:
            if one.kind in KINDS and KINDS[one.kind].compares:
                raise DataError(
                    f"{where} has no answer for the reward {one.kind!r} to compare with: add a field `answer`"
                )
    return found


def examine(folder: Path, config: ExaminationConfig, asked: Sequence[Question], seed: int) -> dict[str, float]:
    """Of the model in `folder`: share of right answers at the temperature (Pass@1) and greedily, share of questions
    whose most frequent answer is right (Maj@K), of which any is (Pass@K), mean tokens, mean of every other reward.

    Args:
        folder: a run.
        config: what is asked of it.
        asked: of `questions`.
        seed: of the draws.

    Raises:
        DataError: a reward failed on an answer, which then counts as nothing, and no mean can be told.
    """
    opened = open_language_model(folder)
    source = OwnEngine(opened.model.eval(), opened.tokenizer, nullcontext)
    put = [worded(one, opened.tokenizer, config.template) for one in asked]
    with Rewards(
        config.rewards,
        deadline_seconds=config.reward_seconds,
        memory_bytes=config.reward_memory,
        keys="study.examination.",
    ) as rewards:
        found = {}
        for name, temperature, number in (("drawn", config.temperature, config.samples), ("greedy", 0.0, 1)):
            sampling = SamplingConfig(
                seed=derive(seed, "study"), temperature=temperature, max_new_tokens=config.answer_tokens
            )
            groups = source(
                [Asked(one.ids, tuple(range(place * number, (place + 1) * number))) for place, one in enumerate(put)],
                sampling,
            )
            answers = [
                [judgeable(opened.tokenizer, question, one) for one in group]
                for question, group in zip(put, groups, strict=True)
            ]
            judged = iter(rewards.score([one for group in answers for one in group]))
            found[name] = [[(one, next(judged)) for one in group] for group in answers]
        first, *others = rewards.names
        return _counted(found["drawn"], found["greedy"], first, others)


def _counted(
    drawn: Sequence[Sequence[tuple[Answer, Scored]]],
    greedy: Sequence[Sequence[tuple[Answer, Scored]]],
    first: str,
    others: Sequence[str],
) -> dict[str, float]:
    for group in (*drawn, *greedy):
        for _, scored in group:
            for name, one in scored.by_name.items():
                if one.verdict == "error":
                    raise DataError(
                        f"study.examination: the reward {name} failed: {one.note}. Mend it, or raise "
                        "study.examination.reward_seconds; the same command goes on"
                    )
    every = [one for group in drawn for one in group]
    right = [[one.by_name[first].verdict == "right" for _, one in group] for group in drawn]
    found = {
        "right": statistics.fmean(value for group in right for value in group),
        "greedy": statistics.fmean(one.by_name[first].verdict == "right" for ((_, one),) in greedy),
        "majority": statistics.fmean(_majority(group, marks) for group, marks in zip(drawn, right, strict=True)),
        "any": statistics.fmean(map(any, right)),
        "length": statistics.fmean(answer.num_tokens for answer, _ in every),
    }
    return found | {name: statistics.fmean(one.by_name[name].value for _, one in every) for name in others}


def _majority(group: Sequence[tuple[Answer, Scored]], right: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right; of equally frequent ones the one that came first."""
    said = [stated(one.text) for one, _ in group]
    most = Counter(said).most_common(1)[0][0]
    return right[said.index(most)]


def stated(text: str) -> str:
    """What an answer says, for counting: its box, the number that it ends on, or its last line."""
    box, number = boxed(text), final_number(text)
    lines = text.strip().splitlines()
    return box if box is not None else number if number is not None else lines[-1].strip() if lines else ""
