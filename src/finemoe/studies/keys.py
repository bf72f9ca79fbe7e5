"""Every key that a recipe may have, of a run and of a comparison; `docs/reference/recipe.md` is written from here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

from pydantic import BaseModel

from finemoe.core.config import Config, did_you_mean
from finemoe.core.errors import ConfigError
from finemoe.core.keys import LEFT_OUT, REQUIRED, Key, Section, sections_of
from finemoe.data.config import NEW_SPLITTING
from finemoe.methods.distillation.sample_table import SampleConfig
from finemoe.model.config import ModelConfig, ModelRecipe
from finemoe.runs.config import RunConfig, with_defaults
from finemoe.studies.config import CompareConfig
from finemoe.studies.staged.config import StudyConfig

ROOTS = {"run": "finemoe train", "study": "finemoe paper", "comparison": "finemoe compare"}
"""The kinds of recipe, and the verb that takes each; `finemoe paper` takes one for `finemoe train` that has stages."""
_TITLES = {"run": "A run", "study": "A study of stages", "comparison": "A comparison"}

_MEANINGS = {
    "run": "The keys above all tables of a recipe for `finemoe train`.",
    "comparison": "The keys above all tables of a recipe for `finemoe compare`.",
    "stage": "A run by itself: all tables of a recipe, laid on those outside of stages; or, with `sample`, answers.",
    "model": "One block repeated, and what differs at the bottom. A preset gives all of it; every other key overrides.",
}
_DEFAULTS = {
    ("run", "name"): "the file's name",
    ("run", "model"): REQUIRED,
    ("run", "data.vocab_size"): "model.vocab_size",
    ("run", "data.splitting"): f'"{NEW_SPLITTING}"',
    ("comparison", "base"): 'preset = "tiny-dense"',
    ("comparison", "name"): "the file's name",
}
"""What is filled in from elsewhere in the recipe, in words."""
_PRESET = Key("model.preset", "text", LEFT_OUT, "", "A named model to start from; `finemoe presets` lists them.")
_BALANCE = Key(
    "balance",
    "table as [model.feed_forward.balance]",
    LEFT_OUT,
    "",
    "Balance losses of a model that `start_from` opens; else they are part of the model.",
)

_STAGE = Section(
    "stage",
    None,
    "",
    (
        Key("stage.name", "text", REQUIRED, "", "Small letters, digits and hyphens; its folder is NUMBER-NAME."),
        Key(
            "stage.start_from",
            "text",
            LEFT_OUT,
            "",
            "The name of a stage before it, or as in any recipe. In a path `{NAME}/` is the folder of a stage.",
        ),
        Key("stage.sample", "table", LEFT_OUT, "", "Train nothing: write answers of `start_from` to answers.jsonl."),
    ),
)
"""What `runs.planning.stages` reads before there is a configuration."""


@cache
def recipe_sections() -> Mapping[str, tuple[Section, ...]]:
    """The tables of a run's recipe and, where they differ, those of a comparison's."""
    known: dict[type[BaseModel], str] = {}
    instead: dict[type[BaseModel], type[Config]] = {ModelConfig: ModelRecipe}
    run = sections_of(RunConfig, defaults=with_defaults({}), instead=instead, known=known)
    found = {"run": (*map(_with_own, run), _STAGE, *sections_of(SampleConfig, "stage.sample", known=known))}
    found["study"] = tuple(sections_of(StudyConfig, "study", known=known))
    compared = sections_of(CompareConfig, defaults=with_defaults({}), known=known)
    found["comparison"] = tuple(compared)
    return {root: tuple(_finished(root, section) for section in sections) for root, sections in found.items()}


def _with_own(section: Section) -> Section:
    """With the keys that are read before there is a configuration."""
    if section.name == "":
        return replace(section, keys=(*section.keys, _BALANCE))
    if section.name == "model":
        given = tuple(replace(key, default="the preset's") if key.default == REQUIRED else key for key in section.keys)
        spelt_out = next(iter(sections_of(ModelConfig, "model", known={}))).keys
        others = {"model.blocks": "Instead of num_layers, attention, feed_forward and leading: ", "model.mtp": ""}
        more = [
            replace(key, default=LEFT_OUT, meaning=others[key.name] + key.meaning[:1].lower() + key.meaning[1:])
            for key in spelt_out
            if key.name in others
        ]
        return replace(section, keys=(_PRESET, *given, *more))
    return section


def _finished(root: str, section: Section) -> Section:
    keys = tuple(replace(key, default=_DEFAULTS.get((root, key.name), key.default)) for key in section.keys)
    return replace(section, meaning=_MEANINGS.get(section.name or root, section.meaning), keys=keys)


def recipe_keys(section: str | None = None) -> list[Key]:
    """Every key of a recipe, or those of one table.

    Args:
        section: a table (`training`, `model.attention`), a kind of one (`muon`, `model.attention.latent`), `run` or
            `comparison`, or a single key (`learning_rate`).

    Raises:
        ConfigError: nothing is called so.
    """
    return [key for _, found in chosen_sections(section) for key in found.keys]


def chosen_sections(wanted: str | None) -> list[tuple[str, Section]]:
    """The tables that `recipe_keys` would take its keys from, each with the kind of recipe it belongs to."""
    every = [(root, section) for root, sections in recipe_sections().items() for section in sections]
    if wanted is None:
        return every
    name = wanted.strip().strip("[]").strip()
    for chosen in (_by_table, _by_kind, _by_last_word, _by_key):
        if found := list(chosen(every, name)):
            return found
    known = dict.fromkeys(word for root, section in every for word in (root, *_words(section)) if word)
    keys = dict.fromkeys(word for _, section in every for key in section.keys for word in (key.name, _last(key.name)))
    close = did_you_mean(name, [*known, *keys])
    tables = ", ".join(dict.fromkeys(section.name.split(".")[0] or root for root, section in every))
    raise ConfigError(
        f"no table or key is called {wanted!r}" + (close if "did you" in close else f"; tables: {tables}")
    )


_Every = list[tuple[str, Section]]


def _by_table(every: _Every, name: str) -> Iterator[tuple[str, Section]]:
    for root, section in every:
        if (
            section.name == name
            or (name and section.name.startswith(f"{name}."))
            or (name == root and not section.name)
        ):
            yield root, section


def _by_kind(every: _Every, name: str) -> Iterator[tuple[str, Section]]:
    yield from ((root, section) for root, section in every if section.kind and name in _words(section))


def _by_last_word(every: _Every, name: str) -> Iterator[tuple[str, Section]]:
    yield from ((root, section) for root, section in every if section.name and name == _last(section.name))


def _by_key(every: _Every, name: str) -> Iterator[tuple[str, Section]]:
    for root, section in every:
        keys = tuple(key for key in section.keys if name in (key.name, _last(key.name)))
        if keys:
            yield root, replace(section, keys=keys)


def _words(section: Section) -> tuple[str, ...]:
    return (section.name, section.kind, f"{section.name}.{section.kind}") if section.kind else (section.name,)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def heading(root: str, section: Section) -> str:
    """`[optimizer] kind = "muon"`, `[[stage]]`."""
    name = f"[{section.name}]" if section.name else f"A recipe for {ROOTS[root]}"
    name = "[[stage]]" if section.name == _STAGE.name else name
    return f'{name} kind = "{section.kind}"' if section.kind else name


_INTRODUCTION = """\
# Every key of a recipe

