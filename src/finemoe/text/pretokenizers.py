"""How models split a text before byte-level BPE, under the names that GGUF files give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from finemoe.core.config import did_you_mean
from finemoe.core.errors import DataError


@dataclass(frozen=True)
class Splitting:
    """Regular expressions applied one after the other; each match of each is a piece of its own."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """A piece that is a token as a whole is taken without merging (`ignore_merges`)."""
    composed: str | None = None
    """Its name where the published tokenizer.json composes characters first (NFC), which GGUF's readers leave out."""
    begins: bool = False
    """A text begins with the beginning token where the file does not say."""


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# DeepSeek LLM lists the letters it keeps together: those with a lower and an upper case, by code point.
_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
_MARKS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_EAST_ASIAN = "4E00-9FA5 800-4E00 AC00-D7FF"
_JAPANESE = "4E00-9FA5 3040-309F 30A0-30FF"


def _chars(ranges: str) -> str:
    """The inside of a character class from hexadecimal code points."""
    return " ".join("-".join(chr(int(end, 16)) for end in entry.split("-")) for entry in ranges.split()).replace(
        " ", ""
    )


SPLITTINGS: dict[str, Splitting] = {
    "gpt-2": Splitting((_GPT2,), composed="olmo"),
    "smollm": Splitting((r"\p{N}", _GPT2)),
    "deepseek-llm": Splitting(
        (
            r"[\r\n]",
            rf"\s?[{_chars(_LETTERS)}]+",
            rf"\s?[{_chars(_MARKS)}]+",
            r"\s+$",
            f"[{_chars(_EAST_ASIAN)}]+",
            r"\p{N}",
        )
    ),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_chars(_EAST_ASIAN)}]+", r"\p{N}")),
    "deepseek-v3": Splitting((r"\p{N}{1,3}", f"[{_chars(_JAPANESE)}]+", _V3)),
    "llama-bpe": Splitting((_WORDS.format(digits=r"\p{N}{1,3}"),), whole_words=True, begins=True),
    "qwen2": Splitting((_WORDS.format(digits=r"\p{N}"),), composed="qwen2"),
    "default": Splitting((r"[\p{P}\$\+<=>\^\~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""By the value of `tokenizer.ggml.pre`."""

_ALIASES = {
    "gpt2": "gpt-2",
    "olmo": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}


# The GPT-4 pattern with digits one by one (numbers stay comparable) and marks kept with their letters. Runs of blanks
# stay whole up to the last one, so that an indentation can become a single token.
_FINEMOE = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
TRAINED: dict[str, Splitting] = {
    # As llama.cpp spells it: `(?i:'s)` also takes a long s, which llama.cpp does not.
    "qwen2": Splitting((_WORDS.format(digits=r"\p{N}").replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _CONTRACTIONS),)),
    "finemoe": Splitting((_FINEMOE,)),
}
"""What a tokenizer can be trained with: Qwen's splitting, which every program knows, or that of finemoe 0.1."""


def splitting_of(pre: str) -> Splitting:
    """The splitting called `pre`.

    Raises:
        DataError: an unknown name.
    """
    found = SPLITTINGS.get(_ALIASES.get(pre, pre))
    if found is None:
        raise DataError(
            f"the pre-tokenizer {pre!r} is not known here{did_you_mean(pre, list(SPLITTINGS))}: "
            "convert the model from its Hugging Face folder instead"
        )
    return found


def build(splitting: Splitting) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that splits so, and then writes bytes as characters."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def name_of(pre_tokenizer: Mapping[str, Any] | None, whole_words: bool, composes: bool) -> str:
    """The name under which GGUF files know the `pre_tokenizer` of a tokenizer.json.

    Raises:
        DataError: none of the known splittings is this one.
    """
    patterns = tuple(_patterns(pre_tokenizer))
    for name, known in SPLITTINGS.items():
        wanted = known.composed if composes else name
        if (known.patterns, known.whole_words) == (patterns, whole_words) and wanted is not None:
            return wanted
    composing = "composes characters and " if composes else ""
    raise DataError(
        f"the tokenizer {composing}splits text in a way that GGUF has no name for (it knows {', '.join(SPLITTINGS)})"
    )


def _patterns(step: Mapping[str, Any] | None) -> Iterator[str]:
    """Each step of a pre-tokenizer as the regular expression it amounts to."""
    kind = None if step is None else step.get("type")
    if step is not None and kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _patterns(inner)
    elif step is not None and kind == "Digits":
        yield r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    elif step is not None and kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"]
        yield _spelt(pattern["Regex"]) if "Regex" in pattern else f"exactly {pattern['String']!r}"
    elif step is not None and kind == "ByteLevel" and not step["add_prefix_space"]:
        if step.get("use_regex", True):
            yield _GPT2
    else:
        yield f"the step {kind}"


def _spelt(pattern: str) -> str:
    """One spelling for patterns that are published in two."""
    spelt = pattern.replace("\r", r"\r").replace("\n", r"\n")
    return spelt.replace(_CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
