"""Import and export: from the paths of a source and a place to what was written, with proof where it is asked for.

`finemoe import` and `finemoe export` print what these functions return.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finemoe.checkpoint.adapters.files import export_adapter
from finemoe.checkpoint.doctor.findings import few
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.gguf.opening import import_gguf
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import FAMILIES, representable_as
from finemoe.checkpoint.huggingface.hub import resolve
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.huggingface.layers import training_only
from finemoe.checkpoint.kinds import is_imported
from finemoe.checkpoint.open import read_model_config
from finemoe.checkpoint.proof.twin import verify_twin
from finemoe.checkpoint.proof.written import Comparison, compare_export, compare_import
from finemoe.checkpoint.storage.safetensors import DTYPE_NAMES, TensorFolder
from finemoe.checkpoint.storage.untrusted import read_json
from finemoe.checkpoint.through_import import passage
from finemoe.checkpoint.weights.imported import ImportReport, read_imported
from finemoe.core.config import did_you_mean
from finemoe.core.errors import CheckpointError, ConfigError, FinemoeError
from finemoe.core.logs import logger
from finemoe.model.config import ModelConfig
from finemoe.model.size import measure

Format = Literal["hf", "gguf"]
_DTYPES: Mapping[str, tuple[str | None, str]] = {
    "bf16": ("bf16", "BF16"),
    "f16": ("fp16", "F16"),
    "fp16": ("fp16", "F16"),
    "f32": ("fp32", "F32"),
    "fp32": ("fp32", "F32"),
    "q8_0": (None, "Q8_0"),
    "q4_0": (None, "Q4_0"),
}
"""As people write them -> as `export_hf` and `export_gguf` do; None where Hugging Face folders have none."""


def import_(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    verify: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Import a Hugging Face folder or a GGUF file; interrupted, the same call goes on where it was.

    Args:
        source: the folder, the .gguf file, or `org/name[@revision]` on the hub.
        out: folder to make.
        metadata: of a GGUF file: keys that it does not have and should, such as `{"expert_group_count": 8}`.
        verify: read everything again and compare it, and a random twin's logits with those of transformers.
        quiet: no progress on stderr.

    Returns:
        What `finemoe import --json` prints; `checks` says what was verified.

    Raises:
        ConfigError: `metadata` for a folder, which has a config.json.
        CheckpointError: it cannot be imported; nothing is left behind.
        RunError: the disk is full or unwritable.
    """
    path = resolve(os.fspath(source), quiet=quiet)
    _check_foreign(path)
    if metadata and not path.is_file():
        raise ConfigError(
            f"metadata {next(iter(metadata))}: is for GGUF files; what {path / 'config.json'} says can be edited"
        )
    if path.is_file():
        report = import_gguf(path, out, metadata=metadata, quiet=quiet)
    else:
        report = import_hf(path, out, quiet=quiet)
    checks = _verify_import(path, report, metadata, quiet) if verify else []
    return {**_facts(report, path), "checks": [check.to_dict() for check in checks]}


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format | None = None,
    family: str | None = None,
    dtype: str | None = None,
    fp8: bool = False,
    tokenizer: bool = True,
    adapter: bool = False,
    verify: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a model as a Hugging Face folder or a GGUF file; `source` is never changed.

    Args:
        source: run, checkpoint or imported folder; or a Hugging Face folder or GGUF file.
        out: folder to make; a name that ends in .gguf makes a GGUF file.
        format: what to write; as the name of `out` says when None.
        family: Hugging Face `model_type`; as imported, or the first that fits, when None.
        dtype: bf16, fp16 or fp32; GGUF also q8_0 and q4_0. As stored, and in GGUF f16, beside blocks fp32, when None.
        fp8: Hugging Face: matrices as block-scaled FP8, as in V3.
        tokenizer: GGUF: write it along.
        adapter: of a run that tuned low-rank adapters or chosen experts: write these alone, see `export_adapter`.
        verify: read everything again and compare it, and a random twin's logits with those of transformers.
        quiet: no progress on stderr.

    Returns:
        What `finemoe export --json` prints; `checks` says what was verified.

    Raises:
        ConfigError: an option that the format does not have.
        CheckpointError, DataError: what the format cannot hold; nothing was written.
        RunError: the disk is full or unwritable.
    """
    source, out = Path(source), Path(out)
    if adapter:
        _refuse_of_a_whole_model(format, dtype, fp8, tokenizer, verify)
        return export_adapter(source, out, family=family)
    form: Format = format or ("gguf" if out.suffix.lower() == ".gguf" else "hf")
    options = export_options(form, out, family, dtype, fp8, not tokenizer)
    with passage(source, out, {"format": form, **options}, quiet=quiet) as way:
        facts = {"source": str(source), "format": form, **_write(form, way.source, way.place, options, quiet)}
        facts["path"] = os.path.realpath(out)
        way.appear()
        checks = _verify_export(way.source, out, quiet) if verify else []
        checks = [replace(check, said=way.said(check.said)) for check in checks]
    return {**facts, "checks": [check.to_dict() for check in checks]}


def _refuse_of_a_whole_model(
    format: Format | None, dtype: str | None, fp8: bool, tokenizer: bool, verify: bool
) -> None:
    options = {"--format": format, "--dtype": dtype, "--fp8": fp8, "--no-tokenizer": not tokenizer, "--verify": verify}
    given = next((name for name, value in options.items() if value), None)
    if given is not None:
        raise ConfigError(f"{given} is of whole models, and --adapter writes what was tuned as it is: leave one out")


@dataclass(frozen=True)
class Check:
    """One thing that was verified."""

    name: str
    sound: bool | None
    """None: it could not be looked at; `said` tells why."""
    said: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"name": self.name, "sound": self.sound, "said": self.said}


def check_tensors(compare: Callable[[], Comparison], rounded: str = "") -> Check:
    """Every tensor of both sides, read again; what cannot be read is a failure. `rounded` ends the good message."""
    try:
        found = compare()
    except FinemoeError as error:
        return Check("tensors", False, str(error))
    if found.sound:
        return Check("tensors", True, f"all {found.tensors:,}, read again from the disk, are their originals{rounded}")
    said = f"{len(found.different):,} of {found.tensors:,} differ: {few(found.different)}"
    return Check("tensors", False, said)


def check_twin(config: ModelConfig, raw: Mapping[str, Any] | None, quiet: bool) -> Check:
    """A tiny random twin's logits, ours and transformers'.

    Args:
        config: of the model.
        raw: its Hugging Face config.json; None: of the first family that can represent the model.
        quiet: do not say that this takes a moment.
    """
    raw = raw or _as_family(config)
    if raw is None:
        return Check("twin", None, "no Hugging Face family has this model, so transformers cannot compute it")
    if not quiet:
        logger.info("comparing a tiny twin's logits with those of transformers")
    try:
        found = verify_twin(raw)
    except FinemoeError as error:
        return Check("twin", False, str(error))
    return Check("twin", {"verified": True, "differs": False}.get(found.status), found.reason)


def _as_family(config: ModelConfig) -> dict[str, Any] | None:
    names = [name for name, refused in representable_as(config).items() if refused is None]
    return FAMILIES[names[0]].from_config(config, max_positions=4096) if names else None


def size_of(config: ModelConfig) -> dict[str, int]:
    """Parameters: all, active, and those of prediction modules."""
    size = measure(config, config.max_positions or 4096)
    return {
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "mtp_parameters": size.mtp_parameters,
    }


def export_options(
    form: Format, out: Path, family: str | None, dtype: str | None, fp8: bool, no_tokenizer: bool
) -> dict[str, Any]:
    """What the writer of that format takes.

    Raises:
        ConfigError: an option that the format does not have.
    """
    if dtype is not None and dtype.lower() not in _DTYPES:
        raise ConfigError(f"--dtype {dtype}: no such type{did_you_mean(dtype.lower(), list(_DTYPES))}")
    hf, gguf = _DTYPES[dtype.lower()] if dtype is not None else (None, None)
    if form == "gguf":
        if out.suffix.lower() != ".gguf":
            raise ConfigError(f"--format gguf: the name must end in .gguf, as {out}.gguf does")
        given = "--family" if family is not None else "--fp8" if fp8 else None
        if given is not None:
            raise ConfigError(f"{given} is for Hugging Face folders; {out} becomes a GGUF file")
        return {"tokenizer": not no_tokenizer, **({} if gguf is None else {"dtype": gguf})}
    if no_tokenizer:
        raise ConfigError("--no-tokenizer is for GGUF files; give OUT a name that ends in .gguf")
    if dtype is not None and hf is None:
        raise ConfigError(f"--dtype {dtype} is for GGUF files; give OUT a name that ends in .gguf, or use --fp8")
    return {"family": family, "dtype": hf, "fp8": fp8}


def _write(form: Format, source: Path, out: Path, options: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    """Write it; what the reports of both formats say, under the same names."""
    config = read_model_config(source)
    report: Any
    if form == "gguf":
        report = export_gguf(source, out, quiet=quiet, **options)
        family, dtypes, lost, special = report.architecture, dict(report.kinds), training_only(config), {}
    else:
        report = export_hf(source, out, quiet=quiet, **options)
        family, lost = report.family, ()  # its notes say what of training is left behind
        dtypes = dict(Counter(DTYPE_NAMES[info.dtype] for info in TensorFolder.open(report.path).tensors.values()))
        special = {name: asdict(report)[name] for name in ("verbatim_config", "fp8_kept", "fp8_new", "resumed")}
    return {
        "path": str(report.path),
        "family": family,
        **size_of(config),
        "dtypes": dtypes,
        **special,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "lost": [*_training_state(source), *(f"{text} (training)" for text in lost)],
        "notes": list(report.notes),
    }


def _training_state(source: Path) -> list[str]:
    return [] if is_imported(source) else ["optimizer state and position in the data"]


def _verify_export(source: Path, out: Path, quiet: bool) -> list[Check]:
    raw = None if out.is_file() else read_json(out / "config.json")
    return [
        check_tensors(lambda: compare_export(source, out, quiet=quiet), ", in the element types above"),
        check_twin(read_model_config(source), raw, quiet),
    ]


def _check_foreign(path: Path) -> None:
    """Refuse what needs no import, or is only a part of what does.

    Raises:
        CheckpointError: with what to do instead.
    """
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{path}: a file alone is imported only as .gguf; give the folder that it lies in")
    if is_imported(path):
        raise CheckpointError(f"{path}: is imported already; use it as it is, or `finemoe export` it")
    if (path / "checkpoints").is_dir() or (path / "state.json").exists():
        raise CheckpointError(f"{path}: is a run of finemoe, which needs no import; use it as it is")
    ggufs = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(f"{path}: holds GGUF files; give the one you want, such as {ggufs[0]}")


def _verify_import(source: Path, report: ImportReport, metadata: Mapping[str, Any] | None, quiet: bool) -> list[Check]:
    raw = None if source.is_file() else read_json(source / "config.json")
    return [
        check_tensors(lambda: compare_import(source, report.path, metadata=metadata, quiet=quiet)),
        check_twin(report.config, raw, quiet),
    ]


def _facts(report: ImportReport, source: Path) -> dict[str, Any]:
    native = read_imported(report.path)
    record = native.source()["tensors"].values()
    aside = Counter((entry["status"], entry.get("reason", "")) for entry in record if entry["status"] != "loaded")
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in native.tensors.tensors.values())
    return {
        "path": str(report.path),
        "source": str(source),
        "family": report.family,
        "format": native.format,
        **size_of(report.config),
        "tensors": dict(Counter(entry["status"] for entry in record)),
        "dequantized": report.dequantized,
        "aside": [{"status": status, "reason": why, "tensors": number} for (status, why), number in aside.items()],
        "dtypes": dict(dtypes),
        "bytes": report.nbytes,
        "resumed": report.resumed,
        "seconds": report.seconds,
        "notes": list(report.notes),
        "warnings": list(report.warnings),
    }
