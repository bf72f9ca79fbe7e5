"""What travels between a trainer and a server that answers for it: requests over HTTP, and answers read as data.

An answer is read as vLLM, SGLang and `finemoe serve` write it: `token_ids` and `prompt_token_ids` of a choice,
`logprobs.token_logprobs`, and the experts as base64: of an .npy file (vLLM, finemoe: `routed_experts` of a choice) or
of bare int32 (SGLang: `routed_experts` of `sglext`). Nothing is ever read as text.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final
from urllib.parse import urlsplit

import numpy as np
import torch

from finemoe.core.errors import ConfigError, OutageError
from finemoe.core.logs import logger
from finemoe.generation.sequence import FinishReason
from finemoe.methods.grpo.rollout import Drawn, Routes
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LATER = (429, 502, 503, 504)
"""Statuses that may pass."""
_FIRST_WAIT, _LONGEST_WAIT, _LOOK = 0.2, 30.0, 0.1
_MAGIC = b"\x93NUMPY"
_ENDS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}


class LostError(Exception):
    """No answer now, and perhaps one later. It never leaves the package."""

    def __init__(self, reason: str, wait: float = 0.0, *, forgot: bool = False) -> None:
        """`wait`: seconds that the server asks for; `forgot`: it may have lost the weights that it was given."""
        super().__init__(reason)
        self.wait, self.forgot = wait, forgot


@final
class Patience:
    """How long somebody who is lost is asked again."""

    def __init__(self, seconds: float, ended: Callable[[], bool]) -> None:
        """`seconds`: from the first loss on, as long as nothing comes; `ended`: a person wants no more waiting."""
        self._seconds, self._ended, self._wait = seconds, ended, _FIRST_WAIT
        self._since: float | None = None

    def after(self, lost: LostError) -> None:
        """Wait, ever longer.

        Raises:
            OutageError: it has been long enough, or a person wants no more of it.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
            logger.warning("%s: it is asked again for up to %g s", lost, self._seconds)
        left = self._since + self._seconds - now
        if left <= 0:
            raise OutageError(f"{lost}; it was asked again for {self._seconds:g} s (method.server.patience_seconds)")
        until = now + min(max(self._wait, lost.wait), left)
        while (rest := until - time.monotonic()) > 0 and not self._ended():
            time.sleep(min(rest, _LOOK))  # in pieces: a signal sets a flag and wakes nobody
        if self._ended():
            raise OutageError(f"{lost}; it is not asked again, since the run was asked to end")
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def rewarded(self) -> None:
        """Something came: from now on it is asked as long again."""
        self._since, self._wait = None, _FIRST_WAIT


class _Stay(urllib.request.HTTPRedirectHandler):
    """Where a server sends a client elsewhere, the key would go there too."""

    def redirect_request(self, *given: Any) -> None:
        return None


