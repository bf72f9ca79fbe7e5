"""The server as a process: a socket, signals, the log, and nothing that was asked or answered in it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finemoe.checkpoint.open import read_model_config
from finemoe.core.errors import ConfigError
from finemoe.server.app import create_app
from finemoe.server.models import Models, Options, prepare_all
from finemoe.server.worker import apart

if TYPE_CHECKING:
    import uvicorn

KEY_VARIABLE = "FINEMOE_API_KEY"
LOOPBACK = "127.0.0.1"


def serve(
    *models: str | os.PathLike[str],
    options: Options | None = None,
    host: str = LOOPBACK,
    port: int = 8000,
    key: str | None = None,
    load: bool = True,
    ready: Callable[[str], None] = lambda address: None,
    started: Callable[[uvicorn.Server], None] = lambda server: None,
) -> None:
    """Serve models until the process is told to stop: OpenAI's API, and a page to chat on.

    Args:
        models: paths, each as `finemoe generate` takes it; `NAME=PATH` gives a name.
        options: how models are opened, and what is allowed; None: as `finemoe serve` does.
        host, port: to listen at; port 0: any that is free.
        key: that clients must send; None: nobody is asked.
        load: open all models at the start, else each when it is first asked for.
        ready: called with the address once models are open and the socket listens.
        started: called with what can be told to stop (`should_exit = True`), before that.

    Raises:
        FinemoeError: the address cannot be used, something that is no model, or no folder for weights.
    """
    sources, options = named(str(model) for model in models), options or Options()
    _check_sources(sources)
    if options.weights_below is not None and not options.weights_below.is_dir():
        raise ConfigError(f"--weights-below {options.weights_below}: there is no such folder; make it, or name another")
    listening = _listen(host, port)
    try:
        opened = apart(lambda: prepare_all(sources, options)) if load else {}
    except BaseException:
        listening.close()
        raise
    app = create_app(
        lambda metrics: Models(sources, options, metrics.passed, opened),
        key=key,
        max_body_bytes=options.limits.max_body_bytes,
        slow_seconds=options.limits.slow_seconds,
        drain_seconds=options.limits.drain_seconds,
        load=load,
        ready=lambda: ready(_address(listening)),
    )
    server = _server(app, options)
    started(server)
    try:
        server.run(sockets=[listening])
    except SystemExit as error:  # which uvicorn raises when the application could not start
        raise ConfigError("the server could not start; the log says why") from error


def named(sources: Iterable[str]) -> dict[str, Path]:
    """Names for models: `NAME=PATH`, or the last part of a path.

    Raises:
        ConfigError: two with the same name.
    """
    found: dict[str, Path] = {}
    for source in sources:
        name, _, path = source.partition("=") if "=" in source and not Path(source).exists() else ("", "", source)
        whole = Path(path)
        name = name or whole.resolve().name.removesuffix(".gguf")
        if "/" in name:
            raise ConfigError(
                f"{source}: a name is a part of an address and has no slash: {name.replace('/', '-')}={path}"
            )
        if name in found:
            raise ConfigError(f"two models are called {name}: give one of them another name, OTHER={source}")
        found[name] = whole
    return found


def _check_sources(sources: Mapping[str, Path]) -> None:
    """Whether each of them is a model, before anything listens.

    Raises:
        FinemoeError: one is none, or none is given.
    """
    if not sources:
        raise ConfigError("nothing to serve: name a run, a folder or a GGUF file")
    for path in sources.values():
        read_model_config(path)


def _server(app: Any, options: Options) -> uvicorn.Server:
    import uvicorn

    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1 + round(options.limits.drain_seconds),
    )
    return uvicorn.Server(config)


def _address(listening: socket.socket) -> str:
    """As a browser on this machine finds it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, UnicodeError) as error:
        listening.close()
        unknown = isinstance(error, (socket.gaierror, UnicodeError))
        advice = "choose another --host" if unknown else "choose another --port"
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}:{port} cannot be listened at: {said}; {advice}") from error
    return listening


def key_from(file: Path | None, environment: Mapping[str, str] | None = None) -> str | None:
    """The key in `file`, or in FINEMOE_API_KEY; None where there is neither.

    Raises:
        ConfigError: a file that cannot be read, or holds no key.
    """
    if file is None:
        given = (os.environ if environment is None else environment).get(KEY_VARIABLE)
    else:
        try:
            given = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--api-key-file {file} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from error
    if given is None:
        return None
    key = given.strip()
    if not key or not key.isascii() or any(char.isspace() for char in key):
        where = KEY_VARIABLE if file is None else str(file)
        raise ConfigError(f"{where} holds no key: write one line of letters, digits and signs without blanks")
    return key
