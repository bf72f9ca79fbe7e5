"""A study of a recipe's stages: every seed and stage once, the best value for all, claims by what came of them."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finemoe.charts.paper.words import claim_row
from finemoe.checkpoint.open import read_model_config
from finemoe.core.errors import ConfigError, DataError, RunError
from finemoe.model.size import measure
from finemoe.runs.run import resume
from finemoe.studies.fleet import Outcome
from finemoe.studies.paper import Paper
from finemoe.studies.staged import study as module
from finemoe.studies.staged import tuning
from finemoe.studies.staged.compute import sampled_flops, trained_flops
from finemoe.studies.staged.config import ClaimConfig
from finemoe.studies.staged.study import study
from studies.staged.tiny_study import RECIPE, seeds_here, written


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Paper:
    """The tiny study, whole."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        here(patch)
        return study(written(folder), out=folder / "out", quiet=True)


def here(patch: pytest.MonkeyPatch) -> None:
    """Runs in this process."""
    for place in (module, tuning):
        patch.setattr(place, "run_seeds", seeds_here)


def claim(study: Paper, name: str) -> dict[str, Any]:
    claims = study.results["experiments"]["claims"]["claims"]
    found: dict[str, Any] = next(one for one in claims if one["id"] == name)
    return found


def examined(study: Paper, seed: int, stage: str) -> dict[str, Any]:
    path = study.directory / "seeds" / f"seed-{seed}" / "examined" / f"{stage}.json"
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_every_seed_runs_every_stage_and_every_model_is_examined(done: Paper) -> None:
    assert not done.failures
    for seed in (0, 1):
        assert set(examined(done, seed, "base")["figures"]) == {"right", "greedy", "majority", "any", "length", "form"}
        config = json.loads((done.directory / "seeds" / f"seed-{seed}" / "3-zero" / "config.json").read_text())
        assert config["seed"] == seed
    drawn = [examined(done, seed, "base")["figures"]["length"] for seed in (0, 1)]
    assert drawn[0] != drawn[1], "seeds draw weights and answers of their own"


def test_the_best_value_of_the_trial_is_what_all_seeds_get(done: Paper) -> None:
    (tuned,) = done.results["tuning"]
    came_to = {float(value): got for value, got in tuned["came_to"].items()}
    assert set(came_to) == {1e-5, 1e-3}
    chosen = tuning.best(came_to)
    for seed in (0, 1):
        config = json.loads((done.directory / "seeds" / f"seed-{seed}" / "3-zero" / "config.json").read_text())
        assert config["optimizer"]["learning_rate"] == chosen
    trial = json.loads((done.directory / "tuning" / "2-zero-0-0" / "config.json").read_text())
    assert trial["seed"] == 1000
    assert not (done.directory / "tuning" / "examined" / "answers.json").exists(), "nothing that is tuned comes of it"


def test_claims_are_judged_seed_by_seed(done: Paper) -> None:
    longer = claim(done, "longer")
    differences = [examined(done, seed, "zero")["flops"] for seed in (0, 1)]
    assert longer["difference"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert longer["verdict"] == "reproduced"
    assert longer["printed"] == "1 against 2"
    assert claim(done, "same")["seeds"] == [0, 1]


def test_flops_of_all_that_a_stage_came_from_are_added_once(done: Paper) -> None:
    stages = {one["name"]: one for one in done.results["stages"]}
    assert stages["zero"]["from"] == ["base"]
    assert stages["zero"]["all_flops"] == pytest.approx(stages["zero"]["flops"] + stages["base"]["flops"])
    assert 0 <= stages["answers"]["kept"] <= stages["answers"]["drawn"] == 13  # different sums of the 20 that are drawn


def test_flops_of_a_stage_are_those_of_training_and_of_what_its_method_reads_and_writes(
    done: Paper, tmp_path: Path
) -> None:
    zero, base = done.directory / "seeds" / "seed-0" / "3-zero", done.directory / "seeds" / "seed-0" / "1-base"
    summary = json.loads((zero / "summary.json").read_text())
    assert trained_flops(base, {"training_flops": 9.0}) == 9.0, "what another method reads beside it is not counted"
    assert trained_flops(zero, summary) == pytest.approx(summary["training_flops"] * 5 / 3), (
        "writing, and the reference"
    )
    shutil.copytree(zero, tmp_path / "more")
    lines = [json.loads(one) for one in (zero / "metrics.jsonl").read_text().splitlines()]
    for one in lines:
        if one.get("figures"):
            one["figures"]["prompts_asked"] *= 4  # in every rollout: a fourth of what was written is learnt
    (tmp_path / "more" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert trained_flops(tmp_path / "more", summary) == pytest.approx(summary["training_flops"] * 8 / 3)
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"origin": {"tokens": tokens}}) + "\n" for tokens in (4, 8)))
    size = measure(read_model_config(base), 7)
    assert sampled_flops(base, answers, 10) == pytest.approx(10 * 6 * size.training_flops_per_token / 3)


