"""Tokenizer and chat template of a checkpoint: whether they are faithful, and fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.checkpoint.doctor.findings import Findings
from finemoe.checkpoint.doctor.subject import Subject
from finemoe.checkpoint.huggingface.importing import companion_of
from finemoe.checkpoint.kinds import CONFIG
from finemoe.checkpoint.open import load_chat_template, load_tokenizer
from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.core.errors import CheckpointError, FinemoeError
from finemoe.text import Tokenizer, class_problem, fidelity
from finemoe.text.files import COMPANIONS

_TOKENIZER, _TOKENIZER_CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_MESSAGES = ({"role": "user", "content": "Hello"},)
_SENTENCEPIECE = "tokenizer.model"


def check_text(subject: Subject, found: Findings) -> dict[str, Any]:
    """Tokenizer and template; None for what is not there."""
    tokenizer = _tokenizer(subject, found)
    facts = None if tokenizer is None else _facts(tokenizer, subject, found)
    if subject.home.is_dir():
        with found.guard("tokenizer"):
            _check_class(subject.home, tokenizer, found)
    return {"tokenizer": facts, "template": _template(subject, tokenizer, found)}


def _has(home: Path, *names: str) -> bool:
    return any((home / name).exists() or (home / name).is_symlink() for name in names)


def _check_links(home: Path) -> None:
    """Refuse links that lead out, or nowhere, before anybody follows them.

    Raises:
        CheckpointError: names the first.
    """
    for name in (*COMPANIONS, CONFIG):
        if (home / name).is_symlink():
            folder_file(home, name)


def _tokenizer(subject: Subject, found: Findings) -> Tokenizer | None:
    home = subject.home
    if home.is_dir() and not _has(home, _TOKENIZER):
        if subject.kind == "tensors":
            return None
        only = f"only {_SENTENCEPIECE}, which is not read" if _has(home, _SENTENCEPIECE) else f"no {_TOKENIZER}"
        found.warning("tokenizer", f"{only}: the model runs on token ids alone; get {_TOKENIZER} from its source")
        return None
    if subject.kind == "gguf":  # the weights open, and are imported, without it
        try:
            return load_tokenizer(home)
        except FinemoeError as error:
            found.warning("tokenizer", f"{error}; the model runs on token ids alone")
            return None
    with found.guard("tokenizer"):
        _check_links(home)
        _check_readable(home, found)
        return load_tokenizer(home)
    return None


def _check_readable(home: Path, found: Findings) -> None:
    """Warn of each file beside tokenizer.json that is left out wherever it is met."""
    for name in COMPANIONS:
        if name != _TOKENIZER and _has(home, name):
            try:
                companion_of(home, name)
            except CheckpointError as error:
                found.warning("tokenizer", f"{error}; left out: {COMPANIONS[name]}")


def _facts(tokenizer: Tokenizer, subject: Subject, found: Findings) -> dict[str, Any]:
    checked = fidelity(tokenizer)
    for text in checked.problems:
        # Only a byte-level tokenizer promises to give every text back.
        (found.problem if tokenizer.byte_level else found.warning)("tokenizer", text)
    rows = subject.config.vocab_size if subject.config is not None else None
    if rows is not None and tokenizer.vocab_size > rows:
        found.problem(
            "tokenizer",
            f"it has {tokenizer.vocab_size:,} ids, and the model {rows:,} rows: ids from {rows:,} on have no "
            "embedding; it belongs to another model, or the embedding was not resized",
        )
    beyond = sorted(i for i in tokenizer.stop_ids if rows is not None and i >= rows)
    if beyond:
        found.warning("tokenizer", f"generation stops at id {beyond[0]:,}, which the model cannot say")
    _check_ends(tokenizer, subject.raw, found)
    return {
        "ids": tokenizer.vocab_size,
        "rows": rows,
        "byte_level": tokenizer.byte_level,
        "faithful": not checked.problems,
        "end_of_text_id": tokenizer.end_of_text_id,
        "bos_id": tokenizer.bos_id,
        "adds_bos": tokenizer.adds_bos,
        "stop_ids": sorted(tokenizer.stop_ids),
        "notes": list(checked.notes),
    }


def _check_ends(tokenizer: Tokenizer, raw: Mapping[str, Any], found: Findings) -> None:
    """Whether config.json and tokenizer_config.json mean the same token by the beginning and the end of a text."""
    for key in ("bos_token", "eos_token"):
        name = tokenizer.settings.special_tokens.get(key)
        said, known = raw.get(f"{key}_id"), tokenizer.id_of(name)
        ids = said if isinstance(said, list) else [said]
        if known is not None and all(isinstance(one, int) for one in ids) and known not in ids:
            found.note("tokenizer", f"{key} is {name!r} ({known}), and config.json says {said}")


def _check_class(home: Path, tokenizer: Tokenizer | None, found: Findings) -> None:
    """What others will do with tokenizer.json."""
    if tokenizer is None or not _has(home, _TOKENIZER_CONFIG):
        return
    config = read_json(folder_file(home, _TOKENIZER_CONFIG))
    trap = class_problem(config)
    if trap is not None and tokenizer.byte_level and "Llama" in str(config.get("tokenizer_class")):
        found.warning("tokenizer", f"{trap}. finemoe does so too, and names that class when it exports")
    if config.get("auto_map"):
        found.note("tokenizer", f"{_TOKENIZER_CONFIG} names Python code (`auto_map`), which is never run")


def _template(subject: Subject, tokenizer: Tokenizer | None, found: Findings) -> dict[str, Any] | None:
    home = subject.home
    if home.is_dir() and not _has(home, _TOKENIZER_CONFIG, _TEMPLATE):
        return None
    if subject.kind == "gguf":  # as an import, which leaves it out
        try:
            return _rendered(home, tokenizer)
        except FinemoeError as error:
            found.warning("template", str(error))
            return None
    with found.guard("template"):
        _check_links(home)
        return _rendered(home, tokenizer)
    return None


def _rendered(home: Path, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    template = load_chat_template(home)
    if template is None:
        return None
    text = template.render(_MESSAGES, add_generation_prompt=True)
    ids = [] if tokenizer is None else tokenizer.encode_template(text)
    return {"names": sorted(template.sources), "rendered": text, "tokens": len(ids) if tokenizer else None}
