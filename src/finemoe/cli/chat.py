"""`finemoe chat`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.completion import complete_run
from finemoe.cli.output import WeightsOption, printable

if TYPE_CHECKING:
    from finemoe.generation.engine import Event
    from finemoe.server.conversation import Conversation

Source = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="As in `finemoe generate`.", show_default=False, autocompletion=complete_run),
]
_SHOWN, _BAR = 5, 6  # experts of a layer, and cells of the longest bar: a line of 80 columns
_HELP = """\
/experts            which experts wrote the last answer, layer by layer
/disable L2 E17     never choose expert 17 of layer 2; /retry says what differs
/force L2 E17       send every token to it
/active 4           4 routed experts a token;  /active: the model's own number
/shared off         leave out the shared experts;  /shared on
/free               all experts as they were
/retry              the last answer again, with other experts or another seed
/system TEXT        the system message;  /system off: none
/set NAME VALUE     temperature, top_p, top_k, min_p, max_new_tokens, seed ...
/save FILE          the conversation as JSON
/new                begin a new one
/quit               or Ctrl-D; Ctrl-C stops an answer"""


def chat(
    source: Source,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.8,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest tokens that reach P.", metavar="P")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens of an answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal answers.")] = 0,
    weights: WeightsOption = "auto",
) -> None:
    """Talk to a model, and see which experts wrote what.

    A model with a chat template answers; any other goes on with the text that you write, and
    you with its own. /help lists what else can be said. Lines may be piped in, too.

    \b
    Examples:
      finemoe chat SmolLM2-135M-Instruct
      finemoe chat runs/demo/arms/deepseek-moe/seed-0 --temperature 0.6
      echo "Name three rivers." | finemoe chat SmolLM2-135M-Instruct \\
        --temperature 0
    """
    from finemoe.checkpoint.kinds import kind_of

    kind_of(source)  # a path that holds nothing is refused before a second of imports
    from finemoe.server.conversation import chat as begin

    sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    talk = begin(source, system=system, weights=weights, **sampling)
    _say(_greeting(talk))
    with _history():
        _loop(talk)


def _loop(talk: Conversation) -> None:
    from finemoe.core.errors import FinemoeError

    asked_to_end = False
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:  # perhaps of an answer that had just ended: nothing is lost by a key pressed too late
            print()
            if asked_to_end:
                return
            asked_to_end = True
            _say("Ctrl-D ends, and so does Ctrl-C once more")
            continue
        if line is None:
            return
        asked_to_end = False
        try:
            if line.startswith("/"):
                if not _command(talk, line):
                    return
            elif line.strip():
                _write(talk.ask(line if talk.answers else f"{line}\n"), talk)
        except FinemoeError as error:
            _say(str(error))
        except KeyboardInterrupt:
            _say("stopped")


def _read() -> str | None:
    """A line; None at the end."""
    from finemoe.core.errors import ConfigError

    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise ConfigError("a line is no UTF-8: convert what is piped in, such as with iconv") from None


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Arrow keys bring back what was said; where there is no readline, they do not."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_history_length(1000)
    yield


def _write(events: Iterator[Event], talk: Conversation) -> None:
    """An answer as it comes, thoughts apart; whatever happens, the line ends and the terminal is as it was."""
    from finemoe.server.dialects import Dialect, Part, Splitter

    template = talk.opened.template
    dialect = Dialect() if template is None else Dialect.of(list(template.sources.values()))
    splitter: Splitter | None = None
    terminal = sys.stdout.isatty()

    before = ""

    def show(parts: list[Part]) -> None:
        nonlocal before
        for part in parts:
            sys.stdout.write("\n\n" if before not in ("", part.kind) else "")
            before = part.kind
            text = printable(part.text) if terminal else part.text
            sys.stdout.write(typer.style(text, dim=True) if terminal and part.kind == "reasoning" else text)
        sys.stdout.flush()

    try:
        for event in events:  # before the first, nobody knows how the prompt ends
            splitter = splitter or Splitter(dialect, tools=False, thinking=talk.thinking)
            show(splitter.push(event.text))
        show([] if splitter is None else splitter.finish())
    finally:
        events.close()  # type: ignore[attr-defined]  # a generator, which cancels what is open
        sys.stdout.write("\n")
        sys.stdout.flush()
    if talk.events and talk.events[-1].finish_reason == "length":
        most = talk.sampling.max_new_tokens
        full = "the model reads no more tokens: /new begins a new conversation"
        why = f"the most that were asked for: /set max_new_tokens {2 * most}" if len(talk.events) >= most else full
        _say(f"cut after {len(talk.events)} tokens, {why}")


def _say(text: str) -> None:
    from finemoe.core.logs import console

    console().print(printable(text), style="dim", highlight=False, markup=False)


def _greeting(talk: Conversation) -> str:
    model = talk.opened.model
    layers = sum(number < len(model.blocks) for number in model.moe_layers)
    what = f"{layers} layers of experts" if layers else "no experts: a dense model"
    how = "" if talk.answers else "; it was not made to answer, so it goes on with your text"
    return f"{talk.opened.source}: {what}{how}. /help lists commands, Ctrl-D ends."


def _command(talk: Conversation, line: str) -> bool:
    """Do what a line with a slash says; False: it is the end."""
    from finemoe.core.config import did_you_mean
    from finemoe.core.errors import ConfigError

    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in ("quit", "exit"):
        return False
    command = _COMMANDS.get(name)
    if command is None:
        raise ConfigError(f"unknown command /{name}{did_you_mean(name, [*_COMMANDS, 'quit'])}: /help lists them")
    command(talk, rest)
    return True


def _experts(talk: Conversation, rest: str) -> None:
    from finemoe.core.errors import ConfigError

    if not talk.opened.model.moe_layers:
        raise ConfigError("this is a dense model: it has no experts to choose from")
    if not talk.events or not talk.events[0].routes:
        raise ConfigError("no expert has written anything yet")
    print("\n".join(expert_lines(talk.events)))


def expert_lines(events: list[Event]) -> list[str]:
    """A line a layer: the experts that wrote most, as shares of its tokens; the share of the shared ones."""
    lines = [f"experts of {len(events)} tokens: number, share of the tokens that went through it"]
    for layer in events[0].routes:
        counts = Counter(expert for event in events for expert in event.routes[layer].experts)
        most = counts.most_common(_SHOWN)
        lines.append(f"L{layer:<3}" + " ".join(_cell(expert, count / len(events)) for expert, count in most))
    shared = [route.shared for event in events for route in event.routes.values() if route.shared is not None]
    if shared:
        lines.append(f"shared experts: {sum(shared) / len(shared):.0%} of the layers' output, on average")
    return lines


def _cell(expert: int, share: float) -> str:
    return f"E{expert:<3}{'█' * max(1, round(_BAR * share)):<{_BAR}}{share:4.0%}"


def _named(rest: str) -> tuple[int, list[int]]:
    """`L2 E17 E3`, with or without letters."""
    from finemoe.core.errors import ConfigError

    words = rest.replace(",", " ").split()
    try:
        layer, *experts = [int(word.lstrip("LlEe")) for word in words]
    except ValueError:
        raise ConfigError("name a layer and an expert, such as L2 E17; /experts shows which there are") from None
    if not experts:
        raise ConfigError("name an expert behind the layer, such as L2 E17")
    return layer, experts


def _switch(name: str, other: str) -> Callable[[Conversation, str], None]:
    def switch(talk: Conversation, rest: str) -> None:
        layer, experts = _named(rest)
        tables = {key: {k: set(v) for k, v in getattr(talk.wish, key).items()} for key in (name, other)}
        tables[name].setdefault(layer, set()).update(experts)
        if layer in tables[other]:
            tables[other][layer] -= set(experts)
        _wish(talk, **{key: {k: v for k, v in table.items() if v} for key, table in tables.items()})

    return switch


def _wish(talk: Conversation, **changes: Any) -> None:
    """Change what holds for the experts, where that is possible."""
    from dataclasses import replace

    from finemoe.server.constraints import constrain

    wish = replace(talk.wish, **changes)
    constrain(talk.opened.model, wish)
    talk.wish = wish
    _say(f"experts: {_in_words(wish)}")


def _in_words(wish: Any) -> str:
    said = [
        f"{name} {', '.join(f'L{layer} E{expert}' for layer, ids in sorted(table.items()) for expert in sorted(ids))}"
        for name, table in (("without", wish.disabled), ("always", wish.forced))
        if table
    ]
    said += [f"{wish.active} active"] if wish.active is not None else []
    said += [] if wish.shared else ["without the shared ones"]
    return "; ".join(said) or "as the model has them"


def _active(talk: Conversation, rest: str) -> None:
    from finemoe.core.errors import ConfigError

    if rest and not rest.isdecimal():
        raise ConfigError(f"{rest!r} is no number of experts: /active 4")
    _wish(talk, active=int(rest) if rest else None)


def _shared(talk: Conversation, rest: str) -> None:
    from finemoe.core.errors import ConfigError

    if rest not in ("on", "off"):
        raise ConfigError("say /shared on or /shared off")
    _wish(talk, shared=rest == "on")


def _free(talk: Conversation, rest: str) -> None:
    from finemoe.server.constraints import Wish

    _wish(talk, **vars(Wish()))


def _retry(talk: Conversation, rest: str) -> None:
    before = talk.events
    _write(talk.retry(), talk)
    _say(_difference(before, talk))


def _difference(before: list[Event], talk: Conversation) -> str:
    """Where an answer leaves the one before it."""
    old, new = ([event.token_id for event in events] for events in (before, talk.events))
    same = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    if same == len(old) == len(new):
        return f"the same {same} tokens as before"
    spelt = talk.opened.tokenizer.token_bytes
    was, now = (
        repr(spelt.get(ids[same], b"").decode(errors="replace")) if same < len(ids) else "the end" for ids in (old, new)
    )
    return f"differs from token {same + 1} on: {now} instead of {was}"


def _system(talk: Conversation, rest: str) -> None:
    if rest:
        talk.system = None if rest == "off" else rest
    _say(f"system: {talk.system}" if talk.system else "no system message")


def _set(talk: Conversation, rest: str) -> None:
    from finemoe.core.config import parse, with_overrides
    from finemoe.core.errors import ConfigError
    from finemoe.generation.config import SamplingConfig

    name, _, value = rest.replace("=", " ").partition(" ")
    if not value.strip():
        raise ConfigError("say /set NAME VALUE, such as /set temperature 0.5")
    known = talk.sampling.model_dump(exclude_none=True)
    talk.sampling = parse(SamplingConfig, with_overrides(known, [f"{name}={value.strip()}"]), "/set")
    field = name.partition(".")[0]  # logit_bias.17 sets an entry of a table
    _say(f"{field} = {getattr(talk.sampling, field)}")


def _save(talk: Conversation, rest: str) -> None:
    from finemoe.core.errors import ConfigError
    from finemoe.core.files import write_text

    if not rest:
        raise ConfigError("name a file: /save talk.json")
    path = Path(rest).expanduser()
    if path.exists():
        raise ConfigError(f"{path} exists and is left as it is: name another file")
    write_text(path, json.dumps(talk.to_dict(), indent=1, ensure_ascii=False) + "\n")
    _say(f"saved as {path}")


def _new(talk: Conversation, rest: str) -> None:
    system = talk.system
    talk.messages, talk.events = [], []
    talk.system = system
    _say("a new conversation")


def _help(talk: Conversation, rest: str) -> None:
    print(_HELP)


_COMMANDS: Mapping[str, Callable[[Any, str], None]] = {
    "help": _help,
    "experts": _experts,
    "disable": _switch("disabled", "forced"),
    "force": _switch("forced", "disabled"),
    "active": _active,
    "shared": _shared,
    "free": _free,
    "retry": _retry,
    "system": _system,
    "set": _set,
    "save": _save,
    "new": _new,
}
