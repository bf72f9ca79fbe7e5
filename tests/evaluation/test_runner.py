"""Asking: the same at every batch size, after a kill, and from kept answers; nothing stale is ever used."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_models import MadeUp, opened

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError
from finemoe.evaluation.results import Evaluated, results, scores_of
from finemoe.evaluation.runner import Answers, Asked, Settings, ask, describe_model, fingerprint
from finemoe.evaluation.tables import notes
from finemoe.evaluation.task import Generate, Generated, Item, Judged, Rolling, Scored
from finemoe.model.native import available

KINDS = ("moe", "dense")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return opened(request.param)


def asked(model: LanguageModel, task: MadeUp | None = None, batch: int = 4, answers: Answers | None = None) -> Asked:
    key = fingerprint(model)
    return ask(model, task or MadeUp(), None, Settings(batch=batch), answers, model_key=key, quiet=True)


def told(made: Asked) -> list:
    return [
        (item.id, dict(judged.scores), judged.outcome) for item, judged in zip(made.items, made.judged, strict=True)
    ]


@pytest.mark.skipif(not available(), reason="the C++ kernels, which make it exact, do not run here")
@pytest.mark.parametrize("task", [MadeUp(), MadeUp(samples=3, kinds=("write",), count=3)], ids=["greedy", "sampled"])
def test_batch_1_and_64_give_equal_results(model: LanguageModel, task: MadeUp) -> None:
    one, many = (
        results([Evaluated("m", describe_model(model, "k"), {"madeup": asked(model, task, batch)})], Settings())
        for batch in (1, 64)
    )
    for scores in (one["scores"], many["scores"]):
        for name in ("seconds", "answering_seconds", "tokens_per_second"):
            scores["m"]["madeup"].pop(name)
    assert one["scores"] == many["scores"]
    assert one["models"]["m"]["batch_invariant"]


def test_what_was_killed_goes_on_and_comes_to_the_same(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "answers" / "madeup.jsonl"
    whole = told(asked(model))
    kept = Answers(path)
    asked(model, answers=kept)
    kept.close()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for keep in (0, 1, len(lines) // 2, len(lines) - 1):
        torn = "".join(lines[:keep]) + lines[-1][: len(lines[-1]) // 2]
        path.write_text(torn, encoding="utf-8")
        again = Answers(path)
        made = asked(model, answers=again)
        again.close()
        assert made.reused == keep
        assert told(made) == whole
    last = Answers(path)
    made = asked(model, answers=last)
    last.close()
    assert (made.reused, made.tokens) == (len(lines), 0)
    assert told(made) == whole


def test_another_model_prompt_tokenizer_or_seed_finds_nothing(tmp_path: Path) -> None:
    model = opened()
    kept = Answers(tmp_path / "answers.jsonl")
    first = asked(model, answers=kept)
    assert first.reused == 0
    assert asked(model, MadeUp(words="a "), answers=kept).reused < len(first.items)
    assert asked(opened(seed=1), answers=kept).reused == 0
    assert asked(opened(reach=20), answers=kept).reused == 0
    assert asked(opened("dense"), answers=kept).reused == 0
    drawn = MadeUp(samples=2, kinds=("write",), count=2)
    assert asked(model, drawn, answers=kept).reused == 0
    made = ask(model, drawn, None, Settings(seed=1), kept, model_key=fingerprint(model), quiet=True)
    kept.close()
    assert made.reused == 0


def test_the_fingerprint_sees_one_changed_bit() -> None:
    model, same, other = opened(), opened(), opened()
    assert fingerprint(model) == fingerprint(same)
    weight = other.model.blocks[1].feed_forward.experts.down_proj
    weight.data.view(-1)[7] *= 1 + 2**-23
    assert fingerprint(other) != fingerprint(model)


def test_sampled_completions_differ_and_come_again() -> None:
    task = MadeUp(samples=4, kinds=("write",), count=2)
    kept = Answers()
    asked(opened(), task, answers=kept)
    for answer in kept.known.values():
        assert isinstance(answer, Generated)
        assert len(set(answer.texts)) > 1
    again = Answers()
    asked(opened(), task, batch=1, answers=again)
    assert again.known == kept.known


def one_request(request, model: LanguageModel):
    kept = Answers()

    class One:
        name, title, metric, shots, chance = "one", "One", "accuracy", 0, None

        def items(self, source, shots, limit):
            return [Item("a", (request,))], 0

        def judge(self, item, answers):
            return Judged({"accuracy": 1.0})

    made = ask(model, One(), None, Settings(), kept, quiet=True)
    return made, next(iter(kept.known.values()))


def test_answers_end_before_a_stop_even_one_that_spans_tokens() -> None:
    model = opened(reach=64)
    _, free = one_request(Generate("the cat", (), 12), model)
    assert isinstance(free, Generated)
    text = free.texts[0]
    assert free.unfinished == 1
    for start in range(1, max(2, len(text) - 3)):
        stop = text[start : start + 3]
        made, ended = one_request(Generate("the cat", ("never this", stop), 12), model)
        assert isinstance(ended, Generated)
        assert ended.texts[0] == text[: text.index(stop)]
        assert made.unfinished == 0


def test_prompts_that_are_too_long_are_cut_from_the_left_and_counted() -> None:
    model = opened(reach=16)
    long = "the dog and the cat sat on the mat. " * 6
    made, answer = one_request(Generate(long, (), 4), model)
    assert made.truncated == 1
    ids = model.tokenizer.encode(long)[-12:]
    made, same = one_request(Generate(model.tokenizer.decode(ids), (), 4), model)
    assert made.truncated == 0
    assert isinstance(answer, Generated)
    assert isinstance(same, Generated)
    assert answer.texts == same.texts


def test_an_empty_text_costs_nothing_and_scores_zero() -> None:
    _, answer = one_request(Rolling(""), opened())
    assert answer == Scored(0.0, 0, True)


def test_a_gap_that_the_tokenizer_cannot_name_is_refused_with_the_tasks_name() -> None:
    with pytest.raises(ConfigError, match=r"one: .*fill-in-the-middle"):
        one_request(Generate("def f(", (), 4, suffix="return"), opened())


def test_the_items_that_a_judge_fails_at_are_no_wrong_answers() -> None:
    made = asked(opened())
    broken = (Judged({}, "error", note="it broke"), *made.judged[1:])
    slow = Judged({"accuracy": 0.0}, "timeout", note="10 s")
    spoilt = replace(made, judged=(broken[0], slow, *broken[2:]))
    assert len(scores_of(spoilt, "accuracy")) == len(made.items) - 1
    scores = results([Evaluated("m", describe_model(opened(), "k"), {"madeup": spoilt})], Settings())["scores"]["m"]
    own = scores["madeup"]
    assert own["n"] == own["asked"] - 1
    assert own["outcomes"] == {"error": 1, "timeout": 1, "answered": own["asked"] - 2}
    assert own["skipped"] == 2
    assert any("it broke" in note for note in own["notes"])


def test_what_cannot_be_compared_is_counted_beside_the_score() -> None:
    made = asked(opened())
    odd = Judged({"accuracy": 0.0}, "undecided", note="'x' cannot be compared with 'y'")
    slow = [Judged({"accuracy": 0.0}, "timeout", note="10 s")] * 2
    spoilt = replace(made, judged=(odd, odd, *slow, *made.judged[4:]))
    found = results([Evaluated("m", describe_model(opened(), "k"), {"madeup": spoilt})], Settings())
    own = found["scores"]["m"]["madeup"]
    assert (own["n"], own["outcomes"]["undecided"]) == (own["asked"], 2)
    assert [note.split(": ")[1] for note in own["notes"]] == ["undecided", "timeout"]  # the first of each
    said = " ".join(notes(found))
    assert "2 timeout and 2 undecided of 8 items" in said
    assert "lower bound" in said


def test_speed_is_that_of_the_model_alone(model: LanguageModel) -> None:
    class Slow(MadeUp):
        def items(self, source, shots, limit):
            time.sleep(0.3)
            return MadeUp.items(self, source, shots, limit)

        def judge(self, item, answers):
            time.sleep(0.1)
            return MadeUp.judge(self, item, answers)

    kept = Answers()
    first = asked(model, Slow(kinds=("options",)), answers=kept)
    assert first.seconds - first.answering > 1.0
    four_options = sum(len(model.tokenizer.encode(r.requests[0].context + " cat")) for r in first.items)
    assert first.tokens < 2 * four_options  # what the options share is read once, not four times
    again = results(
        [Evaluated("m", describe_model(model, "k"), {"madeup": asked(model, Slow(), answers=kept)})], Settings()
    )
    everything = asked(model, Slow(), answers=kept)
    assert everything.tokens == 0
    told_again = results([Evaluated("m", describe_model(model, "k"), {"madeup": everything})], Settings())
    assert told_again["scores"]["m"]["madeup"]["tokens_per_second"] is None
    own = again["scores"]["m"]["madeup"]
    # The seconds are told in thousandths, and a fast machine answers in a few of them.
    slowest, fastest = (own["tokens"] / (own["answering_seconds"] + rest) for rest in (0.0005, -0.0005))
    assert slowest - 0.1 <= own["tokens_per_second"] <= fastest + 0.1


def test_results_say_how_many_worked_examples_there_really_were() -> None:
    made = asked(opened())
    items = tuple(replace(item, facts={**item.facts, "shots": 2 + n}) for n, item in enumerate(made.items))
    found = results(
        [Evaluated("m", describe_model(opened(), "k"), {"t": replace(made, items=items, shots=5)})], Settings()
    )
    assert [found["tasks"]["t"][key] for key in ("shots", "shots_most", "shots_wanted")] == [2, 9, 5]


def test_results_have_groups_their_mean_and_paired_differences() -> None:
    settings = Settings()
    models = [opened(seed=seed) for seed in (0, 1)]
    done = [Evaluated(f"m{i}", describe_model(m, "k"), {"madeup": asked(m)}) for i, m in enumerate(models)]
    found = results(done, settings, command="finemoe evaluate")
    own = found["scores"]["m0"]["madeup"]
    assert set(own["groups"]) == {"options", "text", "write"}
    assert own["macro"]["value"] == pytest.approx(sum(g["value"] for g in own["groups"].values()) / 3)
    (pair,) = found["differences"]
    by_hand = found["scores"]["m0"]["madeup"]["value"] - found["scores"]["m1"]["madeup"]["value"]
    assert pair["value"] == pytest.approx(by_hand)
    assert found["tasks"]["madeup"]["prompts"] == done[0].asked["madeup"].prompts
    assert asked(models[0], MadeUp(words="a ")).prompts != done[0].asked["madeup"].prompts
    json.dumps(found)


def test_a_task_that_repeats_an_id_is_our_defect() -> None:
    class Twice(MadeUp):
        def items(self, source, shots, limit):
            made, skipped = MadeUp.items(self, source, shots, limit)
            return [made[0], made[0]], skipped

    with pytest.raises(ValueError, match="more than one item"):
        asked(opened(), Twice())
