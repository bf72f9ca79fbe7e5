"""Problems and their rewards fit together: what is right is worth 1, and what is wrong 0."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.data.problems import DIFFICULTIES, PROBLEMS, Problem, problem_at
from judging.judged import judge, to

MATCHING = {
    "running_sum": ("answer", "number"),
    "arithmetic": ("answer", "number"),
    "countdown": ("expression",),
    "sorting": ("answer",),
}
CUTS = {"running_sum": {"cut": 2, "opens": "<", "closes": ">"}, "arithmetic": {"cut": "lines"},
        "countdown": {"cut": "lines"}, "sorting": {"cut": "lines"}}  # fmt: skip
PAIRS = [(kind, reward) for kind, rewards in MATCHING.items() for reward in rewards]


def wrong(one: Problem) -> list[str]:
    """Answers that differ by little."""
    if one.kind in ("running_sum", "arithmetic"):
        return [str(int(one.answer) + 1), one.solution.removesuffix(one.answer) + str(int(one.answer) - 1)]
    if one.kind == "countdown":
        return [one.answer + " + 1", one.solution + " - 1"]
    items = one.answer.split()
    swapped = " ".join([items[1], items[0], *items[2:]])
    return [swapped, one.solution.removesuffix(one.answer) + swapped, " ".join(items[:-1])]


def test_every_kind_has_a_reward() -> None:
    assert set(MATCHING) | {"programs", "reasoning_gym"} == set(PROBLEMS)


@pytest.mark.parametrize(("kind", "reward"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), index=st.integers(-(10**6), 10**6), data=st.data())
def test_what_is_right_is_worth_one_and_what_is_wrong_nothing(
    kind: str, reward: str, seed: int, index: int, data: st.DataObject
) -> None:
    one = problem_at(kind, seed, index, data.draw(st.integers(1, min(12, DIFFICULTIES[kind][1]))))
    said = judge(reward)
    for text in (
        one.answer,
        one.solution,
        f"{one.solution}\n",
        f"<think>{one.solution}</think><answer>{one.answer}</answer>",
    ):
        assert (said(to(one, text)).verdict, said(to(one, text)).value) == ("right", 1), text
    for text in wrong(one):
        assert (said(to(one, text)).verdict, said(to(one, text)).value) == ("wrong", 0), text


@pytest.mark.parametrize("kind", CUTS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_each_step_of_a_solution_is_found_where_it_ends(kind: str, seed: int, data: st.DataObject) -> None:
    one = problem_at(kind, seed, 0, data.draw(st.integers(2, min(12, DIFFICULTIES[kind][1]))))
    ends, at = [], 0
    for step in one.steps:
        at = one.solution.index(step, at) + len(step)
        ends.append((at, 1.0))
    for config in (CUTS[kind], {}):
        found = judge("steps", **config)(to(one, one.solution))
        assert (found.verdict, found.value, list(found.steps)) == ("right", 1, ends)
    spoilt = data.draw(st.integers(0, len(one.steps) - 1))
    end = ends[spoilt][0]
    text = f"{one.solution[: end - 1]}?{one.solution[end:]}"
    found = judge("steps", **CUTS[kind])(to(one, text))
    assert list(found.steps) == [(end, float(number != spoilt)) for number, (end, _) in enumerate(ends)]
    assert found.value == pytest.approx(1 - 1 / len(ends))
    assert judge("steps", **CUTS[kind])(to(one, one.answer)).value == 0


@pytest.mark.parametrize("level", range(1, 6))
def test_programs_pass_where_they_are_right(level: int) -> None:
    said = judge("tests")
    for index in range(3):
        one = problem_at("programs", 11, index, level)
        assert said(to(one, one.solution)).value == 1
        assert said(to(one, f"Here:\n```python\n{one.answer}\n```")).value == 1
        assert one.answer.startswith("def f(")
        head, *body = one.answer.split("\n")
        spoilt = "\n".join([head, "    return None", *body])
        assert (said(to(one, spoilt)).verdict, said(to(one, spoilt)).value) == ("wrong", 0)
