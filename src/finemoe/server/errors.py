"""Refusals in OpenAI's shape: a status, and a sentence that says what was wrong and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

RETRY_SECONDS = 1


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    """The field that it is about."""
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is none."""

    error: ErrorBody


class ApiError(Exception):
    """A request that is refused."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, type: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """As JSON."""
        body = ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorAnswer(error=body).model_dump()

    @property
    def headers(self) -> Mapping[str, str]:
        """Those that go with the status."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_SECONDS)}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def busy(waiting: int) -> ApiError:
    """No more requests are taken just now."""
    return ApiError(
        429,
        f"{waiting} completions are waiting already, and no more are taken: try again in a moment",
        type="rate_limit_error",
        code="server_busy",
    )
