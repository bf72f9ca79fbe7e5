"""The HTTP side: paths, streams, and what is said when something is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from finemoe.core.errors import FinemoeError
from finemoe.core.logs import logger
from finemoe.server import asking
from finemoe.server.answers import chat_choice, chat_chunk
from finemoe.server.embeddings import embed
from finemoe.server.errors import ApiError, ErrorAnswer, busy, explain
from finemoe.server.metrics import CONTENT_TYPE, Metrics
from finemoe.server.middleware import AT_END, Guard
from finemoe.server.models import Models, Served
from finemoe.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    WeightsRequest,
)
from finemoe.server.shapes import (
    ChatAnswer,
    EmbeddingAnswer,
    ExpertsAnswer,
    Health,
    ModelCard,
    ModelList,
    Renewed,
    TextAnswer,
    Tokens,
    Words,
)
from finemoe.server.worker import FullError, StoppedError
from finemoe.server.writing import TextShape, Writing, begin, refusal, unless_gone

_SAID: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": said}
    for status, said in {
        400: "The request cannot be understood or done; `param` names the field.",
        401: "The key is missing or wrong.",
        403: "The server was not started for that.",
        404: "There is no such model.",
        413: "The request is too long.",
        429: "Too many requests wait already.",
        500: "A defect of the server.",
        503: "The server stops, or has no memory for this model just now.",
    }.items()
}

_BREAKS = "\x85\u2028\u2029"
"""Many a client that reads line by line ends a line at these, too."""


class Server:
    """What the paths share."""

    def __init__(self, models: Models, metrics: Metrics, slow_seconds: float, drain_seconds: float) -> None:
        self.models, self.metrics = models, metrics
        self.slow_seconds, self.drain_seconds = slow_seconds, drain_seconds
        self.stopping = False

    def check(self) -> None:
        """Whether new requests are taken.

        Raises:
            ApiError: the server stops.
        """
        if self.stopping:
            raise ApiError(503, "the server stops and takes no more requests")

    async def ask(self, request: ChatRequest | CompletionRequest, read: Callable[[Served], asking.Asked]) -> Writing:
        """A request on its way to the engine; reading and rendering prompts is done in a thread.

        Raises:
            ApiError: it is refused.
        """
        self.check()
        self.models.check(request.model)
        request.check()
        guess = request.finemoe.guess
        served = await self.models.get(request.model)
        if guess == "module" and not served.opened.model.mtp:
            raise ApiError(400, f"{request.model} has no prediction module to guess with", param="finemoe.guess")
        asked = await asyncio.to_thread(read, served)
        while not self.models.holds(served):  # it was closed meanwhile, to make room for another, or renewed
            served = await self.models.get(request.model)
            asked = await asyncio.to_thread(read, served)
        try:
            writing = begin(request, served, asked, self.metrics)
        except FullError:
            raise busy(served.worker.open) from None
        self.metrics.open.labels(served.name).set(served.worker.open)
        return writing


def create_app(
    models: Callable[[Metrics], Models],
    *,
    key: str | None = None,
    max_body_bytes: int = 4 << 20,
    slow_seconds: float = 30.0,
    drain_seconds: float = 30.0,
    load: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application.

    Args:
        models: made when the event loop runs.
        key: that clients must send; None: nobody is asked.
        max_body_bytes: of a request.
        slow_seconds: a reader of a stream who takes nothing for so long is cut off.
        drain_seconds: that streams have to end once the server is told to stop.
        load: open all models at the start.
        ready: called when requests are taken.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        server = app.state.server = Server(models(metrics), metrics, slow_seconds, drain_seconds)
        for name in server.models.names if load else ():
            await server.models.get(name)
        ready()
        yield
        server.stopping = True
        await server.models.close()

    app = FastAPI(title="finemoe", version=_version(), lifespan=life, docs_url=None, redoc_url=None, responses=_SAID)
    app.add_middleware(
        Guard,
        key=key,
        most_bytes=max_body_bytes,
        count=lambda path, status: metrics.requests.labels(path, status).inc(),
    )
    _add_errors(app)
    _add_writing(app)
    _add_models(app)
    _add_renewing(app)
    _add_tokens(app)
    _add_page(app)
    described = app.openapi()  # of FastAPI's own refusal, 422, nothing is left: `invalid` answers 400
    for methods in described["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    return app


def _add_page(app: FastAPI) -> None:
    """Each file of the page at its own path: nothing else can be read."""
    folder = Path(str(files("finemoe.server"))) / "page"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            route = "/" if name == "index.html" else f"/{name}"
            app.add_api_route(route, _file(path), methods=["GET", "HEAD"], include_in_schema=False)


def _file(path: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(path, headers={"cache-control": "no-cache"})


def _version() -> str:
    from importlib.metadata import version

    return version("finemoe")


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, dict(error.headers))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await refused(request, explain(error.errors()))

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = f"{request.method} is not for {request.url.path}: {error.detail}"
        if error.status_code == 404:
            said = f"there is no {request.url.path} on this server: /openapi.json lists what there is"
        if error.status_code == 400:  # FastAPI could not read it
            said = "the request is no JSON that can be read: send UTF-8, nested less deeply, without endless numbers"
        return JSONResponse(ApiError(error.status_code, said).body(), error.status_code, error.headers)

    async def broken(request: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return await refused(request, refusal(error))

    async def known(request: Request, error: Exception) -> Response:
        return await refused(request, refusal(error))  # it was closed, or is not to be read

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(StoppedError, known)
    app.add_exception_handler(FinemoeError, known)
    app.add_exception_handler(RecursionError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, broken)


def _add_writing(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", response_model=ChatAnswer, tags=["write"])
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation, whole or as a stream of server-sent events."""
        server: Server = app.state.server
        limits = server.models.limits
        writing = await server.ask(body, lambda served: asking.chat(body, served.opened, served.dialect, limits))
        request.scope[AT_END] = writing.close
        named = _head("chatcmpl", "chat.completion", body.model)
        if body.stream:
            begun: set[int] = set()

            def shape(delta: Any) -> dict[str, Any]:
                first = delta.index not in begun
                begun.add(delta.index)
                return chat_chunk(delta, first)

            return _stream(server, writing, body, {**named, "object": "chat.completion.chunk"}, shape)
        return await _whole(writing, request, named, lambda delta: chat_choice(delta, bool(body.logprobs)))

    @app.post("/v1/completions", response_model=TextAnswer, tags=["write"])
    async def complete(body: CompletionRequest, request: Request) -> Any:
        """Go on with a text, whole or as a stream of server-sent events."""
        server: Server = app.state.server
        writing = await server.ask(body, lambda served: asking.completion(body, served.opened, server.models.limits))
        request.scope[AT_END] = writing.close
        named, shape = _head("cmpl", "text_completion", body.model), TextShape(body, writing).choice
        if body.stream:
            return _stream(server, writing, body, named, shape)
        return await _whole(writing, request, named, shape)


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


