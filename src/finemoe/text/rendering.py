"""Renders chat templates, each in a process of its own: run as a script, requests on stdin, answers on stdout.

A template is a program from a stranger. jinja2's sandbox keeps it from Python's internals; it does not keep it
from looping for ever, or from building a string of a terabyte in one expression. The limits of a process do.
This script starts once, and each request has a copy of it (fork), which is confined, answers and ends: a copy takes two
milliseconds, a start seventy. Nothing of finemoe is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2.debug  # jinja2 imports it at the first error, when no file may be opened any more
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_FILE = "<template>"  # jinja2's name for a template that came as a string


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which refuses what it would otherwise print as nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse an attribute that leads into Python's internals."""
        raise SecurityError(f"the attribute {attribute!r} of {type(obj).__name__} is out of bounds for a template")


class PublicNamespace(Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # as jinja2's own, so that namespace(self=...) works
        self, *rest = args
        found = dict(*rest, **values)
        for name in found:
            _check_public(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute, unless it is private."""
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: rename it without the underscore")


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` is around what the assistant wrote; it renders as its content.

    With `marks`, a character before it and one behind it.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        """The statements between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        around: Sequence[str] = getattr(self.environment, "marks", ()) or ("", "")
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in around]
        return [marks[0].set_lineno(line), jinja2.nodes.Scope(body).set_lineno(line), marks[1].set_lineno(line)]


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(now: Callable[[], datetime] = datetime.now, marks: Sequence[str] = ()) -> jinja2.Environment:
    """The environment that chat templates are written for; `now` is the clock behind `strftime_now`."""
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    made.extend(marks=tuple(marks))
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: now().strftime(form)
    made.globals["namespace"] = PublicNamespace
    made.globals["dict"] = lambda *values, **named: dict(*values, **named)
    del made.globals["lipsum"]  # chat templates have no use for filler text by the page
    return made


def render(
    source: str, conversations: Iterable[Mapping[str, Any]], most_chars: int, marks: Sequence[str] = ()
) -> list[str]:
    """The text of each conversation, which is the table of variables its template sees.

    `marks`: two characters, to stand around what the template says the assistant wrote.

    Raises:
        OverflowError: a text of more than `most_chars` characters.
    """
    template = environment(marks=marks).from_string(source)
    return [_text(template, variables, most_chars) for variables in conversations]


def render_beginnings(
    source: str,
    conversations: Iterable[Mapping[str, Any]],
    beginnings: Iterable[Sequence[tuple[int, bool]]],
    most_chars: int,
    marks: Sequence[str] = (),
) -> tuple[list[str], list[list[int]]]:
    """`render`, and of each conversation how much of that text its template writes of the first messages alone.

    Args:
        source, conversations, most_chars, marks: as in `render`.
        beginnings: of each conversation: how many messages, and whether with what makes the model answer.

    Returns:
        the texts, and for each beginning its length, or -1 where the whole text does not begin with it.
    """
    template = environment(marks=marks).from_string(source)
    texts, lengths = [], []
    for variables, upto in zip(conversations, beginnings, strict=True):
        whole = _text(template, variables, most_chars)
        found = []
        for count, asks in upto:
            changed = {**variables, "messages": variables["messages"][:count], "add_generation_prompt": asks}
            text = _text(template, changed, most_chars)
            found.append(len(text) if whole.startswith(text) else -1)
        texts.append(whole)
        lengths.append(found)
    return texts, lengths


def _text(template: jinja2.Template, variables: Mapping[str, Any], most_chars: int) -> str:
    parts: list[str] = []
    size = 0
    for part in template.generate(**variables):
        size += len(part)
        if size > most_chars:
            raise OverflowError(f"it writes more than {most_chars} characters")
        parts.append(part)
    return "".join(parts)


def _line(error: BaseException) -> int | None:
    """The line of the template that `error` came from."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1] if lines else None


def _explain(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) or type(error).__name__


def _warm_up() -> None:
    """Make Python and jinja2 import what they import at need, while files can still be opened."""
    message = "{{ m | tojson }}{{ m | pprint | wordwrap }}{{ strftime_now('%d') }}{{ 'a\\n' }}"
    render(f"{{% for m in messages %}}{message}{{% endfor %}}", [{"messages": [{"role": "user"}]}], 1000)
    for broken in ("{{ 1 / 0 }}", "{% if %}"):
        with contextlib.suppress(ZeroDivisionError, TemplateError):
            render(broken, [{}], 1000)
    time.localtime()


def _confine(seconds: float, memory: int) -> None:
    """From here on: so much time and memory, no file, no socket, no process."""
    signal.setitimer(signal.ITIMER_REAL, seconds)  # its default action ends the process, inside C code too
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _answer(line: bytes, writer: int) -> NoReturn:
    """In a process of its own: answer one request, which `ChatTemplate.render_all` writes."""
    request = json.loads(line)
    _confine(request["seconds"], request["memory"])
    try:
        what = request["source"], request["conversations"]
        texts, lengths = render_beginnings(*what, request["beginnings"], request["most_chars"], request["marks"])
        answer: dict[str, Any] = {"texts": texts, "lengths": lengths}
    except Exception as error:  # whatever a template provokes is the template's fault
        answer = {"line": _line(error), "message": _explain(error)}
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(json.dumps(answer).encode())
    os._exit(0)


def main() -> None:
    """A request a line until stdin ends, a line for each. This process never sees what a template does."""
    _warm_up()
    for line in sys.stdin.buffer:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            try:
                _answer(line, writer)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if status:
            answer = json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode()
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
