"""Rejection sampling keeps what rewards find worth enough, of the very answers that `sample` draws."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError, DataError
from finemoe.methods.distillation.rejection import ByRewards, read_rewards
from finemoe.methods.rewards import AnswerReward, FormatReward
from methods.distillation.tiny_pairs import SHORT, lines

DRAWN: dict[str, Any] = {"n": 8, "temperature": 0.7, "seed": 2, **SHORT}
RULES = """
def digits(prompt, completion, record):
    return sum(map(int, filter(str.isdigit, completion))) % 5 / 4

def picky(prompt, completion, record):
    assert digits(prompt, completion, record) > 0.2, "it will not look at that"
    return 1.0

def never(prompt, completion, record):
    raise RuntimeError("it is broken")
"""


def worth(text: str) -> float:
    """What `digits` says, counted here."""
    return sum(int(letter) for letter in text if letter in "0123456789") % 5 / 4


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def by(rules: Path, function: str, **more: Any) -> list[dict[str, Any]]:
    return [{"kind": "function", "path": f"{rules}:{function}", **more}]


def said(record: dict[str, Any]) -> str:
    return str(record["messages"][-1]["content"]).strip()


def ended(teacher: LanguageModel, asked: Path, folder: Path) -> list[dict[str, Any]]:
    """All that is drawn and ends, as `sample` keeps it."""
    finemoe.sample(teacher, asked, folder / "ended.jsonl", keep="ended", **DRAWN)
    found = lines(folder / "ended.jsonl")
    for record in found:
        record["origin"].pop("logprob")  # a rejection has none: its last digit is not the same after an interruption
    return found


def first_of_each(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what was said to the same prompt before."""
    seen: set[tuple[str, str]] = set()
    found = []
    for record in records:
        key = (json.dumps(record["messages"][:-1]), said(record))
        found += [] if key in seen else [record]
        seen.add(key)
    return found


def test_what_is_worth_enough_is_kept_once(teacher: LanguageModel, asked: Path, rules: Path, tmp_path: Path) -> None:
    """One prompt stands in two records, which have their own draws."""
    records = asked.read_text().splitlines()
    asked.write_text("\n".join([*records, *records[:2]]))
    whole = ended(teacher, asked, tmp_path)
    good = [record for record in whole if worth(said(record)) >= 0.5]
    wanted = first_of_each(good)
    assert 0 < len(wanted) < len(good) < len(whole), "or nothing is shown"
    done = finemoe.rejection(
        teacher, asked, tmp_path / "out.jsonl", rewards=by(rules, "digits", weight=2.0), at_least=1.0, **DRAWN
    )
    found = lines(tmp_path / "out.jsonl")
    for record in found:
        assert record["origin"].pop("reward") == 2 * worth(said(record))
        assert record["origin"].pop("rewards") == {"function": worth(said(record))}
    assert found == wanted
    assert (done.drawn, done.kept) == (80, len(wanted))
    assert done.left_out["worth less than 1"] == len(whole) - len(good)
    assert done.left_out["said before"] == len(good) - len(wanted)
    assert sum(done.left_out.values()) == done.drawn - done.kept
    right = sum(worth(said(record)) > 0 for record in first_of_each(whole))
    assert done.verdicts["function"].keys() == {"right", "wrong"}
    assert right <= done.verdicts["function"]["right"] <= sum(worth(said(record)) > 0 for record in whole)


def test_where_nothing_is_kept_it_says_what_to_do(
    teacher: LanguageModel, asked: Path, rules: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**DRAWN, "rewards": by(rules, "digits")}
    done = finemoe.rejection(teacher, asked, tmp_path / "out.jsonl", at_least=7.0, **options)
    assert done.kept == 0
    (told,) = [one for one in caplog.messages if "nothing was kept" in one]
    assert f"{max(done.left_out.values())} of {done.drawn} answers: " in told
    assert "Lower --at-least from 7" in told or "Raise --max-new-tokens" in told
    with pytest.raises(ConfigError, match=r"begun with --n 8, now 4, --template left out, now \"{prompt}\": name"):
        finemoe.rejection(
            teacher, asked, tmp_path / "out.jsonl", at_least=7.0, **{**options, "n": 4}, template="{prompt}"
        )
    caplog.clear()
    finemoe.rejection(teacher, asked, tmp_path / "kept.jsonl", at_least=-1.0, **options)
    assert not [one for one in caplog.messages if "nothing was kept" in one]


