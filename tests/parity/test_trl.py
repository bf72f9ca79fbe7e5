"""The losses of fine-tuning, preferences and rewards, and all gradients, are those of TRL's own trainers.

TRL is a witness in an environment of its own: `FINEMOE_TRL=/path/to/python` names a Python that has it. `pytest -s`
says how far apart the two are.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.run_state import state as run_state
from finemoe.core.config import to_json
from finemoe.data.batch import PackedBatch
from finemoe.methods.dpo import DPOConfig, Preference
from finemoe.methods.reward import Judge, RewardConfig
from finemoe.methods.sft import Learn
from finemoe.model.initialize import initialize
from finemoe.model.logprobs import token_logprobs
from finemoe.model.moe.balance import BALANCE_TERMS
from finemoe.model.transformer import Transformer
from finemoe.runs.config import resolve_run
from finemoe.runs.start import build_method
from finemoe.text import Tokenizer
from finemoe.training.losses.coefficients import ByCoefficients, Places, Rule
from methods.tiny_talks import adapting, write_pairs
from parity.foreign_models import make, ours, read_folder, take
from parity.frozen_batch import BATCH, LABELS, conversations, pairs_of_answers, pairs_to_judge

PEER = os.environ.get("FINEMOE_TRL")
MODELS = ("llama", "qwen3_moe", "deepseek_v3")
VOCAB = 300
BOUND = 1e-5
ONE_BY_ONE = True
"""TRL sees every pair in a batch of its own, and what it says of them is averaged."""


@dataclass(frozen=True)
class Case:
    """A question to TRL, and the rule of ours that ought to give the same answer."""

    trainer: str
    arguments: Mapping[str, Any]
    ours: Mapping[str, Any]
    each: bool = False
    balances: bool = False
    """Leave it to TRL whether a balance loss is added; otherwise none is."""


ALONE = {"reference": "none", "length": "mean"}
CASES = {
    "sft": Case("sft", {}, {}),
    "dpo": Case("dpo", {"beta": 0.1}, {"beta": 0.1}),
    # Its sigmoid knows no smoothing. Its AOT does, and sorts ratios over a batch: of one pair it is conservative DPO.
    "conservative dpo": Case(
        "dpo", {"loss_type": ["aot"], "label_smoothing": 0.1}, {"label_smoothing": 0.1}, ONE_BY_ONE
    ),
    "hinge": Case("dpo", {"loss_type": ["hinge"], "beta": 1.0}, {"loss": "hinge", "beta": 1.0}),
    # Its IPO divides by the lengths of the answers, which eq. 17 of 2310.12036 does not.
    "ipo": Case("dpo", {"loss_type": ["ipo"], "beta": 0.1}, {"loss": "ipo", "beta": 0.1, "length": "mean"}),
    "dpo per token": Case("dpo", {"loss_type": ["sigmoid_norm"], "beta": 0.7}, {"beta": 0.7, "length": "mean"}),
    # Its cross-entropy is a mean over the tokens of a batch, where 2404.19733 takes that of each answer.
    "rpo": Case(
        "dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, {"beta": 0.1, "nll": 0.7}, ONE_BY_ONE
    ),
    "simpo": Case(
        "cpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        {**ALONE, "beta": 2.0, "target_margin": 0.5},
    ),
    "conservative simpo": Case(
        "cpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "label_smoothing": 0.1},
        {**ALONE, "beta": 2.0, "target_margin": 0.5, "label_smoothing": 0.1},
    ),
    "reward": Case("reward", {}, {}),
}
OTHERS = {
    "sft by default": Case("sft", {}, {}, balances=True),
    "dpo by default": Case("dpo", {}, {}, balances=True),
    "dpo that is to be smoothed": Case("dpo", {"label_smoothing": 0.1}, {}),
    "rpo in one batch": Case("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, {}),
}
"""Asked too, to see where it differs."""


def question(case: Case) -> dict[str, Any]:
    """As the witness reads it."""
    switched = case.trainer in ("sft", "dpo") and not case.balances
    off = {"router_aux_loss_coef": 0.0} if switched else {}
    return {"trainer": case.trainer, "arguments": {**off, **case.arguments}, "each": case.each}


def write_run(folder: Path, model: Transformer) -> Path:
    """A run whose newest checkpoint is `model`."""
    config = {"model": json.loads(to_json(model.config)), "data": {"sequence_length": 64}}
    state = run_state.RunState(dict(model.state_dict()), {}, {"step": 1}, json.dumps(config))
    run_state.save(folder / "checkpoints", 1, state, keep=1)
    Tokenizer.train(["abc abd " * 9], 260).save(folder / "tokenizer.json")
    return folder


@dataclass(frozen=True)
class Exported:
    """A policy and a reference near it, as finemoe exports them."""

    policy: Path
    reference: Path

    @cached_property
    def known(self) -> Tensor:
        """[pairs, 2]: log-probabilities of the answers under the reference."""
        model, batch = ours(self.reference), pairs_of_answers()
        places = Places.of(batch)
        with torch.no_grad():
            output = model(batch.rows.tokens, positions=batch.rows.positions, documents=batch.rows.documents)
            logprobs, _ = token_logprobs(model, output.hidden[0, places.index], places.targets)
        return places.per_document(logprobs, batch.num_documents).view(-1, 2)

    def of(self, batch: PackedBatch) -> Tensor:
        """As methods.reference.Reference has it."""
        return self.known[batch.items].flatten()


def export(family: str, home: Path) -> Exported:
    """Both models of a family, through a run and finemoe's exporter."""
    make(family, vocab_size=VOCAB, initializer_range=0.2).save_pretrained(home / "drawn")
    model = ours(home / "drawn")  # for its configuration: weights are drawn as those of a run are
    initialize(model, 0)
    for name, seed in (("policy", 1), ("reference", 7)):
        disturb(model, seed)
        export_hf(write_run(home / f"run-{name}", model), home / name, family=family, quiet=True)
    return Exported(home / "policy", home / "reference")


