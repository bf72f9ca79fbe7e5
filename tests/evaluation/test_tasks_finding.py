"""Which files are read: by the set's name and split, never on a guess; and worked examples that fall short."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finemoe.core.errors import ConfigError, DataError
from finemoe.evaluation.task import Generate, Item
from finemoe.evaluation.tasks import TASKS

GSM8K = [
    {"question": f"What is {n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(12)
]
SCIENCE = {"query": "Question: What melts?", "choices": ["ash", "ice"], "gold": 1}


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prompt(item: Item) -> str:
    (request,) = item.requests
    assert isinstance(request, Generate)
    return request.prompt


def test_a_folder_of_many_sets(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k/test.jsonl", GSM8K[:2])
    write(tmp_path / "gsm8k/train.jsonl", GSM8K[4:])
    write(tmp_path / "gsm8k/other_solutions.jsonl", GSM8K)
    write(tmp_path / "science/arc_easy.jsonl", [SCIENCE])
    write(tmp_path / "science/arc_challenge.jsonl", [SCIENCE, SCIENCE])
    write(tmp_path / ".hidden/gsm8k_test.jsonl", GSM8K)
    (tmp_path / "README.jsonl").write_text("about arc_easy", encoding="utf-8")
    items, skipped = TASKS["gsm8k"].items(tmp_path, 3, None)
    assert ([item.id for item in items], skipped) == (["gsm8k/test.jsonl:1", "gsm8k/test.jsonl:2"], 0)
    assert [f"{n} + 1?" in prompt(items[0]) for n in (4, 5, 6, 7)] == [True, True, True, False]
    assert "Answer: It is 5.\n#### 5\n\n" in prompt(items[0])  # without the calculator's marks
    assert len(TASKS["arc_easy"].items(tmp_path, None, None)[0]) == 1
    assert len(TASKS["arc_challenge"].items(tmp_path, None, None)[0]) == 2
    with pytest.raises(
        DataError, match=r"no file whose name is this set's .*arc_challenge.jsonl.*name the file itself"
    ):
        TASKS["openbookqa"].items(tmp_path, None, None)  # other sets of the same form lie there


def test_nameless_files_are_taken_at_the_top_only(tmp_path: Path) -> None:
    write(tmp_path / "here/test-00000-of-00001.jsonl", GSM8K[:1])
    write(tmp_path / "here/train.jsonl", GSM8K[1:])
    assert len(TASKS["gsm8k"].items(tmp_path / "here", 0, None)[0]) == 1
    with pytest.raises(DataError, match="no file whose name"):
        TASKS["gsm8k"].items(tmp_path, 0, None)
    (tmp_path / "here/test-00000-of-00001.jsonl").unlink()
    with pytest.raises(DataError, match="no file of the split test"):
        TASKS["gsm8k"].items(tmp_path / "here", 0, None)


def test_what_is_not_there_or_of_no_known_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; read are GSM8K's JSON Lines"):
        TASKS["gsm8k"].items(tmp_path / "none", None, None)
    (tmp_path / "gsm8k.pdf").write_bytes(b"")
    with pytest.raises(DataError, match=r"a \.pdf file; read are .* \(suffixes \.jsonl"):
        TASKS["gsm8k"].items(tmp_path / "gsm8k.pdf", None, None)
    with pytest.raises(DataError, match=r"finds no question there; 1 records were skipped .*no text in field answer"):
        TASKS["gsm8k"].items(write(tmp_path / "gsm8k.jsonl", [{"question": "?", "solution": ""}]), None, None)
    with pytest.raises(DataError, match="finds no question there; 0 records"):
        TASKS["gsm8k"].items(write(tmp_path / "gsm8k.jsonl", []), None, None)
    for shots, limit in ((-1, None), (0, 0)):
        with pytest.raises(ConfigError, match="0 or more shots, a limit of 1 or more"):
            TASKS["gsm8k"].items(write(tmp_path / "gsm8k.jsonl", GSM8K), shots, limit)


def test_examples_from_beside_from_the_package_or_fewer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = write(tmp_path / "gsm8k_test.jsonl", GSM8K[:2])
    items, _ = TASKS["gsm8k"].items(test, None, None)
    assert (items[0].facts["shots"], "baker" in prompt(items[0])) == (8, True)  # the package's own
    write(tmp_path / "gsm8k_train.jsonl", GSM8K[1:])
    items, _ = TASKS["gsm8k"].items(test, 5, None)
    assert ["baker" in prompt(item) for item in items] == [False, False]
    assert [prompt(item).count("1 + 1?") for item in items] == [1, 1]  # the asked one is no example of its own
    assert [item.facts["shots"] for item in items] == [5, 5]
    monkeypatch.setattr(logging.getLogger("finemoe"), "propagate", True)
    with caplog.at_level(logging.WARNING, "finemoe"):
        items, _ = TASKS["gsm8k"].items(test, 50, None)
    assert items[0].facts["shots"] == 11
    assert "gsm8k: 10 of 50 worked examples" in caplog.text


def test_every_pinned_selection_is_read_whole(tmp_path: Path) -> None:
    counts = {}
    for name, task in TASKS.items():
        reader = getattr(task, "reader", None)
        if reader is not None and reader.pinned:
            found = reader._examples(tmp_path / "nothing.jsonl", 20)
            assert len({question.worked for question in found}) == len(found)
            counts[name] = len(found) - task.shots
    assert counts == dict.fromkeys(counts, 0)
    assert set(counts) == {
        "race_middle",
        "race_high",
        "cluewsc",
        "triviaqa",
        "natural_questions",
        "drop",
        "gsm8k",
        "math",
    }


def test_a_limit_takes_the_first_and_ids_are_unique(tmp_path: Path) -> None:
    rows = [{**SCIENCE, "id": "same"}, {**SCIENCE, "id": "same"}, {**SCIENCE, "id": "else"}]
    path = write(tmp_path / "arc_easy.jsonl", rows)
    assert [item.id for item in TASKS["arc_easy"].items(path, None, None)[0]] == ["same", "same#2", "else"]
    assert [item.id for item in TASKS["arc_easy"].items(path, None, 2)[0]] == ["same", "same#2"]


def test_a_limit_is_spread_evenly_over_the_groups(tmp_path: Path) -> None:
    exam = {"question": "Who?", "choices": list("wxyz"), "answer": "A"}
    counts = {"algebra": 6, "law": 1, "art": 4}
    rows = [
        {**exam, "subject": name, "question": f"{name} {n}?"} for name, count in counts.items() for n in range(count)
    ]
    path = write(tmp_path / "mmlu_test.jsonl", rows)
    taken = {n: [item.id for item in TASKS["mmlu"].items(path, 0, n)[0]] for n in range(1, 13)}
    places = {n: [int(id.split(":")[1]) for id in ids] for n, ids in taken.items()}
    assert places[3] == [1, 7, 8]  # the first of each
    assert places[7] == [1, 2, 3, 7, 8, 9, 10]  # law has no more than one
    assert places[12] == list(range(1, 12))
    for n in range(1, 12):
        assert set(taken[n]) <= set(taken[n + 1])
        assert len(taken[n]) == n


def test_an_id_does_not_depend_on_the_limit(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}?", "answer": "1", "unique_id": "u", "type": kind} for n, kind in enumerate("aab")]
    path = write(tmp_path / "math_test.jsonl", rows)
    assert [item.id for item in TASKS["math"].items(path, 0, None)[0]] == ["u", "u#2", "u#3"]
    assert [item.id for item in TASKS["math"].items(path, 0, 2)[0]] == ["u", "u#3"]


def test_without_a_source_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        letters = {letter: letter.lower() for letter in "ABCD"}
        return [{"id": n, "question": f"{config} {split} {n}?", **letters, "answer": "B"} for n in range(2)]

    hub = SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda name: ["law", "art"])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    items, skipped = TASKS["ceval"].items(None, 1, None)
    assert ([item.id for item in items], skipped) == (["law/0", "law/1", "art/0", "art/1"], 0)
    assert [item.group for item in items] == ["law", "law", "art", "art"]
    assert set(asked) == {("ceval/ceval-exam", c, s) for c in ("law", "art") for s in ("val", "dev")}
    assert {item.facts["shots"] for item in items} == {1}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'finemoe\[hf\]'"):
        TASKS["ceval"].items(None, 0, None)
