"""Refusals in OpenAI's shape: a status, and a sentence that says what was wrong and what helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def explain(details: Sequence[Mapping[str, Any]]) -> ApiError:
    """pydantic's refusals in one sentence, with the first field."""
    said, param = [], None
    for detail in details[:3]:
        unknown = detail["type"] == "extra_forbidden"  # the client's own name, whatever it looks like
        parts = [str(part) for part in detail["loc"] if part != "body"]
        where = ".".join(part for part in parts if unknown or "[" not in part)  # pydantic's names of kinds
        if unknown:
            said.append(f"{where} is not supported by this server: leave it out")
        elif detail["type"] == "json_invalid":
            return ApiError(400, f"the request is no JSON: {detail['ctx']['error']}")
        elif detail["type"] == "missing" and not where:
            said.append("the request has no body: send JSON")
        elif detail["type"] == "model_attributes_type" and not where:
            said.append("the request is no JSON object: send one, with the header Content-Type: application/json")
        elif detail["type"] == "none_required":
            said.append(f"{where} is not supported by this server: leave it out")
        else:
            said.append(f"{where or 'the request'}: {detail['msg'].removeprefix('Value error, ')}")
        param = param or where or None
    more = f", and {len(details) - 3} more" if len(details) > 3 else ""
    return ApiError(400, "; ".join(said) + more, param=param)