@torch.no_grad()
def disturb(model: Transformer, seed: int) -> None:
    """Every weight by about a tenth, norms among them, and selection biases away from 0."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=draw))
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=draw))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    return {case: export(case, tmp_path_factory.mktemp(case)) for case in MODELS}


@dataclass(frozen=True)
class Witness:
    """What TRL said."""

    folder: Path
    found: Mapping[str, Any]

    def loss(self, model: str, name: str) -> float:
        return self.found["models"][model][name]["loss"]

    def gradients(self, model: str, name: str) -> dict[str, Tensor]:
        return read_folder(self.folder / model / name)[1]


@pytest.fixture(scope="module")
def peer() -> str:
    if PEER is None:
        pytest.skip("FINEMOE_TRL names no Python that has trl")
    if subprocess.run([PEER, "-c", "import trl"], capture_output=True).returncode:
        pytest.skip(f"{PEER}, which FINEMOE_TRL names, has no trl")
    return PEER


@pytest.fixture(scope="module")
def witness(peer: str, exported: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> Witness:
    home = tmp_path_factory.mktemp("witness")
    job = {
        "models": {name: {"policy": str(o.policy), "reference": str(o.reference)} for name, o in exported.items()},
        "batch": BATCH,
        "questions": {name: question(case) for name, case in {**CASES, **OTHERS}.items()},
    }
    (home / "job.json").write_text(json.dumps(job))
    command = [peer, str(Path(__file__).with_name("trl_witness.py")), str(home / "job.json"), str(home / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, **offline}, cwd=home)
    assert not done.returncode, done.stderr[-4000:]
    found = json.loads((home / "out" / "found.json").read_text())
    print("\n" + ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    return Witness(home / "out", found)


def rule_of(case: Case, known: Exported) -> tuple[Rule, PackedBatch]:
    if case.trainer == "sft":
        return Learn(), conversations()
    if case.trainer == "reward":
        return Judge(RewardConfig(), LABELS), pairs_to_judge()
    config = DPOConfig.model_validate(case.ours)
    return Preference(config, known if config.reference == "start" else None), pairs_of_answers()  # type: ignore[arg-type]


def our_loss(case: Case, known: Exported, model: Transformer) -> Tensor:
    """Sums over counts, as the trainer divides them."""
    rule, batch = rule_of(case, known)
    objective = ByCoefficients(rule)
    counts, weights = objective.counts(batch), objective.weights(0.0)
    sums = objective.terms(model, batch).sums
    return torch.stack([weights.get(name, 1.0) * one / counts[name] for name, one in sums.items()]).sum()


def answer(case: Case, known: Exported) -> tuple[float, dict[str, Tensor]]:
    """Our loss, and our gradients under the names of the family's files."""
    raw, _ = read_folder(known.policy)
    model = ours(known.policy).train()
    loss = our_loss(case, known, model)
    loss.backward()
    found = dict(model.named_buffers())  # a selection bias has no gradient; its value stands in for it
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return loss.item(), take(model, raw["model_type"], found)


