"""Answers of a server elsewhere: asked in parallel, looked at before anything is trained, told of every new policy."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, final

from torch import Tensor

from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.core.errors import ConfigError, OutageError
from finemoe.core.seeds import derive
from finemoe.generation.config import SamplingConfig
from finemoe.methods.grpo.config import GRPOConfig, ServerConfig
from finemoe.methods.grpo.rollout import Drawn
from finemoe.methods.grpo.source import Asked
from finemoe.methods.grpo.wire import Client, LostError, Patience, Reading
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer

FOLDER = "served"
"""Of the run's folder: the policy, for the server to load."""
_RENEW = "/update_weights_from_disk"
_CHOICES = 16
"""[answers] Of one request, at most: what `finemoe serve` takes."""
_PROBED = 16
"""[tokens] Of the answer that is looked at first."""
_LOADS = (
    'method.server.weights "update" needs a server that loads weights from a path of this machine, such as `finemoe '
    'serve MODEL --weights-below {}`, or SGLang; "fixed" needs none'
)
_LOOK, _GRACE = 0.1, 5.0
"""[s] Between looks whether a person asked the run to end; how long the next answer is then waited for."""
T = TypeVar("T")


@dataclass(frozen=True)
class _Part:
    """A request: some of the answers to a prompt."""

    ids: tuple[int, ...]
    streams: range


def _parts(asked: Asked) -> Iterator[_Part]:
    """Requests for all answers, in order."""
    begin = 0
    for place in range(1, len(asked.streams) + 1):
        follows = place < len(asked.streams) and asked.streams[place] == asked.streams[place - 1] + 1
        if not follows or place - begin == _CHOICES:
            yield _Part(asked.ids, range(asked.streams[begin], asked.streams[place - 1] + 1))
            begin = place


def _key(name: str | None) -> str | None:
    """The key in the environment variable `name`, without the line end of a file that it was read from.

    Raises:
        ConfigError: there is none, or it cannot be one; it is not shown.
    """
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(f"method.server.api_key_env: the environment has no {name}; set it to the key")
    if not key.isprintable() or any(ord(sign) > 255 for sign in key):
        raise ConfigError(
            f"method.server.api_key_env: {name} holds no key: set it to one line of letters, digits and signs"
        )
    return key


def _abreast(work: Callable[[int], T], numbers: Sequence[int], at_once: int, ended: Callable[[], bool]) -> dict[int, T]:
    """What `work` gives of each number, `at_once` at a time.

    Its threads end with the process, where those of an executor are waited for: who ends a run by Ctrl-C is not kept by
    a server that does not answer. Whatever `work` raises is raised, and the rest is not begun.

    Raises:
        OutageError: a person asked the run to end, and for a while nothing came.
    """
    waiting, done = deque(numbers), SimpleQueue[tuple[int, T] | Exception]()

    def run() -> None:
        while True:
            try:
                number = waiting.popleft()
            except IndexError:
                return
            try:
                done.put((number, work(number)))
            except Exception as error:
                done.put(error)

    for _ in range(min(at_once, len(numbers))):
        threading.Thread(target=run, name="asking", daemon=True).start()
    found: dict[int, T] = {}
    try:
        came = time.monotonic()
        while len(found) < len(numbers):
            try:
                outcome = done.get(timeout=_LOOK)
            except Empty:
                if ended() and time.monotonic() - came > _GRACE:
                    raise OutageError("the server is waited for no longer, since the run was asked to end") from None
                continue
            came = time.monotonic()
            if isinstance(outcome, Exception):
                raise outcome
            found[outcome[0]] = outcome[1]
    finally:
        waiting.clear()
    return found


