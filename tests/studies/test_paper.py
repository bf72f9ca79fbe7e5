"""The study of the papers' claims: the claims themselves, the verdicts, and one study in miniature."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from finemoe.analysis.knockout import PAPER
from finemoe.analysis.passages import observe, read_passages
from finemoe.charts.paper.figures import PRINTED_ACTIVE, PRINTED_MASKED
from finemoe.charts.paper.page import paper_page
from finemoe.charts.paper.words import counted, every_claim, summary_markdown
from finemoe.checkpoint.language_model import open_language_model
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, RunError
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.studies import knockouts
from finemoe.studies.arms import ARMS, solve
from finemoe.studies.claims import EXPERIMENTS, MARGIN, Claim, Quantity
from finemoe.studies.config import CompareConfig, resolve_comparison
from finemoe.studies.paper import Paper, _outcome, judge, paper, write_results
from finemoe.studies.scales import SCALES
from finemoe.studies.statistics import Interval, interval
from studies.in_process import run_here

CLAIMS = {claim.id: claim for experiment in EXPERIMENTS.values() for claim in experiment.claims}
TINY = (
    "seeds=[0, 1]",
    "budget.value=512",
    "base.vocab_size=300",
    "data.max_validation_tokens=2048",
    "data.sequence_length=32",
    "data.corpus.max_bytes=400_000",
    "training.tokens_per_step=256",
    "training.threads=1",
)


def test_claims_have_names_of_their_own() -> None:
    assert len(CLAIMS) == sum(len(experiment.claims) for experiment in EXPERIMENTS.values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_of_an_experiment_can_be_trained(name: str) -> None:
    assert set(EXPERIMENTS[name].all_arms) <= set(ARMS)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_the_papers_own_figures_bear_each_claim_out(claim: Claim) -> None:
    """A sign turned round in the table would give every verdict the wrong way."""
    if claim.printed_difference is not None:
        printed = claim.printed_difference
        tight = Interval(printed, printed - 1e-6, printed + 1e-6)
        assert judge(claim, tight, 3)[0] == "reproduced"


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_printed_losses_agree_with_the_arms_own(claim: Claim) -> None:
    """Pile losses stand once at the arms and once in the claims; they must be the same figures."""
    papers = [ARMS[quantity.arm].paper for quantity in (claim.a, claim.b)]
    if claim.a.kind == claim.b.kind == "loss" and None not in papers and claim.printed_difference is not None:
        (_, a), (_, b) = papers  # type: ignore[misc]
        assert claim.printed_difference == pytest.approx(a - b, abs=1e-9)
        assert claim.printed == f"{a:.3f} against {b:.3f}"


def test_figures_4_and_5_are_printed_alike_everywhere() -> None:
    """They stand in the charts of this study, in the claims, and where knock-outs of any model show the paper's."""
    masked = {name.replace(" x1.5", "×1.5"): points for name, points in PRINTED_MASKED.items()}
    assert {n: {str(round(16 * x)): y for x, y in p.items()} for n, p in masked.items()} == PAPER["masked"]
    assert {str(round(7 * x)): y for x, y in PRINTED_ACTIVE["DeepSeekMoE"].items()} == PAPER["active"]
    for number in (1, 2, 3, 4):
        ours, theirs = (points[number / 16] - points[0] for points in PRINTED_MASKED.values())
        assert CLAIMS[f"masked-{number}"].printed == f"rise of {ours:.3f} against {theirs:.3f}"


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_figures_of_one_claim_are_of_one_text(claim: Claim) -> None:
    """A knock-out's loss set against a validation loss would also measure how the two texts differ."""
    assert claim.a.needs_knockout == claim.b.needs_knockout


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_a_recipe(scale: str) -> None:
    config = resolve_comparison({**SCALES[scale].recipe, "arms": list(ARMS)}, scale)
    assert len(config.seeds) >= 2, "one seed decides nothing"


def claim(relation: Any) -> Claim:
    return Claim("x", "x", "x", "x", Quantity("dense"), Quantity("hash"), relation)