def as_language_model(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """A reward's gradients: what reaches TRL's one row reaches our row for good, and its negative the one for bad."""
    score = gradients.pop("score.weight")
    head = torch.zeros(VOCAB, score.shape[1])
    head[LABELS[0]], head[LABELS[1]] = score[0], -score[0]
    return {**gradients, "lm_head.weight": head}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_are_trls(exported: dict[str, Exported], witness: Witness, model: str, name: str) -> None:
    loss, gradients = answer(CASES[name], exported[model])
    expected = witness.gradients(model, name)
    if name == "reward":
        expected = as_language_model(expected)
    assert gradients.keys() == expected.keys()
    apart = {}
    for key, gradient in gradients.items():
        scale = float(expected[key].abs().max())
        difference = float((gradient - expected[key]).abs().max())
        apart[key] = difference / scale if scale else difference  # an expert that nobody is sent to: both are 0
    moved = [key for key, gradient in gradients.items() if gradient.abs().max() > 0]
    assert len(moved) > 0.8 * len(gradients)
    theirs = witness.loss(model, name)
    of_loss, worst = abs(loss - theirs) / abs(theirs), max(apart, key=lambda key: apart[key])
    print(f"\n| {name} | {model} | {theirs:.4f} | {of_loss:.1e} | {apart[worst]:.1e} | {worst}")
    assert of_loss <= BOUND
    assert apart[worst] <= BOUND, worst


def figures(known: Exported) -> dict[str, float]:
    """Of DPO at beta 0.1: loss, and what is measured beside it, summed over pairs."""
    rule, batch = rule_of(CASES["dpo"], known)
    with torch.no_grad():
        sums = ByCoefficients(rule).terms(ours(known.policy), batch).sums
    return {name: one.item() for name, one in sums.items()}


@pytest.mark.parametrize("model", MODELS)
def test_the_frozen_pairs_decide_something(exported: dict[str, Exported], model: str) -> None:
    """Log-ratios are not 0, answers differ in length, and pairs lie on both sides of the hinge."""
    rule, batch = rule_of(CASES["hinge"], exported[model])
    assert isinstance(rule, Preference)
    places = Places.of(batch)
    with torch.no_grad():
        found = ours(exported[model].policy)
        output = found(batch.rows.tokens, positions=batch.rows.positions, documents=batch.rows.documents)
        logprobs, _ = token_logprobs(found, output.hidden[0, places.index], places.targets)
    sums = places.per_document(logprobs, batch.num_documents).view(-1, 2)
    ratio = sums - exported[model].known
    assert ratio.abs().min() > 1e-3
    beyond = ratio[:, 0] - ratio[:, 1] > 1
    assert beyond.any()
    assert not beyond.all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_trl_balances_by_itself_where_a_config_has_a_coefficient_and_not_in_deepseek_v3(
    witness: Witness, name: str
) -> None:
    """`router_aux_loss_coef` left out is the config's: Qwen3-MoE's class has 0.001, DeepSeek-V3's and Llama's none."""
    for model in MODELS:
        plain, found = (witness.found["models"][model][one] for one in (name, f"{name} by default"))
        assert not plain["balance"]
        added = found["loss"] - plain["loss"]
        if model == "qwen3_moe":
            assert (found["balance"], found["coefficient"]) == (True, 0.001)
            assert 0.003 < added < 0.01  # of three experts a token; with even loads it were 0.003
            continue
        assert (found["balance"], found["coefficient"], added) == (False, 0.0, 0.0)
        expected = witness.gradients(model, name)
        for key, gradient in witness.gradients(model, f"{name} by default").items():
            assert torch.equal(gradient, expected[key]), key


@pytest.mark.parametrize(
    ("model", "method", "words"),
    [
        ("llama", "dpo", "nothing"),
        ("qwen3_moe", "sft", "nothing"),
        ("qwen3_moe", "dpo", "nothing"),
        ("deepseek_v3", "dpo", "selection bias that stays as it is"),
        ("deepseek_v3", "sft", "selection bias by sign at 0.001 up to "),
    ],
)
def test_finemoe_adds_no_balance_loss_of_its_own_and_says_so(
    exported: dict[str, Exported], tmp_path: Path, model: str, method: str, words: str
) -> None:
    import_hf(exported[model].policy, tmp_path / "base", quiet=True)
    raw = adapting(tmp_path / "base", write_pairs(tmp_path / "pairs.jsonl"), {"kind": method})
    live = [note for note in build_method(resolve_run(raw, "recipe")).notes if note.startswith("added to the loss: ")]
    assert len(live) == 1
    found = live[0].removeprefix("added to the loss: ")
    assert found.startswith(words)
    assert "," not in found
    assert not set(BALANCE_TERMS) & set(figures(exported[model]))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_where_trls_definitions_are_others(exported: dict[str, Exported], witness: Witness, model: str) -> None:
    plain, known = witness.loss(model, "dpo"), exported[model]
    # Its sigmoid takes no notice of label_smoothing; ours is then conservative DPO.
    assert witness.loss(model, "dpo that is to be smoothed") == plain
    assert abs(answer(CASES["conservative dpo"], known)[0] - plain) > 10 * BOUND
    # Its cross-entropy beside DPO weighs every token of a batch alike; ours every answer.
    of = figures(known)
    by_token = plain - 0.7 * of["chosen_logprob"] / of["chosen_length"]
    assert witness.loss(model, "rpo in one batch") == pytest.approx(by_token, rel=BOUND)
    assert abs(witness.loss(model, "rpo") - by_token) > 10 * BOUND
    # Its IPO is of means; eq. 17 is of sums.
    published = Case("dpo", {}, {"loss": "ipo", "beta": 0.1})
    assert abs(answer(published, known)[0] / witness.loss(model, "ipo") - 1) > 10 * BOUND
