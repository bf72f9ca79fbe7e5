"""What a trainer asks of /v1/completions: ids, and the experts of every token, as the engine has them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemoe.checkpoint.language_model import open_language_model
from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.generation.engine import engine_for
from finemoe.server.answers import packed
from server.conftest import Live

PROMPT = [40, 41, 42]
SEED = 9_000_000_000_000_000_001
ASKED: dict[str, Any] = {
    "model": "writer", "prompt": PROMPT, "max_tokens": 12, "n": 3, "return_token_ids": True,
    "return_routed_experts": True, "logprobs": 0, "finemoe": {"seed": str(SEED), "first": 5},
}  # fmt: skip


def unpacked(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def drawn(writer: Path, repetition: int, **more: Any) -> Any:
    opened = open_language_model(writer)
    engine: Engine = engine_for(opened, cache_bytes=1 << 20)
    own = SamplingConfig(seed=SEED, max_new_tokens=12, **more)
    engine.submit(Request(tuple(PROMPT), own, repetition, experts=True))
    *_, last = engine.events()
    return last.sequence


def test_ids_log_probabilities_and_experts_are_those_of_the_engine(live: Live, writer: Path) -> None:
    choices = live.post("/v1/completions", **ASKED).json()["choices"]
    for number, choice in enumerate(choices):
        own = drawn(writer, 5 + number)
        assert choice["prompt_token_ids"] == PROMPT
        assert choice["token_ids"] == own.completion
        values = np.array(choice["logprobs"]["token_logprobs"])
        assert values == pytest.approx(own.logprobs, abs=1e-5)
        assert (values == values.astype(np.float32)).all(), "all that float32 has"
        experts = unpacked(choice["routed_experts"])
        assert experts.dtype == np.int16
        assert experts.shape == (len(PROMPT) + len(own.completion) - 1, len(own.experts), 2)
        for place, layer in enumerate(sorted(own.experts)):
            assert experts[:, place].tolist() == own.experts[layer]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 3


def test_log_probabilities_at_the_temperature(live: Live, writer: Path) -> None:
    for tempered in (False, True):
        own = drawn(writer, 5, temperature=0.5, tempered_logprobs=tempered)
        fields = {**ASKED["finemoe"], "tempered_logprobs": tempered}
        (choice,) = live.post("/v1/completions", **{**ASKED, "n": 1, "temperature": 0.5, "finemoe": fields}).json()[
            "choices"
        ]
        assert choice["token_ids"] == own.completion
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(own.logprobs, abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"logprobs": None}, {"stop": "e"}])
def test_a_stream_has_the_same(live: Live, more: dict[str, Any]) -> None:
    whole = live.post("/v1/completions", **{**ASKED, **more}).json()["choices"]
    text = live.post("/v1/completions", **{**ASKED, **more, "stream": True}).text
    found: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            own = found.setdefault(choice["index"], {"token_ids": []})
            assert ("prompt_token_ids" in choice) == (not own["token_ids"])
            own["token_ids"] += choice["token_ids"]
            own |= {name: choice[name] for name in ("prompt_token_ids", "routed_experts") if name in choice}
    for choice in whole:
        names = ("token_ids", "prompt_token_ids", "routed_experts")
        assert found[choice["index"]] == {name: choice[name] for name in names}


def test_nobody_is_told_unasked(live: Live) -> None:
    asked = {name: value for name, value in ASKED.items() if not name.startswith("return")}
    (choice, *_) = live.post("/v1/completions", **asked).json()["choices"]
    assert not {"token_ids", "prompt_token_ids", "routed_experts"} & choice.keys()


def test_seeds_are_given_once(live: Live) -> None:
    refused = live.post("/v1/completions", **ASKED, seed=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "finemoe.seed"


def test_layers_that_choose_fewer_are_filled_up() -> None:
    table = unpacked(packed({1: [[3, 4, 5], [0, 1, 2]], 4: [[7], [6]]}))
    assert table.tolist() == [[[3, 4, 5], [7, -1, -1]], [[0, 1, 2], [6, -1, -1]]]
