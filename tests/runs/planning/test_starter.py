"""`finemoe.new_recipe`: a recipe for anybody's files, which trains as it stands and says why."""

from __future__ import annotations

import csv
import gzip
import json
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import finemoe
from finemoe.core.errors import ConfigError, DataError
from finemoe.data.survey import Survey
from finemoe.runs.planning import starter
from finemoe.runs.planning.check import Check
from finemoe.runs.planning.starter import CANDIDATES, _length, _Plan, describe, new_recipe
from runs.tiny_runs import write_corpus


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred documents of thirty words, as text and as records with a field of their own name."""
    folder = write_corpus(tmp_path_factory.mktemp("texts") / "mine", documents=200, words=30)
    documents = [path.read_text() for path in sorted((folder / "train").iterdir())]
    rows = [{"id": number, "title": "x", "body of it": text} for number, text in enumerate(documents)]
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def measured(speed: float = 10_000.0) -> Check:
    """A check that took no time."""
    return Check("x", (), 1, 1, 1, 1, tokens_per_second=speed, memory_bytes=400 << 20)


def _word(number: int) -> str:
    return "".join(chr(ord("a") + number * factor % 23) for factor in (1, 5, 11, 17))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured."""
    monkeypatch.setattr(_Plan, "measured", lambda self, preset, quiet: measured())


def test_it_trains_as_it_stands(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "cache"))
    made = new_recipe("rows.jsonl.gz", quiet=True)
    made.save(tmp_path / "mine.toml")
    found = finemoe.check(tmp_path / "mine.toml", quiet=True, steps=2)
    assert found.refused == ()
    assert found.documents == 200
    run = finemoe.train(
        tmp_path / "mine.toml",
        out=tmp_path / "run",
        overrides=["training.tokens=512", "training.threads=1"],
        quiet=True,
    )
    assert run.summary["final_validation_loss"] > 0
    assert made.tables["data"]["corpus"]["text_field"] == "body of it"
    assert made.tables["name"] == "rows"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name", ["rows.csv", "semicolons.csv.gz", "rows.json", "rows.txt.gz", "rows.parquet", "rows.arrow"]
)
def test_the_field_of_any_kind_of_records_is_found(texts: Path, tmp_path: Path, name: str) -> None:
    documents = [path.read_text() for path in sorted((texts / "train").iterdir())]
    rows = [{"id": str(number), "body": text} for number, text in enumerate(documents)]
    path = tmp_path / name
    if name == "rows.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "body"], *(row.values() for row in rows)])
    elif name == "semicolons.csv.gz":
        path.write_bytes(
            gzip.compress("".join(f"{a};{b}" for a, b in [("id", "body\n"), *(r.values() for r in rows)]).encode())
        )
    elif name == "rows.arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif name == "rows.json":
        path.write_text(json.dumps(rows))
    elif name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    made = new_recipe(path, quiet=True)
    assert made.tables["data"]["corpus"]["text_field"] == "body"
    assert made.survey.documents == len(rows)


