"""What every request passes before it is looked at: the key, its size, a place in the log. Plain ASGI."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from finemoe.core.logs import logger
from finemoe.server.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

AT_END = "finemoe.at_end"
"""Of a scope: called when nobody reads the answer any more, also of a stream that never began."""
OPEN = ("/health", "/ready")
"""Paths that need no key, beside the page."""
_POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Guard:
    """Keys and sizes, before anything is read."""

    def __init__(self, app: App, *, key: str | None, most_bytes: int, count: Callable[[str, int], None]) -> None:
        """`key`: None lets everybody in; `count` is told every path and status."""
        self._app, self._key, self._most, self._count = app, key, most_bytes, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, refused = time.monotonic(), 0, False

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        read = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most and not refused:
                refused = True
                await _answer(noted, self._too_long())
            return {"type": "http.disconnect"} if refused else message

        async def unless_refused(message: MutableMapping[str, Any]) -> None:
            if not refused:
                await noted(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await _answer(noted, refusal)
            else:
                await self._app(scope, bounded, unless_refused)
        finally:
            scope.get(AT_END, lambda: None)()
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self._count(path, status)
            logger.debug("%s %s %d, %.0f ms", scope["method"], path, status, 1e3 * (time.monotonic() - started))

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if length.isdigit() and len(length) < 20 and int(length) > self._most:
            return self._too_long()
        guarded = scope["path"] not in OPEN and (
            scope["path"].startswith(("/v1/", "/metrics")) or scope["method"] not in ("GET", "HEAD")
        )
        if self._key is None or not guarded:
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + self._key.encode()):
            return None
        return ApiError(
            401, "the key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key"
        )

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the request is longer than the {self._most:,} bytes that this server reads")


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