@final
@dataclass(eq=False)
class FromServer:
    """`Source`: an OpenAI-compatible server."""

    config: GRPOConfig
    model: Transformer
    """The policy."""
    tokenizer: Tokenizer
    says: Callable[[Sequence[Drawn]], list[Tensor]]
    """[completion] of each answer: log-probabilities of the policy as it is now."""
    directory: Path
    """Of the run."""
    first: Asked
    """What the server is asked before all else, once."""
    sampling: SamplingConfig
    length: int
    """[tokens] Longest prompt with its answer."""
    compares: bool
    """The server has, or is given, the policy of now, when it is first asked."""
    ended: Callable[[], bool] = lambda: False
    """A person asked the run to end: a server that does not answer is waited for no longer."""
    _client: Client = field(init=False)
    _reading: Reading = field(init=False)
    _name: str | None = field(init=False, default=None)
    _ours: bool = field(init=False, default=False)
    _given: Path | None = field(init=False, default=None)
    """The policy that it was told to load."""
    _version: str | None = field(init=False, default=None)
    """What that is called."""
    _compared: bool = field(init=False, default=False)
    _number: int = field(init=False, default=0)
    """Of the rollout that was begun last."""

    def __post_init__(self) -> None:
        """Nothing is asked yet.

        Raises:
            ConfigError: there is no key, or one that no header can carry.
        """
        own = self._own
        self._client = Client(own.url, _key(own.api_key_env), own.timeout_seconds)
        stops = frozenset(self.tokenizer.stop_ids) | {self.tokenizer.end_of_text_id}
        self._reading = Reading(own.url, self.model.config, self.tokenizer.vocab_size, stops)

    @property
    def _own(self) -> ServerConfig:
        assert self.config.server is not None  # else there would be no such source
        return self.config.server

    # ---- before anything is trained ---------------------------------------------------------------------------------

    def probe(self) -> None:
        """Ask for one answer, and look whether it can be learnt.

        Raises:
            ConfigError: names what the server does not give, or what does not fit.
            OutageError: it does not answer.
        """
        found = self._patiently(lambda: self._client.get("/v1/models"))
        cards = [one for one in found.get("data") or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
        names = [card["id"] for card in cards]
        if self._own.model is None and len(names) != 1:
            said = f"has {', '.join(names)}" if names else "names no model"
            raise ConfigError(f"method.server.url {self._own.url}: the server {said}: say which in method.server.model")
        self._name = self._own.model or names[0]
        self._ours = any(card["id"] == self._name and card.get("owned_by") == "finemoe" for card in cards)
        part, sampling = _Part(self.first.ids, range(self.first.streams[0], self.first.streams[0] + 1)), self._short()
        self._patiently(lambda: self._answers(part, sampling))

    def _short(self) -> SamplingConfig:
        """As in the run, and not as long."""
        room = min(_PROBED, self.sampling.max_new_tokens)
        return self.sampling.model_copy(update={"max_new_tokens": room})

    def _compare(self) -> None:
        """Look whether the server has the weights that it should have.

        Raises:
            ConfigError: its log-probabilities are not ours.
        """
        sampling = self._short()
        ((drawn,),) = self._drawn([Asked(self.first.ids, self.first.streams[:1])], sampling)
        (own,) = self.says([drawn])
        apart = sum(abs(a - b) for a, b in zip(own.tolist(), drawn.logprobs, strict=True)) / len(drawn.logprobs)
        if apart > self._own.bound:
            hint = (
                f"; with method.temperature {self.sampling.temperature:g} it must say them at that temperature (vLLM: "
                "--logprobs-mode processed_logprobs)"
                if self.sampling.temperature != 1 and not self._ours
                else ""
            )
            raise ConfigError(
                f"method.server.url {self._own.url}: the server's log-probabilities are {apart:.3g} nats from the "
                f"model's on the mean of {len(drawn.logprobs)} tokens, and method.server.bound is "
                f"{self._own.bound:g}: it has other weights, or computes otherwise{hint}"
            )
        self._compared = True

    # ---- the policy -------------------------------------------------------------------------------------------------

    def renew(self, number: int) -> None:
        """Write the policy and have the server load it, where it follows; compare it, once.

        Raises:
            ConfigError: the server cannot, or then has other weights.
            OutageError: it does not answer, or it is no longer the first rollout.
            RunError: the disk is full.
        """
        self._number = number
        with self._in_time():
            if self._name is None:
                self.probe()
            if self._own.weights == "update":
                path = self._written(number)
                self._version = f"{number}-{secrets.token_hex(4)}"
                self._patiently(lambda: self._give(path))
                self._given = path
            if self.compares and not self._compared:
                self._compare()

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """What goes wrong before the first step is refused; later, what was trained is to be saved."""
        try:
            yield
        except ConfigError as error:
            if self._number:
                raise OutageError(str(error)) from error
            raise

    def _written(self, number: int) -> Path:
        """The policy as it is now, in a folder of the run."""
        folder = self.directory / FOLDER
        if self._given is None:  # whatever an earlier process left
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder / f"step-{number:08d}", ignore_errors=True)
        length = {"sequence_length": self.length}  # which Hugging Face's config.json must say
        config = json.dumps({"model": self.model.config.model_dump(mode="json"), "data": length})
        path = save(folder, number, RunState(self.model.state_dict(), {}, {"step": number}, config), keep=1)
        if self._own.form == "huggingface":
            for old in folder.glob("huggingface-*"):
                shutil.rmtree(old)
            path = export_hf(path, folder / f"huggingface-{number:08d}", dtype="fp32", quiet=True).path
        return path.resolve()

    def _give(self, path: Path) -> None:
        """Have the server load what lies at `path`.

        Raises:
            LostError: not now.
            ConfigError: it cannot.
        """
        body = {"model_path": str(path)}
        if self._ours:
            body |= {"model": str(self._name), "weight_version": str(self._version)}
        try:
            said = self._client.post(_RENEW, body)
        except ConfigError as error:
            raise ConfigError(f"{error}; {_LOADS.format(self.directory)}") from error
        if said.get("success") is not True:
            raise ConfigError(f"{self._own.url}{_RENEW} failed: {said.get('message')}; {_LOADS.format(self.directory)}")

    # ---- answers ----------------------------------------------------------------------------------------------------

    def __call__(self, asked: Sequence[Asked], sampling: SamplingConfig) -> list[list[Drawn]]:
        """As in `Source`. Where all depends on weights and seeds, as with `finemoe serve`, what is drawn does too.

        Raises:
            ConfigError: an answer cannot be learnt.
            OutageError: the server does not answer, or it is no longer the first rollout.
        """
        with self._in_time():
            return self._drawn(asked, sampling)

    def _drawn(self, asked: Sequence[Asked], sampling: SamplingConfig) -> list[list[Drawn]]:
        """Asked in rounds: what is lost in one is asked again in the next."""
        places = [(place, part) for place, one in enumerate(asked) for part in _parts(one)]
        found: dict[int, list[Drawn]] = {}
        patience = Patience(self._own.patience_seconds, self.ended)
        while left := [number for number in range(len(places)) if number not in found]:
            at_once = self._own.at_once
            outcomes = _abreast(lambda number: self._tried(places[number][1], sampling), left, at_once, self.ended)
            lost: list[LostError] = []
            for number in left:
                outcome = outcomes[number]
                if isinstance(outcome, LostError):
                    lost.append(outcome)
                else:
                    found[number] = outcome
            if len(lost) < len(left):
                patience.rewarded()
            if lost:
                self._mend(lost, patience)
        answers: list[list[Drawn]] = [[] for _ in asked]
        for number, (place, _) in enumerate(places):
            answers[place] += found[number]
        return answers

    def _mend(self, lost: Sequence[LostError], patience: Patience) -> None:
        """Wait; a server that may have begun anew has the weights that it began with."""
        patience.after(max(lost, key=lambda one: one.wait))
        while self._given is not None and any(one.forgot for one in lost):
            try:
                self._give(self._given)
                return
            except LostError as again:
                patience.after(again)

    def _tried(self, part: _Part, sampling: SamplingConfig) -> list[Drawn] | LostError:
        try:
            return self._answers(part, sampling)
        except LostError as lost:
            return lost

    def _answers(self, part: _Part, sampling: SamplingConfig) -> list[Drawn]:
        """The answers of one request.

        Raises:
            LostError: not now.
            ConfigError: they cannot be learnt.
        """
        body: dict[str, Any] = {
            "model": self._name, "prompt": list(part.ids), "n": len(part.streams), "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens, "return_token_ids": True,
            "return_routed_experts": bool(self.model.config.moe_layers),
        }  # fmt: skip
        if self._ours:  # the very draws of the engine of this process
            own = {"seed": str(sampling.seed), "first": part.streams[0]}
            body |= {"logprobs": 0, "finemoe": {**own, "tempered_logprobs": sampling.tempered_logprobs}}
        else:  # what a model's generation_config.json may say otherwise, and seeds that are no other request's
            seed = derive(sampling.seed, "request", part.streams[0], *part.ids) % (1 << 31)
            whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            body |= {"seed": seed, "logprobs": 1, **whole}
        said = self._client.post("/v1/completions", body)
        facts = said.get("finemoe")
        version = facts.get("weight_version") if isinstance(facts, dict) else None
        if self._ours and self._given is not None and version != self._version:
            raise LostError(f"{self._own.url} has other weights than it was given", forgot=True)
        choices = said.get("choices")
        if not isinstance(choices, list) or len(choices) != len(part.streams):
            raise ConfigError(f"method.server.url {self._own.url}: it was asked for n = {len(part.streams)} answers")
        ordered = sorted(choices, key=lambda one: one.get("index") or 0 if isinstance(one, dict) else 0)
        return [self._reading.choice(said, one, part.ids, sampling.max_new_tokens) for one in ordered]

    def _patiently(self, work: Callable[[], T]) -> T:
        """What `work` gives, sooner or later.

        Raises:
            OutageError: it does not.
        """
        patience = Patience(self._own.patience_seconds, self.ended)
        while True:
            try:
                return _abreast(lambda _: work(), [0], 1, self.ended)[0]
            except LostError as lost:
                patience.after(lost)