def test_the_page_and_the_summary_tell_claims_and_stages(done: Paper) -> None:
    page = (done.directory / "report.html").read_text()
    summary = (done.directory / "summary.md").read_text()
    for text in ("What was trained more has taken more", "They are small.", "zero", "optimizer.learning_rate",
                 "of training, with those of the answers that GRPO writes and reads"):  # fmt: skip
        assert text in page
    assert summary.startswith("Of 2 claims: ")
    assert "| What was trained more has taken more | reproduced |" in summary
    assert (done.directory / "figures" / "right.svg").exists()
    share = next(one for one in done.results["stages"] if one["name"] == "base")["figures"]["right"]["mean"]
    assert f"base {share:.0%}" in page, "the picture says in words what it shows"


def test_the_best_value_is_that_of_the_highest_figure_and_the_first_of_equals() -> None:
    assert tuning.best({1e-4: 0.2, 1e-3: 0.9, 1e-2: 0.4}) == 1e-3
    assert tuning.best({1e-4: 0.2, 1e-3: 0.2}) == 1e-4


def test_given_again_it_does_nothing_again_and_seeds_are_added(
    done: Paper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in done.directory.rglob("*.safetensors")}
    more = ["study.seeds=[0, 1, 2]", "study.claims=[]", "study.parallel=1", "study.examination.reward_seconds=20"]
    again = study(written(tmp_path), out=done.directory, overrides=more, quiet=True)
    assert again.results["seeds"] == [0, 1, 2]
    after = {path: path.stat().st_mtime_ns for path in done.directory.rglob("*.safetensors")}
    assert before.items() < after.items(), "what was done is as it was, and a seed came to it"
    assert all("seed-2" in str(path) for path in after.keys() - before.keys())


def test_a_study_without_a_best_value_ends_before_its_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here(monkeypatch)
    said = r"the best optimizer\.learning_rate of zero is not known.*method\.answer_tokens 13"
    with pytest.raises(RunError, match=said):
        study(written(tmp_path), out=tmp_path / "out", quiet=True, overrides=["stage.zero.method.answer_tokens=13"])
    assert not (tmp_path / "out" / "seeds").exists()


