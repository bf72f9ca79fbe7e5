"""Our models behind the harness's interface: with a stand-in for its package, and with the package where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import MadeUp, opened

from finemoe.core.errors import ConfigError, RunError
from finemoe.evaluation import harness
from finemoe.evaluation.harness import generation_request, harness_model
from finemoe.evaluation.runner import Settings, ask
from finemoe.evaluation.task import Generate, LogLikelihood, Rolling
from finemoe.generation.scoring import continuation_windows, rolling_windows


class StandIn:
    """What `lm_eval.api.model.LM` gives its children, as far as ours uses it."""

    def __init__(self) -> None:
        self.remembered: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *parts: self.remembered.append(parts))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    package, api, module = ModuleType("lm_eval"), ModuleType("lm_eval.api"), ModuleType("lm_eval.api.model")
    module.LM = StandIn  # type: ignore[attr-defined]
    for name, made in (("lm_eval", package), ("lm_eval.api", api), ("lm_eval.api.model", module)):
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(harness, "open_language_model", lambda path, dtype: opened(reach=32))
    return harness_model("anywhere", batch=3)


def instances(*arguments: Sequence[Any]) -> list[Any]:
    return [SimpleNamespace(args=tuple(own)) for own in arguments]


def by_runner(*requests: Any) -> list[Any]:
    """The same requests through `ask`."""
    from finemoe.evaluation.runner import Answers
    from finemoe.evaluation.task import Item, Judged

    class Task(MadeUp):
        def items(self, source, shots, limit):
            return [Item(str(i), (request,)) for i, request in enumerate(requests)], 0

        def judge(self, item, answers):
            return Judged({"accuracy": 1.0})

    kept = Answers()
    ask(opened(reach=32), Task(), None, Settings(), kept, quiet=True)
    from finemoe.evaluation.runner import request_key

    return [kept.known[request_key("", request, 0)] for request in requests]


def test_each_method_answers_in_the_order_of_its_requests(model: Any) -> None:
    pairs = [("the cat", " sat"), ("", "dog"), ("the cat sat on the mat and the", " dog sat"), ("the cat", " sat")]
    expected = by_runner(*(LogLikelihood(*pair) for pair in pairs))
    assert model.loglikelihood(instances(*pairs)) == [(answer.logprob, answer.greedy) for answer in expected]
    texts = ["the cat sat on the mat. " * 9, "", "the dog"]
    assert model.loglikelihood_rolling(instances(*((text,) for text in texts))) == [
        answer.logprob for answer in by_runner(*(Rolling(text) for text in texts))
    ]
    options = {"until": ["."], "max_gen_toks": 5}
    asked = [("the cat", options), ("the dog sat on", {**options, "max_gen_toks": 7})]
    written = model.generate_until(instances(*asked))
    expected = by_runner(Generate("the cat", (".",), 5), Generate("the dog sat on", (".",), 7))
    assert written == [answer.texts[0] for answer in expected]
    assert len(model.remembered) == len(pairs) + len(texts) + len(asked)
    assert model.remembered[0] == ("loglikelihood", pairs[0], (pytest.approx(model.remembered[0][2][0]), False))


def test_kept_answers_are_read_and_added_to(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = harness_model("anywhere", answers=path)
    value = first.loglikelihood(instances(("the cat", " sat")))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    record = json.loads(lines[0])
    record["answer"]["logprob"] = -7.0
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    again = harness_model("anywhere", answers=path)
    found = again.loglikelihood(instances(("the cat", " sat"), ("the cat", " dog")))
    assert found[0] == (-7.0, value[0][1])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    for made in (first, again):
        made.answerer.close()


def test_the_harness_says_how_to_get_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(ConfigError, match=r"finemoe\[eval\]"):
            harness_model("anywhere")
        with pytest.raises(SystemExit, match=r"error: .*finemoe\[eval\]"):  # from the shell: no traceback
            harness.main()


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, 16),
        ({"batch_size": 1}, 16),
        ({"batch_size": "8"}, 8),
        ({"batch": 4, "batch_size": 1}, 4),
        ({"batch": 1}, 1),
    ],
)
def test_the_harnesss_default_of_one_row_does_not_undo_ours(model: Any, given: dict[str, Any], rows: int) -> None:
    assert type(model)(path="anywhere", **given).answerer._settings.batch == rows


@pytest.mark.parametrize("content", ["a letter", '{"key": 1}\n', '{"other": 1}\n', "[1]\n", '{"key": "k"}\nno json\n'])
def test_a_file_that_holds_no_answers_is_refused_and_left_as_it_is(model: Any, content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"mine.txt: damaged: it is no file of kept answers"):
        harness_model("anywhere", answers=path)
    assert path.read_text(encoding="utf-8") == content


def test_options_of_a_generation() -> None:
    made = generation_request("a", {"until": "x", "max_gen_toks": 9, "do_sample": False, "temperature": 0.7})
    assert made == Generate("a", ("x",), 9)
    assert generation_request("a", {"until": ["x", ""], "do_sample": True, "temperature": 0.5}).temperature == 0.5
    assert generation_request("a", {}) == Generate("a", (), 256)
    with pytest.raises(ConfigError, match="num_beams"):
        generation_request("a", {"num_beams": 3})
    with pytest.raises(ConfigError, match="top_p"):
        generation_request("a", {"top_p": 0.9, "temperature": 0.5})
    assert generation_request("a", {"top_p": 0.95, "top_k": 50, "temperature": 0.0}).temperature == 0.0  # greedy


@pytest.mark.slow
def test_windows_and_borders_are_the_harnesss_own() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in range(1, 40):
        for reach in range(1, 14):
            theirs = map(make_disjoint_window, get_rolling_token_windows(list(range(100, 100 + length)), 1, reach, 1))
            ours = list(rolling_windows(range(100, 100 + length), 1, reach))
            theirs = [([*given, *wanted], len(wanted)) for given, wanted in theirs]
            assert [(list(window.tokens), window.num_targets) for window in ours] == theirs
    model = opened(reach=500)
    split = SimpleNamespace(backend="causal", tok_encode=lambda text: model.tokenizer.encode(text))
    for context, continuation in (
        ("the cat", " sat"),
        ("the cat  ", "sat"),
        ("a\n", "b"),
        ("q", "!"),
    ):
        before, after = TemplateLM._encode_pair(split, context, continuation)
        window = continuation_windows(model, context, continuation).windows[0]
        assert list(window.tokens) == [*before, *after]
        assert window.num_targets == len(after)
    # Where a token straddles the border, the harness reads the context's own tokens: "the c" + " on the mat".
    # Ours reads the text as it stands, and asks for the same targets.
    before, after = TemplateLM._encode_pair(split, "the c", "at on the mat")
    window = continuation_windows(model, "the c", "at on the mat").windows[0]
    assert list(window.tokens) == model.tokenizer.encode("the cat on the mat") != [*before, *after]
    assert list(window.tokens[-window.num_targets :]) == after


@pytest.mark.slow
def test_the_harness_itself_gives_our_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a set of our own, so that nothing is fetched; scores to the last bit, as the requests are the same."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from finemoe.evaluation.tasks import find_task

    torch.set_num_threads(1)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(harness, "open_language_model", lambda path, dtype: opened(reach=64))
    data = tmp_path / "hellaswag.jsonl"
    words = ("the cat sat on", "the dog and the", "on the mat", "the log. the cat")
    rows = [
        {"query": w, "choices": ["the mat.", "a log of the dog", "cat", "sat"], "gold": i} for i, w in enumerate(words)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: "{{gold}}"\ndoc_to_choice: choices\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
        encoding="utf-8",
    )
    manager = TaskManager(include_path=str(tmp_path))
    theirs = lm_eval.simple_evaluate(harness_model("x"), tasks=["own"], task_manager=manager, bootstrap_iters=0)
    made = ask(opened(reach=64), find_task("hellaswag"), data, Settings(), quiet=True)
    for metric, name in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
        ours = sum(judged.scores[metric] for judged in made.judged) / len(made.judged)
        assert theirs["results"]["own"][f"{name},none"] == pytest.approx(ours)
