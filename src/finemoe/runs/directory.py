"""The folder of a run: what it must not hold before, what is written into it first, and its metrics cut to a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finemoe.checkpoint.open import text_home
from finemoe.core.config import to_json
from finemoe.core.environment import environment
from finemoe.core.errors import RunError
from finemoe.core.files import replacing, storage_error, write_text
from finemoe.core.logs import logger, read_json_lines
from finemoe.data.batch import Batch
from finemoe.runs.changes import began_as, changed_since
from finemoe.runs.config import RunConfig, read_config
from finemoe.runs.kernels import is_same_run
from finemoe.text.files import COMPANIONS
from finemoe.text.settings import GENERATION_CONFIG
from finemoe.training.directory import METRICS, read_metrics
from finemoe.training.method import TrainingData


def require_free(directory: Path, config: RunConfig) -> None:
    """Refuse a directory that holds anything: nothing is ever overwritten.

    Raises:
        RunError: it does.
    """
    if directory.is_file():
        raise RunError(f"{directory} is a file; choose another --out")
    if not directory.is_dir() or all(path.name.startswith(".") for path in directory.iterdir()):
        return  # dot files are what a kill leaves of a file being written
    if not (directory / "config.json").exists():
        raise RunError(f"{directory} is not empty and not a run; choose another --out")
    same = is_same_run(config, read_config(directory / "config.json"))
    what = "this very run" if same else f"a run of another configuration ({first_difference(directory, config)})"
    raise RunError(f"{directory} holds {what}; go on with `finemoe resume {directory}`, or choose another --out")


def holds_run(directory: Path, config: RunConfig) -> bool:
    """Whether the run that `config` describes has begun there, by whatever number of processes.

    One that went on otherwise (`finemoe resume --set`) is still the run that it began as.
    """
    return went_on_otherwise(directory, config) is not None


def went_on_otherwise(directory: Path, config: RunConfig) -> tuple[str, ...] | None:
    """Keys that were changed (`finemoe resume --set`) in the run there since it began as `config` describes it.

    None where it did not begin so; nothing where it is what `config` describes.
    """
    if not (directory / "config.json").exists():
        return None
    now = read_config(directory / "config.json")
    if _describes(config, now):
        return ()
    first = began_as(directory)
    return changed_since(first, now) if first is not None and _describes(config, first) else None


def _describes(config: RunConfig, found: RunConfig) -> bool:
    asked = config.model_copy(update={"parallel": found.parallel})
    if asked.training.epochs is not None:  # steps took their place as soon as the data was read
        length = {"epochs": None, "steps": found.training.steps}
        asked = asked.model_copy(update={"training": asked.training.model_copy(update=length)})
    return is_same_run(asked, found)


def first_difference(directory: Path, config: RunConfig) -> str:
    """The first key in which the run there, as it began, is another than `config`: `training.steps: 40 there, 7 here`.

    Raises:
        ConfigError: config.json there is damaged.
    """
    now = read_config(directory / "config.json")
    found = (began_as(directory) or now).model_dump(mode="json")
    ours = config.model_dump(mode="json")
    for name, value in ours["kernels"].items():
        if value == "auto":  # what it came to there is no difference
            ours["kernels"][name] = found["kernels"][name]
    if ours["training"]["epochs"] is not None:  # steps took their place there
        ours["training"] |= {"epochs": None, "steps": found["training"]["steps"]}
    ours["parallel"] = found["parallel"]
    where = _apart(found, ours)
    return f"{where[0]}: {_short(where[1])} there, {_short(where[2])} here" if where else "in what its model came to be"


def _apart(there: Any, here: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first leaf in which two trees of plain values differ, by its key; longest keys that both have."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        pairs: Iterable[tuple[Any, Any, Any]] = ((one, there.get(one), here.get(one)) for one in {**here, **there})
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = ((number, *pair) for number, pair in enumerate(zip(there, here, strict=True)))
    else:
        return (key, there, here) if there != here else None
    return next((found for one, a, b in pairs if (found := _apart(a, b, f"{key}.{one}".lstrip(".")))), None)


_SHOWN = 60


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def describe(directory: Path, config: RunConfig, data: TrainingData[Batch]) -> None:
    """Write what does not change during the run, where it is missing; first the file that `resume` asks for."""
    texts = {
        "config.json": to_json(config),
        "environment.json": json.dumps(environment(), indent=2),
        "data.json": json.dumps(data.report, indent=2, ensure_ascii=False),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            if not (directory / name).exists():
                write_text(directory / name, text)
        if not (directory / "tokenizer.json").exists():
            data.tokenizer.save(directory / "tokenizer.json")
        for name, text in data.companions.items():
            if not (directory / name).exists():
                write_text(directory / name, text)
        if config.start_from is not None:  # chat template and stop ids go with the tokenizer
            for source in (text_home(Path(config.start_from)) / name for name in COMPANIONS):
                if source.exists() and not (directory / source.name).exists():
                    shutil.copyfile(source, directory / source.name)
            _name_stops(directory / GENERATION_CONFIG, data.tokenizer.settings.stop_ids)
    except OSError as error:
        raise storage_error(directory, error) from error


def _name_stops(path: Path, stop_ids: tuple[int, ...]) -> None:
    """Say what ends a generation where no file says it that came along: it stood in the source's config.json."""
    with suppress(ValueError, RecursionError):  # a damaged file stays as it came
        table = json.loads(path.read_bytes()) if path.exists() else {}
        if stop_ids and isinstance(table, dict) and "eos_token_id" not in table:
            write_text(path, json.dumps({**table, "eos_token_id": list(stop_ids)}, indent=2) + "\n")


def cut_metrics(directory: Path, step: int) -> None:
    """Drop the records of steps that will be run again; a file with damaged lines is kept under another name."""
    path = directory / METRICS
    if not path.exists():
        return
    damaged: list[int] = []
    records = [record for record in read_metrics(directory, damaged.append) if record["step"] <= step]
    if damaged:
        asides = (path.with_suffix(f".damaged{number}.jsonl") for number in ("", *(f"-{n}" for n in range(2, 1000))))
        aside = next(one for one in asides if not one.exists() or one.read_bytes() == path.read_bytes())
        with replacing(aside) as copy:  # a copy: after a kill the file itself is still there
            shutil.copyfile(path, copy)
        logger.warning("the file as it was is kept as %s", aside)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def cut_lines(directory: Path, names: Iterable[str], step: int) -> None:
    """Drop the lines of steps that will be run again from files that a method writes, and damaged ones."""
    for path in (directory / name for name in names):
        if path.exists():
            records = [one for one in read_json_lines(path, on_damage=lambda _: None) if one.get("step", 0) <= step]
            write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