@pytest.mark.parametrize(
    ("relation", "low", "high", "verdict"),
    [
        ("lower", -0.2, -0.1, "reproduced"),
        ("lower", -0.2, 0.1, "undecided"),
        ("lower", 0.1, 0.2, "contradicted"),
        ("higher", 0.1, 0.2, "reproduced"),
        ("higher", -0.1, 0.2, "undecided"),
        ("higher", -0.2, -0.1, "contradicted"),
        ("no_higher", -0.2, MARGIN / 2, "reproduced"),
        ("no_higher", -0.2, 2 * MARGIN, "undecided"),
        ("no_higher", 2 * MARGIN, 0.2, "contradicted"),
        ("equal", -MARGIN / 2, MARGIN / 2, "reproduced"),
        ("equal", -MARGIN / 2, 2 * MARGIN, "undecided"),
        ("equal", -0.3, 0.3, "undecided"),
        ("equal", 2 * MARGIN, 0.2, "contradicted"),
        ("equal", -0.2, -2 * MARGIN, "contradicted"),
    ],
)
def test_verdicts(relation: str, low: float, high: float, verdict: str) -> None:
    assert judge(claim(relation), Interval((low + high) / 2, low, high), 3)[0] == verdict


@pytest.mark.parametrize(
    ("relation", "mean", "against"),
    [
        ("lower", 0.001, True),
        ("lower", -0.001, False),
        ("higher", -0.001, True),
        ("higher", 0.001, False),
        ("no_higher", MARGIN / 2, False),
        ("no_higher", 2 * MARGIN, True),
        ("equal", -2 * MARGIN, True),
        ("equal", MARGIN / 2, False),
    ],
)
def test_an_undecided_claim_says_where_its_mean_points(relation: str, mean: float, against: bool) -> None:
    wide = {0: mean - 1, 1: mean, 2: mean + 1}
    found = _outcome(claim(relation), wide, dict.fromkeys(wide, 0.0))
    assert (found["verdict"], found["points_against"]) == ("undecided", against)


def test_one_seed_and_no_seed_decide_nothing() -> None:
    assert judge(claim("lower"), Interval(-1.0, None, None), 1)[0] == "undecided"
    assert judge(claim("lower"), None, 0)[0] == "not run"


def test_a_max_vio_has_no_margin_in_nats() -> None:
    one = Claim("x", "x", "x", "x", Quantity("dense", "max_vio"), Quantity("hash", "max_vio"), "no_higher")
    assert judge(one, Interval(0.004, 0.003, 0.005), 3)[0] == "contradicted"


@pytest.fixture(scope="module", autouse=True)
def _short_knock_outs() -> Iterator[None]:
    """A few windows show what these tests ask for; the default takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knockouts, "TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Paper:
    """Two arms, two seeds, two steps each, with the knock-outs of Figure 5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finemoe.studies.study.run_fleet", run_here)
        return paper("trial", only=["figure5"], out=tmp_path_factory.mktemp("paper") / "p", overrides=TINY, quiet=True)


def summaries(study: Paper, arm: str) -> dict[int, Any]:
    runs = {seed: study.directory / "arms" / arm / f"seed-{seed}" / "summary.json" for seed in (0, 1)}
    return {seed: json.loads(path.read_text()) for seed, path in runs.items()}


def found(study: Paper, id: str) -> Mapping[str, Any]:
    return next(one for one in every_claim(study.results) if one["id"] == id)


def test_a_study_holds_its_results(study: Paper) -> None:
    assert not study.interrupted
    assert not study.failures
    names = {path.name for path in study.directory.iterdir()}
    assert {"compare.json", "arms", "knockouts", "results.json", "report.html", "summary.md", "figures"} <= names
    assert json.loads((study.directory / "results.json").read_text()) == study.results
    assert {path.name for path in (study.directory / "arms").iterdir() if path.is_dir()} == {"deepseek-moe", "gshard"}


def test_what_was_not_asked_for_is_not_run(study: Paper) -> None:
    assert found(study, "hash-dense")["verdict"] == "not run"
    assert "not run" in counted(study.results)
    assert found(study, "ours-gshard")["verdict"] != "not run", "its runs are there, so it is judged too"


