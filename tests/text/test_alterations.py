"""What a tokenizer changes of the texts at hand: counted, and told apart into harmless and lost."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from finemoe.core.errors import DataError
from finemoe.data import DataConfig, FilesCorpus, PreparedData, prepare
from finemoe.text import Alterations, Tokenizer, alterations, fidelity

EOS = "<|endoftext|>"
NFC = "Café Zürich naïve"
NFD = unicodedata.normalize("NFD", NFC)


def byte_level(normalizer: normalizers.Normalizer | None = None, prefix: bool = False) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens([EOS])
    return inner


def sentencepiece() -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    model = models.BPE({n: i for i, n in enumerate(names)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


def prepared(tmp_path: Path, inner: tokenizers.Tokenizer, texts: list[str], **more: object) -> PreparedData:
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    inner.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "texts").mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:03}.txt").write_text(text)
    fields = {"tokenizer": str(tmp_path / "tokenizer"), "sequence_length": 8, "cache_dir": str(tmp_path / "cache")}
    corpus = FilesCorpus(paths=(str(tmp_path / "texts"),))
    return prepare(
        DataConfig.model_validate({"corpus": corpus.model_dump(), "validation_share": 0.3, **fields, **more})
    )


@pytest.mark.parametrize(
    ("inner", "text", "harmless", "lost"),
    [
        (byte_level(), NFD, None, 0),
        (byte_level(normalizers.NFC()), NFC, None, 0),
        (byte_level(normalizers.NFC()), NFD, True, 0),
        (byte_level(normalizers.NFKC()), "½ ﬁ", False, 0),
        (byte_level(prefix=True), "a text", True, 0),
        (byte_level(normalizers.Lowercase()), "Aa Bb", False, 2),
        (byte_level(normalizers.Replace(" ", "")), "a b c", False, 2),
        (sentencepiece(), "a b é", None, 0),
    ],
)
def test_what_is_changed(inner: tokenizers.Tokenizer, text: str, harmless: bool | None, lost: int) -> None:
    found = alterations(Tokenizer(inner, "test"), [text, "same"])
    assert found.documents == 2
    assert found.lost == lost
    assert found.harmless == (found.changed if harmless else 0)
    assert (found.sentence() is None) is (harmless is None)
    assert Alterations.from_json(found.as_json()) == found


def test_a_normalising_family_trains_and_the_count_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"{NFC} {i} " * 5 for i in range(20)]
    plain = prepared(tmp_path, byte_level(normalizers.NFC()), texts)
    assert "does not give" not in caplog.text
    assert plain.report["altered_by_tokenizer"]["changed"] == 0
    for i in range(0, 20, 2):
        texts[i] = unicodedata.normalize("NFD", texts[i])
    data = prepared(tmp_path, byte_level(normalizers.NFC()), texts)
    assert "does not give 10 of 20 documents back as they were" in caplog.text
    assert "all of them but for composed characters (NFC)" in caplog.text
    assert data.report["altered_by_tokenizer"]["changed"] == 10


def test_bytes_are_those_of_the_text_as_it_was_written(tmp_path: Path) -> None:
    data = prepared(tmp_path, byte_level(normalizers.NFC()), [f"{NFD} {i} " * 5 for i in range(20)], sequence_length=1)
    tokens = data.validation.sources[0].tokens
    # Every token but the first is predicted, and an end of text stands for no byte.
    share = data.report["bytes"]["validation"] / (len(tokens) - 1)
    assert data.validation_bytes_per_token == pytest.approx(share, rel=0.01)
    assert data.validation_bytes_per_token > 1.05


def test_a_tokenizer_that_loses_text_is_refused_with_a_way_out(tmp_path: Path) -> None:
    texts = [f"Some words with blanks, {i} " * 5 for i in range(20)]
    with pytest.raises(DataError, match=r"does not give 1\d of 1\d documents back.*are lost.*`data.max_altered_share`"):
        prepared(tmp_path, byte_level(normalizers.Replace(" ", "")), texts)
    data = prepared(tmp_path, byte_level(normalizers.Replace(" ", "")), texts, max_altered_share=0.5)
    assert data.report["altered_by_tokenizer"]["changed"] == 20
    rare = ["ab cd " * 300 + ("²" if i == 3 else "") for i in range(20)]
    for i, text in enumerate(rare):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(f"{i} {text}")
    assert prepared(tmp_path, byte_level(normalizers.NFKC()), []).report["altered_by_tokenizer"]["changed"] == 1


def test_sentencepiece_trains_where_it_loses_nothing(tmp_path: Path) -> None:
    data = prepared(tmp_path, sentencepiece(), [f"a b ab {i} " * 5 for i in range(20)])
    assert data.report["altered_by_tokenizer"]["changed"] == 0
    assert data.validation_bytes_per_token == pytest.approx(1, rel=0.3)


def test_an_end_of_text_in_the_middle_is_counted() -> None:
    tokenizer = Tokenizer(byte_level(), "test")
    found = Alterations()
    found.add(tokenizer, f"a{EOS}b", [*tokenizer.encode("a"), tokenizer.end_of_text_id, *tokenizer.encode("b")])
    assert (found.ended, found.changed) == (1, 0)
    assert "ends 1 documents in the middle" in str(found.sentence())
    with pytest.raises(DataError, match="are lost"):
        found.require(0.01)


def test_pieces_of_one_document_count_once() -> None:
    tokenizer = Tokenizer(byte_level(normalizers.NFC()), "test")
    found = Alterations()
    for piece, ends in (("same", False), (NFD, False), (NFD, True), ("same", True)):
        found.add(tokenizer, piece, tokenizer.encode(piece), ends)
    assert (found.documents, found.changed, found.harmless) == (2, 1, 1)


def test_the_doctor_calls_a_normal_form_a_note_and_vanishing_blanks_a_problem() -> None:
    composed = fidelity(Tokenizer(byte_level(normalizers.NFC()), "test"))
    assert composed.problems == ()
    assert any("composed (NFC)" in note for note in composed.notes)
    assert any("NFKC" in note for note in fidelity(Tokenizer(byte_level(normalizers.NFKC()), "test")).notes)
    assert fidelity(Tokenizer(byte_level(normalizers.Replace(" ", "")), "test")).problems
