"""Fidelity, special tokens, beginnings and ends: what the files beside a tokenizer.json say, and what is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from finemoe.core.errors import DataError
from finemoe.text import (
    Tokenizer,
    TokenizerSettings,
    class_problem,
    exported_tokenizer_config,
    fidelity,
    require_faithful,
)

BOS, EOS, USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"
TURN_END = "<|im_end|>"


def deepseek(**changes: Any) -> tokenizers.Tokenizer:
    """Byte-level with DeepSeek's special tokens, which hold SentencePiece's mark for a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([BOS, EOS, TURN_END])
    inner.add_tokens([AddedToken(USER, special=False, normalized=False)])
    for name, value in changes.items():
        setattr(inner, name, value)
    return inner


def write(folder: Path, inner: tokenizers.Tokenizer, **files: Any) -> Path:
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def metaspace(byte_fallback: bool = True) -> tokenizers.Tokenizer:
    """SentencePiece-like, as Llama 2 and Mixtral are."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    inner = tokenizers.Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [("▁", "a")], byte_fallback=byte_fallback, unk_token="<unk>")
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


def test_a_faithful_tokenizer_has_no_problems_and_says_how_it_splits() -> None:
    found = fidelity(Tokenizer(deepseek(), "test"))
    assert found.problems == ()
    assert "digits stand alone" in found.notes
    assert "30 tokens for 10 Chinese characters" in found.notes
    assert "nothing is put before a text" in found.notes


def test_digits_in_groups_are_noted() -> None:
    trained = tokenizers.Tokenizer.from_str(deepseek().to_str())
    facts = json.loads(trained.to_str())
    facts["model"]["vocab"]["314"] = 300
    facts["model"]["vocab"]["31"] = 301
    facts["model"]["merges"] = [["3", "1"], ["31", "4"]]
    assert "up to 3 digits make one token" in fidelity(Tokenizer.parse(json.dumps(facts), "test")).notes


def test_vanishing_spaces_are_a_problem() -> None:
    broken = deepseek(pre_tokenizer=pre_tokenizers.Metaspace())  # what a wrong tokenizer_class makes of it
    found = fidelity(Tokenizer(broken, "test"))
    assert len(found.problems) > 3
    assert "does not give this text back" in found.problems[0]


def test_problems_are_counted_when_there_are_many() -> None:
    names = {f"token_{i}": f"absent {i}" for i in range(20)}
    found = fidelity(Tokenizer(deepseek(), "test", TokenizerSettings(names)))
    assert "token_0 is 'absent 0', which is not in the vocabulary" in found.problems
    assert len(found.problems) == 9
    assert found.problems[-1].startswith("and 12 more")


def test_special_tokens_are_text_unless_asked_for() -> None:
    tokenizer = Tokenizer(deepseek(), "test")
    text = f"{BOS}{USER}a{EOS}"
    assert tokenizer.encode_template(text) == [256, 259, tokenizer.encode("a")[0], 257]
    assert not {256, 257, 258} & set(tokenizer.encode(text))
    assert not {256, 257, 258} & set(tokenizer.encode_batch([text])[0])
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode_template(text)) == text


def test_what_lies_beside_decides_beginning_and_end(tmp_path: Path) -> None:
    plain = Tokenizer.load(write(tmp_path, deepseek()))
    assert (plain.bos_id, plain.adds_bos, plain.end_of_text_id) == (256, False, 257)
    assert plain.stop_ids == {257}
    config = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": BOS, "normalized": True},
        "eos_token": TURN_END,
    }
    write(tmp_path, deepseek(), tokenizer_config=config, generation_config={"eos_token_id": [258, 70000]})
    told = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (told.bos_id, told.adds_bos, told.end_of_text_id) == (256, True, 257)
    assert told.stop_ids == {257, 258, 70000}
    assert told.encode_prompt("a") == [256, *told.encode("a")]
    assert told.fingerprint() == plain.fingerprint()


def test_the_post_processor_counts_where_the_configuration_is_silent(tmp_path: Path) -> None:
    adding = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    assert Tokenizer.load(write(tmp_path, deepseek(post_processor=adding))).adds_bos
    assert not any("disagree" in note for note in fidelity(Tokenizer.load(tmp_path)).notes)
    write(tmp_path, deepseek(post_processor=adding), tokenizer_config={"add_bos_token": False})
    told = Tokenizer.load(tmp_path)
    assert not told.adds_bos
    assert any("disagree on what begins a text" in note for note in fidelity(told).notes)


def test_the_end_may_be_known_only_to_the_configuration(tmp_path: Path) -> None:
    facts = json.loads(deepseek().to_str())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] != EOS]
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="no end-of-text token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 258}))
    assert Tokenizer.load(tmp_path).end_of_text_id == 258


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token is 1, but must be true or false"),
        ("tokenizer_config.json", '{"bos_token": 7}', "bos_token is 7, but must be text"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x', but must be an id"),
    ],
)
def test_neighbours_with_a_wrong_value_are_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    write(tmp_path, deepseek())
    (tmp_path / name).write_bytes(content.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(DataError, match=says):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", "[1]", "must be a JSON object, not list"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", '{"a":' + "[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", "\ud800", "cannot be read"),
        ("tokenizer_config.json", " " * (17 << 20), "17 MiB is more than the 16 MiB allowed"),
        ("generation_config.json", "<!DOCTYPE html><html></html>", "an HTML page"),
        ("generation_config.json", "", "it is empty"),
        ("special_tokens_map.json", "{", "not JSON"),
        ("config.json", "", "it is empty"),
    ],
)
def test_neighbours_that_cannot_be_read_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: str, says: str
) -> None:
    plain = Tokenizer.load(write(tmp_path, deepseek()))
    (tmp_path / name).write_bytes(content.encode("utf-8", errors="surrogatepass"))
    told = Tokenizer.load(tmp_path)
    assert (told.adds_bos, told.stop_ids) == (plain.adds_bos, plain.stop_ids)
    assert str(tmp_path / name) in caplog.text
    assert says in caplog.text
    assert "left out: " in caplog.text


def test_a_tokenizer_that_cannot_be_read_is_refused_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("<html><body>404</body></html>")
    with pytest.raises(DataError, match="an HTML page"):
        Tokenizer.load(tmp_path)


def test_links_out_of_the_folder_are_refused_but_not_those_of_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", deepseek())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to("../elsewhere/tokenizer.json")
    with pytest.raises(DataError, match="link that leads out of its folder"):
        Tokenizer.load(tmp_path / "model")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (tmp_path / "elsewhere" / "tokenizer.json").rename(blobs / "ffff")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/ffff")
    assert Tokenizer.load(snapshot).end_of_text_id == 257


def test_sentencepiece_is_read_but_never_trained_on() -> None:
    tokenizer = Tokenizer(metaspace(), "test")
    assert (tokenizer.byte_level, tokenizer.adds_bos, tokenizer.bos_id, tokenizer.end_of_text_id) == (False, True, 1, 2)
    assert tokenizer.encode_prompt("a b") == [1, *tokenizer.encode("a b")]
    assert 2 not in tokenizer.encode("</s>")
    with pytest.raises(DataError, match="not byte-level, and only byte-level BPE gives every text back"):
        require_faithful(tokenizer)
    found = fidelity(tokenizer)
    assert found.problems == ()
    assert any("not byte-level" in note for note in found.notes)


def test_without_byte_fallback_characters_are_lost() -> None:
    assert any("does not give this text back" in text for text in fidelity(Tokenizer(metaspace(False), "x")).problems)


@given(st.text("ab ▁é床\n", max_size=12))
def test_sentencepiece_decodes_as_the_library_and_streams_as_it_decodes(text: str) -> None:
    tokenizer = Tokenizer(metaspace(), "test")
    ids = tokenizer.encode(text)
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json()).decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == library
    for continues in (False, True):
        stream = tokenizer.decoder(continues)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, continues)


def test_a_continuation_keeps_the_space_it_begins_with() -> None:
    tokenizer = Tokenizer(metaspace(), "test")
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert tokenizer.decode(tokenizer.encode("a"), continues=True) == " a"


def test_unknown_families_are_refused() -> None:
    inner = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    with pytest.raises(DataError, match="decoder is 'WordPiece', but only byte-level"):
        Tokenizer(inner, "test")


@pytest.mark.parametrize("token_id", [2**31, 2**32 - 1, -1])
def test_ids_beyond_measure_are_refused_before_the_library_makes_a_table(token_id: int) -> None:
    facts = json.loads(deepseek().to_str())
    facts["model"]["vocab"]["!"] = token_id
    with pytest.raises(DataError, match=f"the id {token_id} is outside"):
        Tokenizer.parse(json.dumps(facts), "test")


CONTENT = metaspace().to_str()


@given(st.integers(0, len(CONTENT)), st.integers(0, 40), st.text('{}[]":,0a▁', max_size=8))
def test_a_damaged_file_is_refused_or_read(start: int, length: int, instead: str) -> None:
    damaged = CONTENT[:start] + instead + CONTENT[start + length :]
    try:
        tokenizer = Tokenizer.parse(damaged, "damaged")
    except DataError:
        return
    fidelity(tokenizer)


def test_a_contradiction_that_shows_only_at_work_is_refused() -> None:
    facts = json.loads(metaspace().to_str())
    facts["post_processor"]["special_tokens"] = {}
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.parse(json.dumps(facts), "test")


def test_an_exported_configuration_names_the_class_that_reads_the_file_as_it_is() -> None:
    published = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "legacy": True}
    exported = exported_tokenizer_config(published)
    assert exported == {**published, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert published["tokenizer_class"] == "LlamaTokenizerFast"
    assert exported_tokenizer_config(exported) == exported
    assert exported_tokenizer_config({})["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "LlamaTokenizerFast" in str(class_problem(published))
    assert class_problem(exported) is None


def test_transformers_reads_what_is_exported_as_we_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = exported_tokenizer_config(
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": BOS, "eos_token": EOS}
    )
    adding = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    write(tmp_path, deepseek(post_processor=adding), tokenizer_config=config, config={"model_type": "llama"})
    witness = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = Tokenizer.load(tmp_path)
    for text in ("def f(x):\n    return  x", "床前 12345", " a  b "):
        assert witness.encode(text) == ours.encode_prompt(text)
        assert witness.decode(ours.encode(text)) == text
    assert witness.encode(f"{BOS}{USER}a", add_special_tokens=False) == ours.encode_template(f"{BOS}{USER}a")