async def _whole(
    writing: Writing, request: Request, head: Mapping[str, Any], shape: Callable[[Any], dict[str, Any]]
) -> Response:
    deltas = await unless_gone(request.receive, writing.whole())
    if deltas is None:
        return Response(status_code=499)  # nobody reads it
    body = {**head, "choices": [shape(delta) for delta in deltas], "usage": writing.usage(), "finemoe": writing.facts()}
    return JSONResponse(body)


def _stream(
    server: Server, writing: Writing, body: Any, head: Mapping[str, Any], shape: Callable[[Any], dict[str, Any]]
) -> Response:
    usage = body.stream_options is not None and body.stream_options.include_usage

    async def events() -> AsyncIterator[dict[str, str]]:
        more: dict[str, Any] = {"usage": None} if usage else {}
        try:
            async for delta in writing.deltas():
                yield {"data": _json({**head, "choices": [shape(delta)], **more})}
            if usage:
                yield {"data": _json({**head, "choices": [], "usage": writing.usage(), "finemoe": writing.facts()})}
            yield {"data": "[DONE]"}
        except ApiError as error:
            yield {"data": _json(error.body())}
        except Exception as error:
            logger.error("a stream failed", exc_info=error)
            yield {"data": _json(refusal(error).body())}

    return EventSourceResponse(
        events(), sep="\n", send_timeout=server.slow_seconds, ping=15, shutdown_grace_period=server.drain_seconds
    )


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in _BREAKS if not text.isascii() else ():
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models() -> Any:
        """All models of this server."""
        found: Models = app.state.server.models
        return {"object": "list", "data": [found.describe(name) for name in found.names]}

    @app.get("/v1/models/{model}", response_model=ModelCard, tags=["models"])
    async def model(model: str) -> Any:
        """One of them; it is opened where that has not been done."""
        found: Models = app.state.server.models
        await found.get(model)
        return found.describe(model)

    @app.get("/v1/models/{model}/experts", response_model=ExpertsAnswer, tags=["models"])
    async def experts(model: str) -> Any:
        """What an analysis says of its experts."""
        return app.state.server.models.cards(model)

    @app.get("/health", response_model=Health, tags=["server"])
    async def health() -> Any:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", response_model=Health, tags=["server"])
    async def ready() -> Any:
        """Whether new requests are taken."""
        app.state.server.check()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, tags=["server"])
    async def metrics() -> Response:
        """For Prometheus."""
        server: Server = app.state.server
        opened = {served.name: served for served in server.models.open}
        for name in server.models.names:
            if name in opened:
                server.metrics.seen(name, opened[name].worker)
            else:
                server.metrics.closed(name)
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)


