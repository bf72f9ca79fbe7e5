"""The corpus that every interpreter has: its domains, and that they are what they are called."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import unicodedata
from datetime import date

import pytest

from finemoe.core.config import parse
from finemoe.data import DataConfig
from finemoe.data.corpora import SplitDocument, read_corpus
from finemoe.data.documents.document import SkipReport
from finemoe.data.interpreter_corpus import InterpreterCorpus

SMALL = 60_000


@pytest.fixture(scope="module")
def documents() -> list[SplitDocument]:
    config = parse(DataConfig, {"corpus": {"kind": "interpreter", "max_bytes": SMALL}}, "test")
    return list(read_corpus(config.corpus, 0.05, SkipReport()))


def texts(documents: list[SplitDocument], domain: str) -> list[str]:
    return [item.document.text for item in documents if item.document.domain == domain]


def test_five_domains_of_the_size_asked_for_on_both_sides_of_the_split(documents: list[SplitDocument]) -> None:
    names = [item.document.name for item in documents]
    domains = ["code", "english", "arithmetic", "characters", "calendar"]
    assert list(dict.fromkeys(item.document.domain for item in documents)) == domains
    assert len(set(names)) == len(names)
    for domain in domains:
        most = SMALL if domain in ("code", "english") else SMALL // 2
        assert 0.4 * most < sum(len(text.encode()) for text in texts(documents, domain)) <= most
    held_out = {item.document.domain for item in documents if item.side == "validation"}
    assert {"arithmetic", "characters", "calendar"} & held_out


def test_code_has_neither_comments_nor_docstrings(documents: list[SplitDocument]) -> None:
    for text in texts(documents, "code"):
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        assert tokenize.COMMENT not in kinds
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]
        assert not any(ast.get_docstring(node) for node in nodes)


def test_english_is_whole_sentences(documents: list[SplitDocument]) -> None:
    paragraphs = [p for text in texts(documents, "english") for p in text.strip().split("\n\n")]
    assert len(paragraphs) > 50
    assert all(p[-1] in ".:!?" and len(p.split()) >= 8 and ">>>" not in p for p in paragraphs)


def test_sums_names_and_dates_are_right(documents: list[SplitDocument]) -> None:
    lines = [line for text in texts(documents, "arithmetic") for line in text.splitlines()]
    for line in lines[:200]:
        left, right = line.split(" = ")
        assert eval(left.replace("/", "//")) == int(right), line  # made of digits and one sign
    for line in "".join(texts(documents, "characters")).splitlines()[:200]:
        code, name = line.removeprefix("U+").split(" ", 1)
        assert unicodedata.name(chr(int(code, 16))) == name
    said = re.findall(r"(\d+-\d+-\d+) is (\w+),", "".join(texts(documents, "calendar")))
    assert len(said) > 100
    assert all(f"{date.fromisoformat(day):%A}" == name for day, name in said)


def test_another_process_reads_the_same() -> None:
    program = (
        "from finemoe.data.scan import Scan; from finemoe.data.interpreter_corpus import InterpreterCorpus as C\n"
        "scan = Scan()\n"
        f"for _ in scan.read(C(max_bytes={SMALL}), 0.05): pass\n"
        "print(scan.digest())"
    )
    found = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
             for _ in range(2)}  # fmt: skip
    assert len(found) == 1
    assert len(found.pop()) == 65


def test_a_corpus_smaller_than_a_document_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        InterpreterCorpus(max_bytes=10)
