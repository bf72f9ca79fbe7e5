"""What users of other programs complain of in fine-tuning and preferences, by number: each is a test here.

The numbers are those of docs/testing.md, "Complaints", which names the tests of 11 to 15 one by one. They lie with the
method in tests/methods/grpo: 11 who writes finds other probabilities than who learns (test_grpo_routes.py,
test_grpo_complaints.py, test_grpo_options.py); 12 other experts (test_grpo_routes.py, test_grpo_watch.py); 13 answers
that are tokenised again (test_grpo_complaints.py, test_grpo_runs.py); 14 nothing to learn, in silence
(test_grpo_watch.py, test_grpo_advantages.py); 15 rewards that failed (test_grpo_advantages.py, test_grpo_runs.py), and
a preference for length, which is here.
"""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from finemoe.checkpoint.language_model import open_language_model
from finemoe.checkpoint.open import load_chat_template, load_tokenizer
from finemoe.core.errors import DataError
from finemoe.data.batch import PackedBatch
from finemoe.model.logprobs import token_logprobs
from finemoe.model.moe.balance import max_violation
from finemoe.model.transformer import Transformer
from finemoe.runs.config import resolve_run
from finemoe.runs.run import train
from finemoe.runs.start import build_method
from finemoe.text import ChatTemplate, Tokenizer
from finemoe.text.control import encode_chat
from finemoe.text.settings import TokenizerSettings
from finemoe.text.turns import encode_turns
from finemoe.training.losses.coefficients import Places
from finemoe.training.trainer import Trainer
from methods.tiny_talks import adapting, begin, write_pairs
from oracles.packed import alone
from runs.tiny_runs import corpus, records, steps

__all__ = ["corpus"]

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ASKED = [{"role": "user", "content": "one?"}]
TALK = [*ASKED, {"role": "assistant", "content": "two."}, *ASKED, {"role": "assistant", "content": "three."}]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complaints")
    write_pairs(folder / "pairs.jsonl")
    return begin(corpus, folder, "v3")


def tables(base: Path, method: str, **changes: Any) -> dict[str, Any]:
    return adapting(base, base.parent / "pairs.jsonl", {"kind": method}, **changes)


def batch_of(base: Path, method: str, count: int = 4) -> PackedBatch:
    batch: PackedBatch = build_method(resolve_run(tables(base, method), "recipe")).data.batch(0, count)
    return batch


def talking() -> tuple[Tokenizer, ChatTemplate]:
    """A tokenizer with turns and a beginning, and the template of many models."""
    inner = Library.from_str(Tokenizer.train(["one two three user assistant ?. " * 40], vocab_size=300).to_json())
    inner.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>", "<s>")]
    )
    settings = TokenizerSettings(stop_ids=(inner.token_to_id("<|im_end|>"),), special_tokens={"bos_token": "<s>"})
    return Tokenizer(inner, "test", settings), ChatTemplate.of(CHATML, {"bos_token": "<s>"})


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_1_balancing_is_never_off_in_silence(base: Path, tmp_path: Path, method: str) -> None:
    run = train(tables(base, method, training={"steps": 1}), out=tmp_path / "run", quiet=True).directory
    assert steps(run)[0]["terms"]["sequence"] > 0
    notes = "\n".join(build_method(resolve_run(tables(base, method), "recipe")).notes)
    assert "sequence 0.01" in notes
    assert ("selection bias by sign at 0.001" if method == "sft" else "selection bias that stays as it is") in notes


def test_2_no_padded_token_reaches_a_router(base: Path) -> None:
    model, batch = open_language_model(base).model, batch_of(base, "sft")
    rows = batch.rows
    whole = model(rows.tokens, documents=rows.documents, positions=rows.positions, by_document=True).routing
    parts = [model(one.rows.tokens).routing for one in alone(batch)]
    for layer, record in whole.items():
        load = torch.stack([part[layer].load for part in parts]).sum(0)
        assert torch.equal(record.load, load)
        assert max_violation(record.load) == max_violation(load)
        assert record.load.sum() == 3 * batch.num_tokens  # three experts a token, and no token more


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_3_packed_conversations_do_not_leak(base: Path, method: str) -> None:
    model, batch = open_language_model(base).model, batch_of(base, method)
    rows, places = batch.rows, Places.of(batch)
    output = model(rows.tokens, documents=rows.documents, positions=rows.positions, by_document=True)
    packed, _ = token_logprobs(model, output.hidden[0, places.index], places.targets)
    each = []
    for one in alone(batch):
        here = Places.of(one)
        each.append(token_logprobs(model, model(one.rows.tokens).hidden[0, here.index], here.targets)[0])
        assert one.rows.positions[0, 0] == 0
    torch.testing.assert_close(packed, torch.cat(each), rtol=0, atol=1e-5)
    ends = torch.cat([rows.documents[0].diff().nonzero()[:, 0], torch.tensor([rows.tokens.shape[1] - 1])])
    assert set(rows.targets[0, ends].tolist()) == {load_tokenizer(base).end_of_text_id}  # none foretells the next


def test_4_a_mask_of_zeros_is_never_accepted() -> None:
    tokenizer, template = talking()
    forgets = CHATML.replace("m.content +", "(m.content if loop.last else '') +")
    with pytest.raises(DataError, match="writes message 2 otherwise"):
        encode_turns(ChatTemplate.of(forgets, {"bos_token": "<s>"}), tokenizer, TALK)
    assert sum(encode_turns(template, tokenizer, TALK).trained) > 4