def _add_renewing(app: FastAPI) -> None:
    @app.post("/update_weights_from_disk", response_model=Renewed, tags=["models"])
    async def update_weights_from_disk(body: WeightsRequest) -> Any:
        """Other weights for a model of the same architecture, where the server was started with --weights-below."""
        server: Server = app.state.server
        server.check()
        name, path, version = asking.weights(body, server.models.names, server.models.weights_below)
        await server.models.renew(name, path, version)
        said = "the weights are there; requests from now on are answered by them"
        return {"success": True, "message": said, "weight_version": version}


def _add_tokens(app: FastAPI) -> None:
    @app.post("/v1/embeddings", response_model=EmbeddingAnswer, tags=["tokens"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Any:
        """A vector for each text: the mean of the last hidden states, or the last of them (`pooling`)."""
        server: Server = app.state.server
        server.check()
        served = await server.models.get(body.model)
        try:
            found = await unless_gone(request.receive, embed(body, served))
        except FullError:
            raise busy(served.worker.open) from None
        if found is None:
            return Response(status_code=499)  # nobody reads it
        vectors, tokens = found
        packed: list[Any] = [vector.tolist() for vector in vectors]
        if body.encoding_format == "base64":
            packed = [base64.b64encode(vector.numpy().tobytes()).decode() for vector in vectors]
        data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(packed)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": usage})

    @app.post("/tokenize", response_model=Tokens, tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Any:
        """The ids of a text, and the text of each."""
        opened = (await app.state.server.models.get(body.model)).opened
        asking.check_length(body.text, opened, "text")
        ids = await asyncio.to_thread(opened.tokenizer.encode, body.text, special=body.special)
        spelling = opened.tokenizer.token_bytes
        return {"ids": ids, "tokens": [spelling[one].decode(errors="replace") for one in ids], "count": len(ids)}

    @app.post("/detokenize", response_model=Words, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Any:
        """The text of ids."""
        opened = (await app.state.server.models.get(body.model)).opened
        size = opened.tokenizer.vocab_size
        outside = next((one for one in body.ids if one not in opened.tokenizer.token_bytes), None)
        if outside is not None:
            raise ApiError(400, f"token id {outside} is outside the vocabulary of {size:,}", param="ids")
        return {"text": await asyncio.to_thread(opened.tokenizer.decode, body.ids)}
