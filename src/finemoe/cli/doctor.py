"""`finemoe doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.output import Json, Quiet, print_json, print_rich, printable

if TYPE_CHECKING:
    from finemoe.checkpoint.doctor.examine import Diagnosis, Finding

_KINDS = {
    "run": "a run",
    "checkpoint": "a checkpoint of a run",
    "imported": "an imported folder",
    "huggingface": "a Hugging Face folder",
    "gguf": "a GGUF file",
    "tensors": "a safetensors file",
    "unknown": "nothing that finemoe opens",
}
_STYLES = {"problem": "bold red", "warning": "yellow", "note": "dim"}
_FEW_LAYERS = 4


def doctor(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Run, checkpoint, imported or Hugging Face folder, .gguf or .safetensors file.",
            show_default=False,
        ),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every tensor for NaN and compare every checksum; takes longer.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Examine a checkpoint: what it is, and what is wrong.

    And what each export would lose. Only headers and small tensors are read, so that the largest
    checkpoint takes seconds; --deep reads everything. Nothing is executed, changed or repaired.

    \b
    Examples:
      finemoe doctor runs/tiny
      finemoe doctor models/DeepSeek-V2-Lite --deep
      finemoe doctor SmolLM2-135M.gguf --json

    Exit status: 0 no problem, 1 problems were found, 2 there is nothing to examine.
    """
    from finemoe.checkpoint.kinds import require_there

    require_there(path)  # before a second of imports

    from finemoe.checkpoint.doctor.examine import examine

    diagnosis = examine(path, deep=deep, quiet=quiet)
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        _print(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis) -> None:
    from rich.text import Text

    named = f", {diagnosis.family}" if diagnosis.family else ""
    print_rich(Text(printable(f"{diagnosis.path}: {_KINDS[diagnosis.kind]}{named}")))
    urgent = [finding for finding in diagnosis.findings if finding.severity != "note"]
    notes = [finding for finding in diagnosis.findings if finding.severity == "note"]
    if urgent:
        print_rich("", _findings(urgent))
    rows = list(_rows(diagnosis.facts))
    if rows:
        print_rich("", _grid([(Text(title, "bold"), Text(printable(text))) for title, text in rows]))
    if notes:
        print_rich("", _findings(notes))
    print_rich("", Text(_verdict(diagnosis)))


def _findings(findings: list[Finding]) -> Any:
    from rich.text import Text

    return _grid(
        [
            (Text(f"{finding.severity}: {finding.about}", _STYLES[finding.severity]), Text(printable(finding.text)))
            for finding in findings
        ]
    )