This page is made from the configurations themselves by `finemoe recipe keys --markdown`, and a test holds it equal, so
that it cannot fall behind. In a terminal `finemoe recipe keys SECTION` prints one table, `finemoe recipe new FILES`
writes a first recipe for texts of your own, and `finemoe train RECIPE --check` says what it will cost.

A recipe is TOML. Keys stand in tables: `training.tokens` is the key `tokens` below a line `[training]`, and on the
command line `--set training.tokens=1_000_000`. A table that may be of several kinds says which by its key `kind`; the
kinds have keys of their own. What is left out has its default. An unknown key is an error that names the one you meant.
"""


def markdown() -> str:
    """The page of the reference."""
    lines = [_INTRODUCTION]
    for root, sections in recipe_sections().items():
        lines.append(f"## {_TITLES[root]}: `{ROOTS[root]} RECIPE`\n")
        if root == "comparison":
            lines.append("What is not here is as in a run: data, training, optimizer, schedule.\n")
        for section in sections:
            title = f"### `{heading(root, section)}`\n" if section.name else ""
            lines += [title] if title else []
            lines.append(f"{section.meaning}\n")
            if section.keys:
                lines.append("| key | type | unit | default | meaning |\n|---|---|---|---|---|")
                lines += [_row(key, section.name) for key in section.keys]
                lines.append("")
    return "\n".join(lines)


def _row(key: Key, table: str) -> str:
    name = key.name.removeprefix(f"{table}.") if table else key.name
    default = key.default if key.default in (REQUIRED, LEFT_OUT) else f"`{key.default}`"
    cells = (f"`{name}`", key.type, key.unit, default, key.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