def test_a_value_that_cannot_be_trained_with_is_not_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here(monkeypatch)
    text = RECIPE.replace("values = [1e-5, 1e-3]", "values = [-1.0, 1e-3]")
    found = study(written(tmp_path, text), out=tmp_path / "out", quiet=True, overrides=["study.seeds=[0]"])
    (tuned,) = found.results["tuning"]
    assert tuned["came_to"]["-1"] is None
    assert "learning_rate" in found.failures["tuning"]
    config = json.loads((tmp_path / "out" / "seeds" / "seed-0" / "3-zero" / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 1e-3


def test_trials_that_were_killed_are_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def killed(jobs: Any, *arguments: Any, **options: Any) -> Outcome:
        stages = [one for one in jobs["tuning"].raw["stage"] if one["name"] != "zero-0-1"]
        seeds_here({"tuning": replace(jobs["tuning"], raw={**jobs["tuning"].raw, "stage": stages})}, 1, "", quiet=True)
        return Outcome(failures={"tuning": "was killed"})

    monkeypatch.setattr(tuning, "run_seeds", killed)
    with pytest.raises(RunError, match=r"the best optimizer\.learning_rate of zero is not known.*was killed"):
        study(written(tmp_path), out=tmp_path / "out", quiet=True, overrides=["study.seeds=[0]"])


@pytest.mark.parametrize("override", ["optimizer.learning_rate=0.5", "stage.zero.optimizer.learning_rate=0.5"])
def test_a_key_that_is_tried_is_not_set(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"study\.tuned tries values of optimizer\.learning_rate for zero"):
        study(written(tmp_path), out=tmp_path / "out", quiet=True, overrides=[override])


def test_overrides_reach_the_trials_of_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here(monkeypatch)
    changes = ["study.seeds=[0]", "stage.answers.sample.n=2"]
    changes += ["stage.zero.training.steps=3", "stage.base.training.steps=1"]
    found = study(written(tmp_path), out=tmp_path / "out", quiet=True, overrides=changes)
    assert not found.failures
    for place, steps in (("tuning/2-zero-0-0", 3), ("tuning/1-base", 1), ("seeds/seed-0/3-zero", 3)):
        config = json.loads((tmp_path / "out" / place / "config.json").read_text())
        assert config["training"]["steps"] == steps


def test_what_was_asked_and_trained_on_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here(monkeypatch)
    corpus = "{ kind = 'problems', count = 200, validation_count = 20, difficulty = 3, seed = 5 }"
    others = [f"stage.zero.data.corpus={corpus}", f"stage.answers.sample.corpus={corpus}"]
    changes = ["study.seeds=[0]", "study.tuned=[]", *others]
    found = study(written(tmp_path), out=tmp_path / "out", quiet=True, overrides=changes)
    answered, trained = found.results["notes"]
    assert answered.endswith("of the 6 questions are among what stage answers has its model answer.")
    assert trained.endswith("of the 6 questions are among what stage zero trains on.")
    assert all(note in (tmp_path / "out" / "report.html").read_text() for note in (answered, trained))


def test_a_run_that_was_changed_is_named_on_the_page(
    done: Paper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here(monkeypatch)
    shutil.copytree(done.directory, tmp_path / "out")
    resume(tmp_path / "out" / "seeds" / "seed-0" / "3-zero", overrides=["training.steps=3"], quiet=True)
    notes = study(written(tmp_path), out=tmp_path / "out", quiet=True).results["notes"]
    assert notes == ["seeds/seed-0/3-zero was changed by `finemoe resume --set`: training.steps."]


def test_another_recipe_is_not_mixed_in(done: Paper, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds a study of other stages"):
        study(written(tmp_path), out=done.directory, overrides=["stage.zero.training.steps=3"], quiet=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(RunError, match="is not empty and not a study"):
        study(written(tmp_path), out=tmp_path / "other", quiet=True)


def test_a_stage_that_fails_leaves_its_claims_without_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here(monkeypatch)
    stages = RECIPE.index("[study]")
    base = RECIPE[RECIPE.index("[stage.data]") : RECIPE.index("[[stage]]", RECIPE.index('"base"'))]
    more = "".join(f'[[stage]]\nname = "{name}"\nstart_from = "{start}"\n{base}' for name, start in
                   (("apart", "base"), ("after", "zero")))  # fmt: skip
    text = RECIPE[:stages] + more + RECIPE[stages:]
    found = study(
        written(tmp_path, text), out=tmp_path / "out", quiet=True,
        overrides=["study.tuned=[]", "study.seeds=[0]", "stage.zero.method.answer_tokens=13"],
    )  # fmt: skip
    assert found.failures["seed 0"].startswith("stage zero: ")
    assert "method.answer_tokens 13" in found.failures["seed 0"]
    homes = {path.name for path in (found.directory / "seeds" / "seed-0").iterdir()}
    assert "4-apart" in homes, "what does not come from it is run all the same"
    assert "5-after" not in homes
    assert claim(found, "longer")["verdict"] == "not run"
    assert examined(found, 0, "base")["kind"] == "trained"
    assert "claims are not judged" in (found.directory / "report.html").read_text()


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ('a = "zero.all_flops"', 'a = "zer.right"', "names no stage that trains; those are: base, zero"),
        ('a = "zero.all_flops"', 'a = "answers.right"', "names no stage that trains"),
        ('a = "zero.all_flops"', 'a = "zero.wrong"', "names none of the figures right, greedy"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "`seeds` has 0 twice"),
        ('name = "zero"\n', 'name = "zero"\nseed = 4\n', "stage zero has a `seed`"),
        ("seeds = [0, 1]", "seeds = [0, 1000]", "tuning_seed 1000 is one of `seeds`"),
        ('stage = "zero"', 'stage = "zer"', "no stage that trains is called so"),
        ('id = "same"', 'id = "longer"', "`claims` has longer twice"),
        (RECIPE[RECIPE.index("[study]") :], "", "a study needs"),
        ('stage = "zero"\nvalues', 'stage = "base"\nvalues = [1e-3, 2e-3]\n[[study.tuned]]\nstage = "zero"\nvalues',
         "zero comes from base, which is tuned too"),
        ("group = 4", "group = 7", "stage zero: the 8 answers of a rollout are no whole groups of method.group 7"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path: Path, was: str, now: str, said: str) -> None:
    assert was in RECIPE
    with pytest.raises(ConfigError, match=said):
        study(written(tmp_path, RECIPE.replace(was, now)), out=tmp_path / "out", quiet=True)
    assert not list(tmp_path.rglob("*.json")), "nothing ran"


@pytest.mark.parametrize("override", ["seed=7", "stage.zero.seed=7"])
def test_a_seed_for_all_seeds_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"say study\.seeds"):
        study(written(tmp_path), out=tmp_path / "out", quiet=True, overrides=[override])


def test_questions_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no records\n" * 50)
    text = RECIPE.replace(
        'corpus = { kind = "problems", problem = "running_sum", count = 50, validation_count = 20, difficulty = 3 }\n'
        "num_prompts = 6",
        f'corpus = {{ kind = "files", paths = ["{tmp_path}/text.txt"] }}\nnum_prompts = 6',
    )
    with pytest.raises(DataError, match=r"study\.examination\.corpus"):
        study(written(tmp_path, text), out=tmp_path / "out", quiet=True)


def test_both_sides_of_a_claim_are_of_the_seeds_that_both_have() -> None:
    records = {
        0: {"x": {"figures": {"right": 0.9}}, "y": {"figures": {"right": 0.8}}},
        1: {"y": {"figures": {"right": 0.1}}},
    }
    judged = module._judged(ClaimConfig(id="c", statement="s", a="x.right", b="y.right"), records)
    assert judged["seeds"] == [0]
    assert judged["b"]["mean"] == 0.8, "not the mean over a seed that the other has not"


@pytest.mark.parametrize(
    ("figure", "before", "after", "verdict"),
    [
        ("any", 1.0, 1.0, "undecided"),
        ("any", 0.99, 0.5, "undecided"),  # what could not rise says nothing by falling
        ("any", 0.9, 0.9, "reproduced"),
        ("any", 0.9, 1.0, "contradicted"),
        ("length", 1.0, 1.0, "reproduced"),  # no share: it has no highest value
    ],
)
def test_that_a_share_does_not_rise_says_nothing_where_it_could_not(
    figure: str, before: float, after: float, verdict: str
) -> None:
    records = {seed: {"a": {"figures": {figure: after}}, "b": {"figures": {figure: before}}} for seed in range(3)}
    one = ClaimConfig(id="c", statement="It does not rise", a=f"a.{figure}", b=f"b.{figure}", relation="no_higher")
    judged = module._judged(one, records)
    assert judged["verdict"] == verdict
    assert judged["no_room"] == (verdict == "undecided")
    told = claim_row(judged)[1]
    assert told == ("undecided, no room" if judged["no_room"] else verdict)
    assert judged["reason"].startswith("no room: it could rise by") == judged["no_room"]