@final
class Client:
    """JSON to and from one server."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        """`timeout`: seconds of one request."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._timeout = key, timeout
        here = urlsplit(self.url).hostname in _LOOPBACK
        self._opener = urllib.request.build_opener(_Stay(), *([urllib.request.ProxyHandler({})] if here else []))

    def get(self, path: str) -> dict[str, Any]:
        """What lies at `path`.

        Raises:
            LostError: it cannot be reached, or is busy.
            ConfigError: it refuses, or says what is no JSON object.
        """
        return self._ask(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What it answers to `body`.

        Raises:
            LostError, ConfigError: as in `get`.
        """
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            with self._opener.open(
                urllib.request.Request(self.url + path, body, headers), timeout=self._timeout
            ) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(path, error) from error
        except (OSError, http.client.HTTPException) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            raise LostError(f"{self.url} does not answer: {str(why) or type(why).__name__}", forgot=True) from error
        try:
            found = json.loads(said)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ConfigError(
                f"{self.url}{path} does not answer with a JSON object: is it an OpenAI-compatible server?"
            )
        return found

    def _refused(self, path: str, error: urllib.error.HTTPError) -> Exception:
        try:
            said = _message(json.loads(error.read()))
        except (OSError, ValueError, RecursionError, http.client.HTTPException):
            said = None
        text = f"{self.url}{path} says {error.code}{f': {said}' if said else ''}"
        if error.code not in _LATER:
            return ConfigError(text)
        after = error.headers.get("retry-after", "")
        return LostError(text, min(float(after), _LONGEST_WAIT) if after.isdigit() and len(after) < 9 else 0.0)


def _message(body: Any) -> str | None:
    """What went wrong, as OpenAI, FastAPI and SGLang say it."""
    for place in (("error", "message"), ("message",), ("detail",)):
        found = body
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str):
            return found[:500]
    return None


@dataclass(frozen=True)
class Reading:
    """What answers must have to be learnt."""

    server: str
    """Named in errors."""
    config: ModelConfig
    """Of the policy."""
    ids: int
    """That the tokenizer has."""
    stop_ids: frozenset[int]
    """One of which ends an answer that ended by itself."""

    def choice(self, body: Mapping[str, Any], choice: Any, prompt: Sequence[int], room: int) -> Drawn:
        """A choice of an answer to `prompt` that had `room` for so many tokens.

        Raises:
            ConfigError: something is missing, or cannot be of the policy.
        """
        if not isinstance(choice, dict):
            raise self._unfit("has choices that are no objects")
        ids = self._ids(choice, "token_ids", "its tokens")
        asked = self._ids({**body, **choice}, "prompt_token_ids", "the prompt")
        if asked != tuple(prompt):
            raise self._unfit("read other ids than it was asked: it adds or changes tokens of the prompt")
        if (outside := max(ids, default=0)) >= self.ids:
            raise self._unfit(
                f"wrote token id {outside}, and the model's tokenizer has {self.ids:,}: it serves another"
            )
        reason = _ENDS.get(choice.get("finish_reason") or "")
        if reason is None or not ids:
            raise self._unfit(f"ended an answer of {len(ids)} tokens for the reason {choice.get('finish_reason')!r}")
        if reason == "stop" and ids[-1] not in self.stop_ids:
            raise self._unfit(f"ended an answer at token {ids[-1]}, at which the model's own tokenizer does not stop")
        if reason == "length" and len(ids) < room:
            raise self._unfit(
                f"cut an answer after {len(ids)} of method.answer_tokens {room}: it has a limit of its own, such as "
                "max_seconds of `finemoe serve`"
            )
        return Drawn(
            tuple(prompt), ids, self._logprobs(choice, len(ids)), reason, self._routes(body, choice, ids, prompt)
        )

    def _ids(self, choice: Mapping[str, Any], name: str, of: str) -> tuple[int, ...]:
        found = choice.get(name)
        if not isinstance(found, list) or not all(type(one) is int and one >= 0 for one in found):
            raise self._unfit(
                f"gives no ids of {of} ({name}): what is learnt is ids and never text, so it must know return_token_ids"
            )
        return tuple(found)

    def _logprobs(self, choice: Mapping[str, Any], count: int) -> tuple[float, ...]:
        table = choice.get("logprobs")
        found = table.get("token_logprobs") if isinstance(table, dict) else None
        if not isinstance(found, list) or not all(type(one) in (int, float) and math.isfinite(one) for one in found):
            raise self._unfit("gives no log-probabilities of the tokens (logprobs.token_logprobs)")
        if len(found) != count:
            raise self._unfit(f"gives {len(found)} log-probabilities of {count} tokens")
        return tuple(map(float, found))

    # ---- experts ----------------------------------------------------------------------------------------------------

    def _routes(
        self, body: Mapping[str, Any], choice: Mapping[str, Any], ids: Sequence[int], prompt: Sequence[int]
    ) -> Routes:
        if not self.config.moe_layers:
            return {}
        text = _routed(choice) or _routed(body)
        if text is None:
            raise self._unfit(
                "gives no routed experts, by which a mixture's answers are learnt or compared: start it with "
                "--enable-return-routed-experts (vLLM, SGLang)"
            )
        table = self._table(text, len(prompt) + len(ids) - 1)
        found = {}
        for place, layer in enumerate(self.config.moe_layers):
            feed = self.config.blocks[layer].feed_forward
            assert isinstance(feed, MoEConfig)  # as `moe_layers` says
            own = table[:, place if table.shape[1] == len(self.config.moe_layers) else layer, : feed.experts_per_token]
            if own.shape[1] < feed.experts_per_token or own.min() < 0 or own.max() >= feed.num_routed_experts:
                raise self._unfit(
                    f"gives routed experts that are none of layer {layer}, which takes {feed.experts_per_token} of "
                    f"{feed.num_routed_experts} for every token, the prompt's included"
                )
            found[layer] = torch.from_numpy(own.astype(np.int16))
        return found

    def _table(self, text: str, rows: int) -> np.ndarray:
        """[tokens, layers, k] integers: all layers, or those with experts."""
        layers = (len(self.config.moe_layers), len(self.config.blocks))
        try:
            raw = base64.b64decode(text, validate=True)
            if raw.startswith(_MAGIC):
                table = np.load(io.BytesIO(raw), allow_pickle=False)
            else:
                table = np.frombuffer(raw, dtype="<i4").reshape(rows, -1, self._most)
        except (binascii.Error, ValueError, EOFError, OSError, SyntaxError) as error:
            raise self._unfit(f"gives routed experts that cannot be read: {error}") from error
        if table.ndim != 3 or table.shape[0] != rows or table.shape[1] not in layers or table.dtype.kind not in "iu":
            raise self._unfit(
                f"gives routed experts of shape {list(table.shape)}, and {rows} tokens were read by {layers[0]} layers "
                "with experts"
            )
        return table

    @property
    def _most(self) -> int:
        """Experts of a token, in the layer that has most."""
        feeds = [block.feed_forward for block in self.config.blocks]
        return max(one.experts_per_token for one in feeds if isinstance(one, MoEConfig))

    def _unfit(self, what: str) -> ConfigError:
        return ConfigError(f"method.server.url {self.server}: the server {what}")


def _routed(found: Mapping[str, Any]) -> str | None:
    for place in (found, found.get("sglext"), found.get("sgl_ext")):
        if isinstance(place, dict) and isinstance(place.get("routed_experts"), str):
            return str(place["routed_experts"])
    return None
