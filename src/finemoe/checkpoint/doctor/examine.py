"""Examine a checkpoint without loading it: what it is, what is wrong with it, and what each way out would lose.

For a run, one checkpoint of it, an imported folder, a Hugging Face folder, a GGUF file, or a single safetensors file.
Damage is a finding, never an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finemoe.checkpoint.doctor.files import check_folder
from finemoe.checkpoint.doctor.findings import Finding, Findings
from finemoe.checkpoint.doctor.model import check_rope, count_mtp, exports_of, layers_of, size_of, training_of
from finemoe.checkpoint.doctor.subject import open_subject
from finemoe.checkpoint.doctor.text import check_text
from finemoe.checkpoint.doctor.values import check_routers, check_values
from finemoe.checkpoint.doctor.weights import account_for_keys, check_fp8, count_dtypes
from finemoe.checkpoint.huggingface.importing import open_source
from finemoe.checkpoint.kinds import Kind

__all__ = ["Diagnosis", "Finding", "examine"]


@dataclass(frozen=True)
class Diagnosis:
    """What an examination found."""

    path: Path
    kind: Kind
    family: str | None
    """`model_type` of Hugging Face or `general.architecture` of GGUF; None where nothing says."""
    findings: tuple[Finding, ...]
    """Problems first, then warnings, then notes."""
    facts: Mapping[str, Any]
    """JSON-able: size, layers, keys, dtypes, fp8, values, router, mtp, rope, training, tokenizer, template, exports;
    what could not be found out is None; empty where it is nothing that finemoe opens."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What keeps it from being opened, or from being what it says."""
        return tuple(finding for finding in self.findings if finding.severity == "problem")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        findings = [asdict(finding) for finding in self.findings]
        return {
            "path": str(self.path),
            "kind": self.kind,
            "family": self.family,
            "sound": not self.problems,
            "findings": findings,
            **self.facts,
        }


def examine(path: str | os.PathLike[str], *, deep: bool = False, quiet: bool = True) -> Diagnosis:
    """Examine what lies at `path`.

    Args:
        path: of a run, a checkpoint, an imported or Hugging Face folder, a .gguf or .safetensors file.
        deep: read every tensor and compare every recorded checksum, instead of headers and small tensors alone.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: there is nothing at `path`.
    """
    found = Findings()
    subject = open_subject(Path(path), found, deep=deep, quiet=quiet)
    if subject.kind == "unknown":
        return Diagnosis(subject.path, subject.kind, None, found.sorted(), {})
    if subject.path.is_dir():
        with found.guard("files"):
            check_folder(subject.path, subject.raw, found)
    config = subject.config
    facts: dict[str, Any] = dict.fromkeys(("size", "layers", "rope", "training", "tokenizer", "template"))
    facts["checkpoints"] = list(subject.checkpoints)
    if config is not None:
        facts.update(size=size_of(config), layers=layers_of(config), training=training_of(config))
        facts["rope"] = check_rope(config, found)
    facts["keys"] = account_for_keys(subject, found)
    facts["dtypes"] = count_dtypes(subject)
    facts["fp8"] = check_fp8(subject, found)
    facts["router"] = check_routers(subject, found)
    facts["values"] = check_values(subject, found, deep=deep, quiet=quiet)
    if deep and subject.kind == "huggingface" and not found.any_problem:
        with found.guard("weights"):  # the import's own judgement, which compares copies too
            for note in open_source(subject.path).account.warnings:
                found.warning("weights", note)
    facts["mtp"] = count_mtp(subject)
    facts.update(check_text(subject, found))
    facts["exports"] = exports_of(subject)
    if not subject.held:  # what cannot be read at all has no figures
        facts.update(dict.fromkeys(("keys", "dtypes", "values", "mtp", "training", "exports")))
    return Diagnosis(subject.path, subject.kind, subject.family, found.sorted(), facts)