def test_knock_outs_are_those_of_what_was_asked_for(study: Paper, tmp_path: Path) -> None:
    config = parse(CompareConfig, study.results["recipe"], "test")
    arms = {name: solve(name, config.base, config.matching, config.routing, 32) for name in config.arms}
    (tmp_path / "arms").symlink_to(study.directory / "arms")
    for measure, files in (((), 0), (["gshard-x1.5"], 0), (["deepseek-moe"], 2)):
        figures = knockouts.gather(tmp_path, arms, config, EXPERIMENTS.values(), quiet=True, measure=measure)
        assert len(list(tmp_path.glob("knockouts/*/*.json"))) == files
        assert len(figures[Quantity("deepseek-moe", "active", 4 / 7)]) == files


def test_a_loss_that_is_no_number_leaves_results_that_any_reader_takes(study: Paper, tmp_path: Path) -> None:
    results = json.loads(json.dumps(study.results))
    results["experiments"]["figure5"]["claims"][0]["a"]["mean"] = float("nan")
    write_results(results, tmp_path)
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)


def test_differences_are_paired_by_seed(study: Paper) -> None:
    ours, theirs = summaries(study, "deepseek-moe"), summaries(study, "gshard")
    differences = [ours[seed]["final_validation_loss"] - theirs[seed]["final_validation_loss"] for seed in (0, 1)]
    expected, got = interval(differences), found(study, "ours-gshard")["difference"]
    assert (got["mean"], got["low"], got["high"]) == pytest.approx((expected.mean, expected.low, expected.high))


def test_training_text_is_judged_beside_held_out_text(study: Paper) -> None:
    ours, theirs = summaries(study, "deepseek-moe"), summaries(study, "gshard")
    expected = interval([ours[seed]["final_training_loss"] - theirs[seed]["final_training_loss"] for seed in (0, 1)])
    got = found(study, "ours-gshard")["on_training_text"]
    assert got["difference"]["mean"] == pytest.approx(expected.mean)
    assert got["verdict"] == judge(CLAIMS["ours-gshard"], expected, 2)[0]
    assert found(study, "four-active")["on_training_text"] is None
    assert 0 < study.results["passes"] < 1


def test_fewer_experts_agree_with_a_plain_pass(study: Paper) -> None:
    run = study.directory / "arms" / "deepseek-moe" / "seed-1"
    opened = open_language_model(run)
    passages = read_passages(opened, tokens=knockouts.TOKENS)
    constraint = {layer: RoutingConstraint(num_active=4) for layer in opened.model.moe_layers}
    total = weight = 0.0
    for one in observe(opened, passages, constraint=constraint, record=False, description=None):
        total += (one.losses * one.batch.weights).sum().item()
        weight += one.batch.weights.sum().item()
    assert found(study, "four-active")["a"]["seeds"]["1"] == pytest.approx(total / weight, abs=1e-5)


def test_what_is_finished_is_not_done_again(study: Paper) -> None:
    kept = [path for part in ("arms", "knockouts") for path in (study.directory / part).rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = paper("trial", only=["figure5"], out=study.directory, overrides=TINY, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert again.results["experiments"] == study.results["experiments"]


def test_another_configuration_is_refused(study: Paper) -> None:
    with pytest.raises(RunError, match="another configuration"):
        paper("trial", only=["figure5"], out=study.directory, overrides=["seeds=[0]", *TINY[1:]], quiet=True)


def test_the_page_and_the_table_say_the_same(study: Paper) -> None:
    page, table = html.unescape(paper_page(study.results)), summary_markdown(study.results)
    for one in every_claim(study.results):
        title = study.results["experiments"][one["experiment"]]["title"]
        assert (one["statement"] if one["verdict"] != "not run" else title) in page
        row = next(line for line in table.splitlines() if line.startswith(f"| {one['statement']} |"))
        assert one["verdict"] in row
        assert one["printed"] in row
    assert study.results["experiments"]["figure5"]["command"].split("--only ")[1].split()[0] == "figure5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "tinny"}, "did you mean"),
        ({"only": ["figure44"]}, "did you mean"),
        ({"overrides": ["arms=['dense']"]}, "--only"),
        ({"overrides": ["arms.x=64"]}, "--only"),
        ({"overrides": ["model.hidden_size=64"]}, "did you mean base.hidden_size"),
        ({"overrides": ["base.hiden_size=64"]}, "hidden_size"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        paper(**{"scale": "trial", **arguments}, out=tmp_path / "p")
    assert not (tmp_path / "p").exists()
