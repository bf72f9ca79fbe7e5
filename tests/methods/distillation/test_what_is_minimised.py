"""The objective against loops that go conversation by conversation, and answer by answer."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.core.seeds import derive
from finemoe.data.batch import PackedBatch, TokenBatch
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Request
from finemoe.methods.distillation import method as method_file
from finemoe.methods.distillation.method import DistillConfig, build
from finemoe.methods.distillation.objective import Distil
from finemoe.methods.distillation.own_answers import OwnAnswers, Prompts
from finemoe.methods.distillation.recorded import Recorded, best_of
from finemoe.methods.distillation.teacher import Beside, Reading
from finemoe.model.transformer import Transformer
from finemoe.runs.config import resolve_run
from finemoe.training.method import Method
from methods.distillation.tiny_pairs import distilling, of_documents
from oracles.models import build as built
from oracles.models import small_config


def method_of(raw: dict[str, Any]) -> Method[Any]:
    config = resolve_run(raw, "the test")
    assert isinstance(config.method, DistillConfig)
    return build(config.method, config.setting)


def packed(*lengths: int) -> PackedBatch:
    """Conversations one behind the other, the last third of each learnt."""
    columns: dict[str, list[Tensor]] = {"tokens": [], "targets": [], "weights": [], "positions": [], "documents": []}
    for number, length in enumerate(lengths):
        ids = torch.randint(23, (length + 1,))
        columns["tokens"].append(ids[:-1])
        columns["targets"].append(ids[1:])
        columns["weights"].append((torch.arange(length) >= 2 * length // 3).float())
        columns["positions"].append(torch.arange(length))
        columns["documents"].append(torch.full((length,), number))
    rows = TokenBatch(**{name: torch.cat(pieces)[None] for name, pieces in columns.items()})
    return PackedBatch(rows, len(lengths), len(lengths), torch.arange(len(lengths)))


def logprobs(model: Transformer, ids: Tensor, temperature: float = 1.0) -> Tensor:
    return (model.logits(model(ids[None]).hidden)[0].double() / temperature).log_softmax(-1)


def test_it_is_the_mean_over_the_assistants_tokens_of_every_conversation_alone() -> None:
    student, teacher = built(small_config(init_std=0.3)), built(small_config(hidden_size=24, num_layers=3), 7).eval()
    batch = packed(9, 6, 12)
    objective = Distil(Beside(teacher, 23), 23, "forward", 2.0, 0.3, isolate=True)
    terms, counts = objective.terms(student, batch), objective.counts(batch)
    rows, total, cross_entropy, learnt = batch.rows, 0.0, 0.0, 0
    for number in range(3):
        mine = rows.documents[0] == number
        ids, targets, kept = rows.tokens[0, mine], rows.targets[0, mine], rows.weights[0, mine] > 0
        q, p = logprobs(student, ids, 2.0)[kept], logprobs(teacher, ids, 2.0)[kept]
        total += (p.exp() * (p - q)).sum().item()
        cross_entropy -= logprobs(student, ids)[kept, targets[kept]].sum().item()
        learnt += int(kept.sum())
    assert counts["divergence"] == counts["cross_entropy"] == learnt
    assert terms.sums["divergence"].item() == pytest.approx(total, rel=1e-4)
    assert terms.sums["cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-4)
    assert counts["sequence"] == 3
    assert objective.weights(0.5) == {"divergence": 4.0, "agreement": 0.0, "cross_entropy": 0.3}


def test_only_the_student_learns() -> None:
    student, teacher = built(small_config()), built(small_config(), 7).eval()
    objective = Distil(Beside(teacher, 23), 23, "forward", 1.0, 0.0, isolate=True)
    objective.terms(student, packed(9, 6)).sums["divergence"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.head_weight.grad is not None


# ---- on policy ------------------------------------------------------------------------------------------------------

ON = {"policy": "on", "answer_tokens": 10}


@pytest.fixture
def asked(models: dict[str, Path]) -> tuple[Method[Any], Transformer, OwnAnswers]:
    """A method that has the student answer, the student, and who answers."""
    from finemoe.checkpoint.open import load_model

    made = method_of(distilling(models, method=ON))
    objective: Any = made.objective
    return made, load_model(models["student"]).train(), objective.answers


def test_answers_are_those_of_the_engine_and_count_alike(asked: tuple[Method[Any], Transformer, OwnAnswers]) -> None:
    method, model, answers = asked
    batch: Prompts = method.data.batch(3, 4)
    rows = answers(model, batch).rows
    assert model.training
    for number, (prompt, stream) in enumerate(zip(batch.prompts, batch.streams, strict=True)):
        model.eval()
        engine = Engine(model, stop_ids=method.data.tokenizer.stop_ids, vocab_size=method.data.tokenizer.vocab_size)
        sampling = SamplingConfig(seed=derive(0, "own answers"), max_new_tokens=10)
        engine.submit(Request(prompt, sampling, repetition=stream))
        (done,) = [event.sequence for event in engine.events() if event.finish_reason is not None]
        mine = rows.documents[0] == number
        assert [*prompt, *done.completion] == [*rows.tokens[0, mine].tolist(), int(rows.targets[0, mine][-1])]
        weights = rows.weights[0, mine]
        assert weights.sum() == pytest.approx(1)
        assert (weights > 0).tolist() == [n >= len(prompt) - 1 for n in range(len(weights))]
        assert rows.positions[0, mine].tolist() == list(range(int(mine.sum())))


def test_on_policy_it_is_the_mean_of_each_answers_mean(
    models: dict[str, Path], asked: tuple[Method[Any], Transformer, OwnAnswers]
) -> None:
    method, model, answers = asked
    objective: Any = method.objective
    batch = method.data.batch(0, 3)
    terms = objective.terms(model, batch)
    rows, total = answers(model, batch).rows, 0.0
    for number in range(3):
        mine = rows.documents[0] == number
        ids, kept = rows.tokens[0, mine], rows.weights[0, mine] > 0
        q, p = logprobs(model, ids)[kept], logprobs(objective.teacher.model, ids)[kept]
        total += (q.exp() * (q - p)).sum(-1).mean().item()
    assert terms.sums["divergence"].item() == pytest.approx(total, rel=1e-4)
    assert objective.counts(batch)["divergence"] == 3


def test_what_is_drawn_follows_from_weights_and_position(asked: tuple[Method[Any], Transformer, OwnAnswers]) -> None:
    method, model, answers = asked
    per_epoch = method.data.sequences_per_epoch
    first, again = method.data.batch(2, 2), method.data.batch(2, 2)
    assert first == again
    torch.manual_seed(1)
    drawn = answers(model, first).rows.targets
    torch.manual_seed(2)
    assert torch.equal(answers(model, again).rows.targets, drawn)
    assert torch.equal(answers(model, method.data.batch(3, 1)).rows.targets[0], drawn[0, -len(drawn[0]) :][
        answers(model, first).rows.documents[0] == 1
    ])  # fmt: skip
    epochs = [method.data.batch(start, per_epoch) for start in (0, per_epoch)]
    assert sorted(epochs[0].prompts) == sorted(epochs[1].prompts)
    assert not set(epochs[0].streams) & set(epochs[1].streams)  # the next epoch's answers are others
    with torch.no_grad():
        model.head_weight.mul_(-1)
    assert not torch.equal(answers(model, first).rows.targets, drawn)


def test_prompts_held_out_have_streams_of_their_own(asked: tuple[Method[Any], Transformer, OwnAnswers]) -> None:
    method, *_ = asked
    measure: Any = method.measure
    streams = [stream for batch in measure.data.held_out() for stream in batch.streams]
    assert len(set(streams)) == len(streams) > 3
    assert max(streams) < 0


# ---- the teacher on disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["isolate", "concatenate"])
@pytest.mark.parametrize("source", [distilling, of_documents], ids=["conversations", "documents"])
def test_what_is_on_disk_is_what_the_teacher_says(models: dict[str, Path], source: Any, packing: str) -> None:
    raw = source(models, method={"top_k": 5, "temperature": 1.5}, data={"packing": packing})
    method, beside = method_of(raw), method_of({**raw, "method": {**raw["method"], "top_k": None}})
    kept: Any = method.objective
    teacher: Any = beside.objective
    count = method.data.sequences_per_epoch
    batches = [method.data.batch(start, 3) for start in range(0, 2 * count, 3)]  # two epochs, in two orders
    measure: Any = method.measure
    for batch in [*batches, *measure.data.held_out()]:
        reading = Reading.of(batch, packing == "isolate")
        found = kept.teacher(reading, reading.places)
        asked = best_of(teacher.teacher.model, reading, 5, 1.5, 300)
        assert len(found.ids) == len(reading.places) > 0
        assert torch.equal(found.ids, asked.ids)
        torch.testing.assert_close(found.logprobs, asked.logprobs, rtol=1e-5, atol=1e-5)


def test_a_teacher_on_disk_is_not_in_memory(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Transformer]] = []
    asking = method_file.open_teacher

    def watched(*arguments: Any) -> Any:
        found = asking(*arguments)
        opened.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(method_file, "open_teacher", watched)
    for top_k in (6, 6, None):  # asked, found in the cache, beside
        method = method_of(distilling(models, method={"top_k": top_k}))
        gc.collect()
        assert (opened[-1]() is None) == (top_k is not None)
        del method


def test_the_teacher_is_asked_once(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    raw = distilling(models, method={"top_k": 3})
    first: Any = method_of(raw).objective
    monkeypatch.setattr("finemoe.methods.distillation.recorded.best_of", None)
    again: Any = method_of(raw).objective
    assert (again.teacher.logprobs == first.teacher.logprobs).all()
    with pytest.raises(TypeError, match="not callable"):
        method_of(distilling(models, method={"top_k": 3, "temperature": 2.0}))


def test_what_was_damaged_is_asked_again(models: dict[str, Path]) -> None:
    raw = distilling(models, method={"top_k": 2})
    before: Any = method_of(raw).objective
    folder = Path(before.teacher.logprobs.filename).parent
    wanted = (folder / "logprobs.npy").read_bytes()
    (folder / "logprobs.npy").write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    after: Any = method_of(raw).objective
    assert isinstance(after.teacher, Recorded)
    assert (folder / "logprobs.npy").read_bytes() == wanted
