"""What a server allows: sizes, numbers, times."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from finemoe.core.config import Config


class Limits(Config):
    """Bounds that keep one client from taking what belongs to all. Who goes beyond them is told which one it was."""

    max_waiting: NonNegativeInt = 64
    """[requests] Completions that may wait for their turn, beside those that run; beyond it the answer is 429."""
    max_running: PositiveInt = 32
    """[requests] Completions that a model writes at the same time."""
    max_body_bytes: PositiveInt = 4 << 20
    """[bytes] Of a request."""
    max_prompt_tokens: PositiveInt | None = None
    """[tokens] None: as long as the model was made or trained for."""
    max_new_tokens: PositiveInt = 4096
    """[tokens] Of a completion. More is refused; without `max_tokens` a chat answer may be as long as this."""
    max_choices: PositiveInt = 16
    """[completions] Of one request: its prompts times its n."""
    max_seconds: PositiveFloat = 600.0
    """[s] After which an answer ends where it is, with `finish_reason` "length"."""
    slow_seconds: PositiveFloat = 30.0
    """[s] A reader of a stream who takes nothing for so long is cut off."""
    drain_seconds: PositiveFloat = 30.0
    """[s] That answers have to end after SIGTERM."""