def test_5_the_last_token_that_is_learnt_is_one_that_stops(base: Path) -> None:
    tokenizer, template = talking()
    own = load_tokenizer(base)
    for read, write in ((tokenizer, template), (own, ChatTemplate.plain(own.end_of_text))):
        turns = encode_turns(write, read, TALK)
        assert len(turns.spans()) == 2
        assert all(turns.ids[end - 1] in read.stop_ids for _, end in turns.spans())


def test_5_what_was_tuned_ends_by_itself(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ends"
    folder.mkdir()
    base = begin(corpus, folder, "dense")
    write_pairs(folder / "pairs.jsonl", count=240)
    raw = adapting(base, folder / "pairs.jsonl", {"kind": "sft", "samples": 40, "sample_tokens": 40},
                   training={"steps": 240, "evaluate_every": 240, "checkpoint_every": 240})  # fmt: skip
    run = train(raw, out=folder / "run", quiet=True).directory
    last = [record for record in records(run) if record["kind"] == "validation"][-1]
    assert len(last["samples"]) == 40
    assert sum(sample["ended"] for sample in last["samples"]) >= 0.99 * 40


def test_6_one_beginning_and_the_same_ids_everywhere() -> None:
    tokenizer, template = talking()
    turns = encode_turns(template, tokenizer, TALK)
    begins = tokenizer.id_of("<s>")
    assert turns.ids.count(begins) == 1
    assert turns.ids[0] == begins
    assert list(turns.ids) == tokenizer.encode_template(template.render(TALK))
    asked = encode_chat(template, tokenizer, TALK[:-1])[1]
    assert list(turns.ids[: len(asked)]) == asked


def test_7_what_asks_is_never_learnt() -> None:
    tokenizer, template = talking()
    for messages in (TALK, [{**TALK[1], "train": False} if n == 1 else one for n, one in enumerate(TALK)]):
        turns = encode_turns(template, tokenizer, messages)
        learnt = [tokenizer.decode(list(turns.ids[a:b])) for a, b in turns.spans()]
        assert learnt == ["two.<|im_end|>", "three.<|im_end|>"][-len(learnt) :]
        asked = encode_chat(template, tokenizer, TALK[:1])[1]
        assert not any(turns.trained[: len(asked)])
    assert len(learnt) == 1


def test_8_a_pair_is_whole_or_left_out(base: Path, tmp_path: Path) -> None:
    raw = tables(base, "dpo", data={"sequence_length": 38}, training={"tokens_per_step": 4 * 38})
    data = build_method(resolve_run(raw, "recipe")).data
    dropped = data.report["too_long"]["train"]
    assert dropped["cut"] == 0 < dropped["dropped"]
    assert data.sequences_per_epoch == data.report["items"]["train"] - dropped["dropped"]
    batch = data.batch(0, 4)
    for pair in range(4):
        better, worse = (batch.rows.documents[0] == 2 * pair + n for n in (0, 1))
        first = [int(batch.rows.weights[0, here].nonzero()[0]) for here in (better, worse)]
        prompts = [batch.rows.tokens[0, here][: upto + 1] for here, upto in zip((better, worse), first, strict=True)]
        assert torch.equal(*prompts)


@pytest.mark.parametrize("own", [{"kind": "sft"}, {"kind": "sft", "loss": "conversation"}, {"kind": "dpo"},
                                 {"kind": "reward"}], ids=str)  # fmt: skip
def test_9_the_step_is_the_same_however_it_is_cut(base: Path, tmp_path: Path, own: dict[str, Any]) -> None:
    found = []
    for rows in (4, 2, 1):
        raw = adapting(base, base.parent / "pairs.jsonl", own,
                       training={"steps": 1, "micro_batch_tokens": rows * 48})  # fmt: skip
        run = train(raw, out=tmp_path / str(rows), quiet=True).directory
        found.append(steps(run)[0])
    for other in found[1:]:
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
        assert other["gradient_norm"] == pytest.approx(found[0]["gradient_norm"], rel=1e-5)
        assert other["load"] == found[0]["load"]


def test_10_the_reference_is_numbers_and_no_second_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    original = Trainer.step

    def stepping(trainer: Trainer, *arguments: Any) -> Any:
        gc.collect()
        models.append(sum(type(one) is Transformer for one in gc.get_objects()))
        return original(trainer, *arguments)

    gc.collect()
    before = sum(type(one) is Transformer for one in gc.get_objects())
    monkeypatch.setattr(Trainer, "step", stepping)
    run = train(tables(base, "dpo", training={"steps": 2}), out=tmp_path / "run", quiet=True).directory
    assert models == [before + 1] * 2
    assert steps(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps(run)[0]["terms"]["accuracy"] <= 1


def test_15_a_preference_says_whether_it_has_learnt_length(base: Path, tmp_path: Path) -> None:
    """Complaint 15 of post-training."""
    run = train(tables(base, "dpo", training={"steps": 2}), out=tmp_path / "run", quiet=True).directory
    last = [record for record in records(run) if record["kind"] == "validation"][-1]
    lines = [json.loads(line) for line in (base.parent / "pairs.jsonl").read_text().splitlines()]
    assert last["validation_longer_wins"] == 1.0  # as the better answers of these pairs are the longer ones
    assert all(len(one["chosen"]) >= len(one["rejected"]) for one in lines)
    assert last["validation_chosen_length"] > last["validation_rejected_length"]
    assert last["validation_chosen_logprob"] < 0
    assert last["validation_rejected_logprob"] < 0
    assert load_chat_template(run) is not None