@pytest.mark.usefixtures("quick")
def test_fields_and_files_that_are_left_out_are_told(texts: Path, tmp_path: Path) -> None:
    documents = [path.read_text() for path in sorted((texts / "train").iterdir())]
    rows = [{"id": 1, "asked": text[:80], "replied": text, "tag": "x"} for text in documents]
    (tmp_path / "mail.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "NOTICE.txt").write_text("About the mail.")
    made = new_recipe(tmp_path, quiet=True)
    assert made.tables["data"]["corpus"]["text_field"] == "replied"
    said, found = 'template = "{asked}\\n{replied}"', made.text
    assert f"To train on asked as well, write\n# {said}\n# in place of this line.\ntext_field" in found
    assert "# Left out, as no text of the corpus: NOTICE.txt (about the data).\n" in found
    joined = tomllib.loads(found.replace('text_field = "replied"', said))["data"]["corpus"]
    assert finemoe.check({**made.tables, "data": {**made.tables["data"], "corpus": joined}}, quiet=True).refused == ()


@pytest.mark.usefixtures("quick")
def test_one_document_is_enough(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one.txt").write_text("".join(path.read_text() for path in sorted((texts / "train").iterdir())))
    made = new_recipe(tmp_path / "one.txt", quiet=True)
    found = finemoe.check({**made.tables, "name": "x"}, quiet=True, steps=1)
    assert (found.refused, found.documents) == ((), 1)  # one, though its tail is held out


@pytest.mark.usefixtures("quick")
def test_every_choice_has_its_reason_above_it(texts: Path) -> None:
    made = new_recipe(str(texts / "train"), quiet=True)
    lines = made.text.splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
    assert len(made.choices) >= 12
    assert all(choice.reason.endswith(".") for choice in made.choices)
    assert max(map(len, lines)) <= 100 + len(str(texts))
    assert tomllib.loads(made.text) == made.tables
    assert describe(made)["files"]["documents"] == 200
    assert json.loads(json.dumps(describe(made)))["choices"][0]["key"] == "name"


@pytest.mark.usefixtures("quick")
def test_nothing_is_overwritten(texts: Path, tmp_path: Path) -> None:
    made = new_recipe(texts / "train", quiet=True)
    (tmp_path / "there.toml").write_text("mine")
    with pytest.raises(ConfigError, match="stays as it is"):
        made.save(tmp_path / "there.toml")
    assert (tmp_path / "there.toml").read_text() == "mine"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ['quo"te.txt', "back\\slash.txt", "ümläut 文.txt", "tab\there.txt"])
def test_any_name_of_a_file_can_be_written(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("some words of a language that goes on, " * 200)
    made = new_recipe(name, quiet=True)
    assert made.tables["data"]["corpus"]["paths"] == [name]
    assert made.tables["name"]


@pytest.mark.usefixtures("quick")
def test_a_larger_text_gets_a_larger_vocabulary_and_longer_sequences(tmp_path: Path) -> None:
    found = []
    for words in (800, 100_000):
        file = tmp_path / f"{words}.txt"
        file.write_text(" ".join(_word(number % 997) for number in range(words)))
        found.append(new_recipe(file, quiet=True).tables)
    small, large = found
    assert small["model"]["vocab_size"] < large["model"]["vocab_size"]
    assert small["data"]["sequence_length"] < large["data"]["sequence_length"]
    assert small["training"]["tokens_per_step"] <= large["training"]["tokens_per_step"]
    assert small["training"]["tokens"] < large["training"]["tokens"]


@pytest.mark.parametrize(
    ("documents", "said"), [(1, "the document is longer (1.00M tokens)"), (9, "half of them above")]
)
def test_what_is_cut_is_told_by_how_many_there_are(documents: int, said: str) -> None:
    found = Survey(("x",), {}, 1, documents, 3_000_000, 3_000_000, 3_000_000, None, ())
    assert said in _length(found, 1_000_000, 3.0)[1]


def plan(tokens: int) -> _Plan:
    return _Plan(None, 4096, 256, tokens)  # type: ignore[arg-type]


def test_the_model_is_as_large_as_text_and_machine_are_enough_for() -> None:
    chosen = {
        (tokens, speed): plan(tokens).preset(measured(speed))[0]
        for tokens in (10**5, 10**7, 10**9)
        for speed in (1e3, 1e5, 1e8)
    }
    assert chosen[10**5, 1e8] == CANDIDATES[0]  # the machine could, the text is too little
    assert chosen[10**9, 1e3] == CANDIDATES[0]  # the other way round
    assert chosen[10**9, 1e8] == CANDIDATES[-1]
    assert chosen[10**7, 1e5] == CANDIDATES[1]
    why = plan(10**5).preset(measured())[1]
    assert "readings of this text are 400K" in why
    assert "would take" in plan(10**9).preset(measured(1e3))[1]


def choices(tokens: int, speed: float, **more: Any) -> dict[str, Any]:
    return {one.key: one.value for one in plan(tokens).training_choices(measured(speed))}


def test_the_budget_is_four_readings_or_half_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices(10**6, 1e5)["training.tokens"] == pytest.approx(4e6, rel=0.01)
    assert choices(10**9, 1e4)["training.tokens"] == pytest.approx(1.8e7, rel=0.01)
    few = choices(10**4, 1e5)
    assert few["training.tokens"] == 200 * few["training.tokens_per_step"]
    for found in (choices(10**6, 1e5), choices(10**9, 1e4), few):
        assert found["training.tokens_per_step"] % 256 == 0
        assert found["training.tokens"] % found["training.tokens_per_step"] == 0


def test_little_memory_makes_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices(10**9, 1e4)["training.micro_batch_tokens"] == choices(10**9, 1e4)["training.tokens_per_step"]
    monkeypatch.setattr(starter.memory, "available_bytes", lambda: 256 << 20)
    small = choices(10**9, 1e4)
    assert 256 <= small["training.micro_batch_tokens"] < small["training.tokens_per_step"]
    assert small["training.tokens_per_step"] % small["training.micro_batch_tokens"] == 0
    monkeypatch.setattr(starter.memory, "available_bytes", lambda: 0)  # none is not "nobody knows"
    assert choices(10**9, 1e4)["training.micro_batch_tokens"] <= 256


def test_threads_are_those_that_a_control_group_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "usable_cores", lambda: (3, "a control group allows 3 of the machine's 64"))
    assert choices(10**6, 1e5)["training.threads"] == 3
    monkeypatch.setattr(starter, "usable_cores", lambda: (2, "all 2 of the machine"))
    assert choices(10**6, 1e5)["training.threads"] == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no file is there"), ("", "nothing here can be read as text"), ("short", "5 bytes of text are too little")],
)
def test_what_cannot_be_learned_from_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=says):
        new_recipe(tmp_path / "a.txt", quiet=True)
    with pytest.raises(DataError, match="no file was given"):
        new_recipe([], quiet=True)


@pytest.mark.usefixtures("quick")
def test_copies_and_what_cannot_be_read_are_told_and_the_recipe_trains(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mixed"
    folder.mkdir()
    documents = [path.read_text() for path in sorted((texts / "train").iterdir())]
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents[:60]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents[50:90]))
    (folder / "c.jsonl").write_text("".join(json.dumps({"note": text}) + "\n" for text in documents[90:100]))
    made = new_recipe(folder, quiet=True)
    assert (made.survey.documents, made.survey.duplicates, made.survey.skipped) == (90, 10, 10)
    assert "# Left out as they have the text of another, documents: 10." in made.text
    assert made.tables["data"]["max_skipped_share"] == 0.1
    assert "c.jsonl:1: no field `body`" in made.text.replace("\n# ", " ")
    found = finemoe.check({**made.tables, "name": "x"}, quiet=True, steps=1)
    assert (found.refused, found.documents) == ((), 90)