def _grid(rows: list[tuple[Any, Any]]) -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True, min_width=19)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _verdict(diagnosis: Diagnosis) -> str:
    problems = len(diagnosis.problems)
    warnings = sum(finding.severity == "warning" for finding in diagnosis.findings)
    said = [f"{problems or 'No'} problem{'s' * (problems != 1)}"]
    if warnings:
        said.append(f"{warnings} warning{'s' * (warnings != 1)}")
    values = diagnosis.facts.get("values") or {"deep": True}
    left = "" if values["deep"] or values["looked_at"] == values["of"] else "; --deep reads the large tensors too"
    return f"{', '.join(said)}{left}."


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and text of each line; facts that are not known have none."""
    for title, key, describe in _LINES:
        value = facts.get(key)
        if value:
            text = describe(value)
            if text:
                yield title, text


def _size(size: Mapping[str, Any]) -> str:
    from finemoe.charts.numbers import count

    text = f"{count(size['total_parameters'])}, {count(size['active_parameters'])} active"
    mtp = size["mtp_parameters"]
    cache = f"; {size['cache_elements_per_token']:,} numbers cached a token"
    return text + (f", {count(mtp)} more for multi-token prediction" if mtp else "") + cache


def _layers(layers: Mapping[str, Any]) -> str:
    routed = f", {layers['moe_layers']} of them routed" if layers["moe_layers"] else ""
    tied = ", embedding and head tied" if layers["tied"] else ""
    return f"{layers['layers']}{routed}; hidden {layers['hidden_size']:,}, vocabulary {layers['vocab_size']:,}{tied}"


def _listed(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda layers: "; ".join(layers[key])


def _mtp(mtp: Mapping[str, int]) -> str:
    if not mtp["announced"]:
        return ""
    return f"{mtp['announced']} announced, {mtp['present']} in the weights"


def _rope(ropes: list[Mapping[str, Any]]) -> str:
    return "; ".join(map(_one_rope, ropes))


def _one_rope(rope: Mapping[str, Any]) -> str:
    scaling = rope["scaling"]
    text = f"base {rope['theta']:,.8g}, {rope['layout'].replace('_', '-')}"
    if scaling is not None:
        original = scaling.get("original_max_positions")
        text += f", {scaling['kind']} times {scaling['factor']:g}" + (f" from {original:,}" if original else "")
    if rope["softmax_factor"] != 1:
        text += f", softmax times {rope['softmax_factor']:.4g}"
    if rope["rotary_factor"] != 1:
        text += f", rotation times {rope['rotary_factor']:.4g}"
    if rope["max_positions"] is not None:
        text += f"; up to {rope['max_positions']:,} positions"
    return text


def _keys(keys: Mapping[str, Any]) -> str:
    said = [f"{keys['tensors']:,}"]
    for name in ("placed", "carried", "dropped"):
        if keys.get(name):
            said.append(f"{keys[name]:,} {name}")
    for name in ("missing", "misshaped", "unexpected"):
        if keys.get(name):
            said.append(f"{len(keys[name]):,} {name}")
    source = ", ".join(f"{number:,} {status}" for status, number in keys.get("source", {}).items())
    return ", ".join(said) + (f" (of the source: {source})" if source else "")


def _dtypes(dtypes: list[Mapping[str, Any]]) -> str:
    return ", ".join(f"{entry['dtype']} {entry['tensors']:,} ({nbytes(entry['bytes'])})" for entry in dtypes)


def nbytes(size: int) -> str:
    """16.1 GB, 450 KB."""
    from finemoe.charts.numbers import count

    text = count(size)
    return f"{text} bytes" if text.isdigit() else f"{text[:-1]} {'G' if text[-1] == 'B' else text[-1]}B"


def _fp8(fp8: Mapping[str, Any]) -> str:
    rows, columns = fp8["block"]
    blocks = f"{fp8['blocks']:,} blocks of {rows} x {columns}"
    return f"{fp8['matrices']:,} matrices, {fp8['factors']:,} with factors for {blocks}"


def _values(values: Mapping[str, Any]) -> str:
    if values["looked_at"] == values["of"]:
        return f"all {values['of']:,} tensors read"
    return f"{values['looked_at']:,} small tensors of {values['of']:,} read"


def _router_weights(router: Mapping[str, Any]) -> str:
    return f"stored as {', '.join(router['weights'])}, computed in F32"


def _bias(router: Mapping[str, Any]) -> str:
    known = [entry for entry in router["bias"] if entry["low"] is not None]
    if not known:
        return ""
    dtypes = ", ".join(dict.fromkeys(entry["dtype"] for entry in known))
    if len(known) <= _FEW_LAYERS:
        ranges = "; ".join(f"layer {e['layer']}: {e['low']:.3g} to {e['high']:.3g}" for e in known)
        return f"{dtypes}; {ranges}"
    low, high = min(e["low"] for e in known), max(e["high"] for e in known)
    widest = max(known, key=lambda e: e["high"] - e["low"])
    return (
        f"{dtypes}; {low:.3g} to {high:.3g} over {len(known)} layers; widest in layer {widest['layer']}: "
        f"{widest['low']:.3g} to {widest['high']:.3g}"
    )


def _tokenizer(tokenizer: Mapping[str, Any]) -> str:
    rows = tokenizer["rows"]
    unused = f", {rows - tokenizer['ids']:,} rows unused" if rows and rows > tokenizer["ids"] else ""
    faithful = "gives texts back" if tokenizer["faithful"] else "not faithful"
    stops = ", ".join(map(str, tokenizer["stop_ids"][:4]))
    return f"{tokenizer['ids']:,} ids{unused}, {faithful}; stops at {stops}"


def _template(template: Mapping[str, Any]) -> str:
    rendered = template["rendered"]
    shown = rendered if len(rendered) <= 70 else rendered[:70] + " ..."
    tokens = f", {template['tokens']} tokens" if template["tokens"] is not None else ""
    return f"renders; Hello is {shown!r}{tokens}"


def _exports(exports: list[Mapping[str, Any]]) -> str:
    said = []
    for entry in exports:
        if entry["possible"]:
            name = f"GGUF ({entry['family']})" if entry["format"] == "gguf" else entry["family"]
            said.append(f"{name}: " + ("; ".join(entry["lost"]) or "nothing is lost"))
    if not any(entry["possible"] for entry in exports):
        said = [f"{entry['family']}: no, {entry['reason']}" for entry in exports]
    elif not exports[-1]["possible"]:
        said.append(f"GGUF: no, {exports[-1]['reason']}")
    elif len(reasons := {entry["reason"] for entry in exports[:-1]}) == 1 and None not in reasons:
        said.append(f"Hugging Face: no, {reasons.pop()}")
    return "\n".join(said)


_LINES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Checkpoints", "checkpoints", ", ".join),
    ("Parameters", "size", _size),
    ("Layers", "layers", _layers),
    ("Attention", "layers", _listed("attention")),
    ("Experts", "layers", _listed("experts")),
    ("Router", "layers", _listed("routers")),
    ("Router weights", "router", _router_weights),
    ("Selection bias", "router", _bias),
    ("Prediction modules", "mtp", _mtp),
    ("Rotary positions", "rope", _rope),
    ("Tensors", "keys", _keys),
    ("Element types", "dtypes", _dtypes),
    ("FP8", "fp8", _fp8),
    ("Values", "values", _values),
    ("Tokenizer", "tokenizer", _tokenizer),
    ("Chat template", "template", _template),
    ("Trained further", "training", "\n".join),
    ("Exported as", "exports", _exports),
)
