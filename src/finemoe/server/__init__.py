"""The server: OpenAI's API over the engine, and the page on which one sees the experts work."""

from __future__ import annotations

from importlib.util import find_spec

from finemoe.core.errors import ConfigError

_PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


def require() -> None:
    """Whether the packages of the extra are installed.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs the packages {', '.join(missing)}: pip install 'finemoe[serve]'")
