"""What `finemoe import` and `finemoe export` share: the checks of --verify, and how both report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.output import print_rich, printable

if TYPE_CHECKING:
    from finemoe.checkpoint.proof.written import Comparison
    from finemoe.model.config import ModelConfig

Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Compare every tensor again, and a random twin's logits with transformers' where it is installed.",
    ),
]


@dataclass(frozen=True)
class Check:
    """One thing that --verify looked at."""

    name: str
    sound: bool | None
    """None: it could not be looked at; `said` tells why."""
    said: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"name": self.name, "sound": self.sound, "said": self.said}


def check_tensors(compare: Callable[[], Comparison], rounded: str = "") -> Check:
    """Every tensor of both sides, read again; what cannot be read is a failure. `rounded` ends the good message."""
    from finemoe.checkpoint.doctor.findings import few
    from finemoe.core.errors import FinemoeError

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
    from finemoe.checkpoint.proof.twin import verify_twin
    from finemoe.core.errors import FinemoeError
    from finemoe.core.logs import logger

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
    from finemoe.checkpoint.huggingface.families import FAMILIES, representable_as

    names = [name for name, refused in representable_as(config).items() if refused is None]
    return FAMILIES[names[0]].from_config(config, max_positions=4096) if names else None


def size_of(config: ModelConfig) -> dict[str, int]:
    """Parameters: all, active, and those of prediction modules."""
    from finemoe.model.size import measure

    size = measure(config, config.max_positions or 4096)
    return {
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "mtp_parameters": size.mtp_parameters,
    }


def show_size(size: dict[str, int]) -> str:
    """Parameters in words."""
    from finemoe.charts.numbers import count

    more = f", {count(size['mtp_parameters'])} more for multi-token prediction" if size["mtp_parameters"] else ""
    return f"{count(size['total_parameters'])}, {count(size['active_parameters'])} active{more}"


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Titles and texts in two columns on stdout."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True, min_width=19)
    table.add_column(overflow="fold")
    for title, text in lines:
        table.add_row(Text(title, "bold"), Text(printable(text)))
    print_rich(table)


def print_checks(checks: list[Check]) -> None:
    """A line for each check."""
    words = {True: "verified", False: "NOT VERIFIED", None: "not checked"}
    print_lines((f"{words[check.sound]}: {check.name}", check.said) for check in checks)


def fail_unless_sound(checks: list[Check]) -> None:
    """End with status 1 where a check failed, after saying so.

    Raises:
        typer.Exit: 1.
    """
    from finemoe.core.logs import logger

    failed = [check.name for check in checks if check.sound is False]
    if failed:
        logger.error("verification failed: %s; do not use what was written", ", ".join(failed))
        raise typer.Exit(1)