def test_those_worth_most_of_each_prompt(teacher: LanguageModel, asked: Path, rules: Path, tmp_path: Path) -> None:
    whole = first_of_each(ended(teacher, asked, tmp_path))
    options = {**DRAWN, "best_of": 2, "at_least": -1.0}
    done = finemoe.rejection(teacher, asked, tmp_path / "out.jsonl", rewards=by(rules, "digits"), **options)
    wanted = []
    for prompt in dict.fromkeys(record["origin"]["prompt"] for record in whole):
        own = [record for record in whole if record["origin"]["prompt"] == prompt]
        two = sorted(own, key=lambda record: (-worth(said(record)), record["origin"]["completion"]))[:2]
        wanted += [record for record in own if record in two]
    assert [said(record) for record in lines(tmp_path / "out.jsonl")] == [said(record) for record in wanted]
    assert done.left_out["others are worth as much or more"] == len(whole) - len(wanted) > 0


def test_what_cannot_be_judged_is_not_taken_for_wrong(
    teacher: LanguageModel, asked: Path, rules: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = ended(teacher, asked, tmp_path)
    failed = [record for record in whole if worth(said(record)) <= 0.2]
    assert 0 < len(failed) < len(whole)
    done = finemoe.rejection(teacher, asked, tmp_path / "out.jsonl", rewards=by(rules, "picky"), **DRAWN)
    assert done.left_out["could not be judged by function"] == len(failed)
    assert "worth less than 1" not in done.left_out
    told = [one.getMessage() for one in caplog.records if "could not be judged" in one.getMessage()]
    assert len(told) == 1
    assert "it will not look at that" in told[0]
    watched = by(rules, "picky", name="watched", weight=0.0) + by(rules, "digits")
    done = finemoe.rejection(teacher, asked, tmp_path / "watched.jsonl", rewards=watched, at_least=0.0, **DRAWN)
    assert done.kept == len(first_of_each(whole)), "a reward without weight may fail"
    unknown = [r for r in lines(tmp_path / "watched.jsonl") if r["origin"]["rewards"]["watched"] is None]
    assert {said(record) for record in unknown} == {said(record) for record in failed}


def test_where_nothing_can_be_judged_it_stops(
    teacher: LanguageModel, models: dict[str, Path], rules: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"function: RuntimeError: it is broken.* remove .*out\.jsonl"):
        finemoe.rejection(teacher, models["chats"], out, rewards=by(rules, "never"), **DRAWN)
    assert len(out.with_name(".out.jsonl.progress").read_text().splitlines()) < 40


class Pulled(Exception):
    """The plug."""


def test_interrupted_it_comes_to_the_same_file(
    teacher: LanguageModel, asked: Path, rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a prompt stands again behind the break: what was kept of it before is not kept again."""
    records = asked.read_text().splitlines()
    asked.write_text("\n".join([*records[:4], *records[:4], *records[4:]]))
    options = {**DRAWN, "rewards": by(rules, "digits"), "at_least": 0.5}
    whole = finemoe.rejection(teacher, asked, tmp_path / "whole.jsonl", **options)
    out, choosing, asks = tmp_path / "out.jsonl", ByRewards.__call__, Counter[str]()

    def pulling(self: ByRewards, one: Any, completions: Any) -> Any:
        asks["all"] += 1
        if asks["all"] == 6:
            raise Pulled
        return choosing(self, one, completions)

    with monkeypatch.context() as patched:
        patched.setattr(ByRewards, "__call__", pulling)
        with pytest.raises(Pulled):
            finemoe.rejection(teacher, asked, out, **options)
    again = finemoe.rejection(teacher, asked, out, **options)
    assert lines(out) == lines(tmp_path / "whole.jsonl")
    assert {**again.to_dict(), "path": ""} == {**whole.to_dict(), "path": ""}
    with pytest.raises(ConfigError, match=r"begun with --at-least 0.5, now 0.25: name another --out"):
        finemoe.rejection(teacher, asked, out, **{**options, "at_least": 0.25})
    rules.write_text(RULES + "# another file\n")
    with pytest.raises(ConfigError, match="begun with other --rewards: "):
        finemoe.rejection(teacher, asked, out, **options)


def test_a_prompt_is_put_in_other_words(teacher: LanguageModel, tmp_path: Path, rules: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "3+4", "answer": "7"}\n')
    rules.write_text("def score(prompt, completion, record):\n    return len(record['answer']) + (prompt == '3+4')\n")
    options = {**DRAWN, "n": 16, "rewards": by(rules, "score"), "at_least": 2.0}
    finemoe.rejection(teacher, tmp_path / "asked.jsonl", tmp_path / "chat.jsonl", **options)
    finemoe.rejection(teacher, tmp_path / "asked.jsonl", tmp_path / "put.jsonl", template="{prompt}=", **options)
    chat, put = lines(tmp_path / "chat.jsonl"), lines(tmp_path / "put.jsonl")
    assert {record["messages"][0]["content"] for record in [*chat, *put]} == {"3+4"}
    assert [said(record) for record in chat] != [said(record) for record in put]
    assert {record["text"] for record in put} == {f"3+4={record['messages'][-1]['content']}" for record in put}
    assert all("text" not in record for record in chat), "of a chat, what it is as a text is the template's affair"


def test_rewards_are_found_where_people_have_them(tmp_path: Path) -> None:
    assert read_rewards(None).rewards == (AnswerReward(),)
    tables = '[[{0}]]\nkind = "answer"\n[[{0}]]\nkind = "format"\nweight = 0.2\n'
    wanted = (AnswerReward(), FormatReward(weight=0.2))
    own, recipe = tmp_path / "rewards.toml", tmp_path / "recipe.toml"
    own.write_text("reward_seconds = 3\n" + tables.format("rewards"))
    recipe.write_text('[method]\nkind = "grpo"\nreward_seconds = 4\n' + tables.format("method.rewards"))
    for path, seconds in ((own, 3), (recipe, 4)):
        found = read_rewards(path)
        assert (found.rewards, found.reward_seconds) == (wanted, seconds)
    assert read_rewards([{"kind": "answer"}, FormatReward(weight=0.2)]).rewards == wanted


def test_advice_names_the_keys_of_a_file_that_has_them(
    teacher: LanguageModel, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(configs: object, *, keys: str | None, **bounds: object) -> None:
        raise ConfigError(f"the keys are {keys}")

    monkeypatch.setattr("finemoe.methods.distillation.rejection.Rewards", made)
    (tmp_path / "rewards.toml").write_text('[[rewards]]\nkind = "answer"\n')
    given: tuple[tuple[Any, str], ...] = ((tmp_path / "rewards.toml", "$"), ([{"kind": "answer"}], "None$"))
    for rewards, keys in given:
        with pytest.raises(ConfigError, match=f"the keys are {keys}"):
            finemoe.rejection(teacher, asked, tmp_path / "out.jsonl", rewards=rewards)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[method]\nkind = "sft"\n', r"neither \[\[rewards\]\] nor \[\[method.rewards\]\]"),
        ('[[stage]]\nname = "a"\n', r"of a \[\[stage\]\] are not looked for"),
        ('[[rewards]]\nkind = "anwser"\n', "did you mean `answer`"),
        ('reward = 3\n[[rewards]]\nkind = "answer"\n', "unknown key `reward`"),
        ("rewards = []\n", "rewards"),
    ],
)
def test_rewards_that_cannot_be_are_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rewards.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_rewards(tmp_path / "rewards.toml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at_least": float("nan")}, r"`at_least` must be a finite number \(got nan\)"),
        ({"template": "ask"}, "no {prompt}"),
        ({"best_of": 4}, "best_of"),
        ({"rewards": [{"kind": "answer"}] * 2}, "two rewards are called 'answer'"),
    ],
)
def test_settings_that_cannot_be(
    teacher: LanguageModel, asked: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        finemoe.rejection(teacher, asked, tmp_path / "out.jsonl", **{**SHORT, **options})
    assert not (tmp_path / "out.jsonl").exists()


def test_a_sum_of_decimals_reaches_its_bound(teacher: LanguageModel, asked: Path, rules: Path, tmp_path: Path) -> None:
    """0.7 + 0.2 + 0.1 is 0.9999999999999999 in a computer."""
    rules.write_text("def one(prompt, completion, record):\n    return 1\n")
    each = [by(rules, "one", name=f"{weight}", weight=weight)[0] for weight in (0.7, 0.2, 0.1)]
    done = finemoe.rejection(teacher, asked, tmp_path / "out.jsonl", rewards=each, **DRAWN)
    assert done.kept > 0
    assert "worth less than 1" not in done.left_out
