"""Other weights for a model that is served: from one folder alone, for the very model, between requests."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from finemoe.checkpoint.open import read_model_config
from finemoe.core.errors import ConfigError
from finemoe.model.size import measure
from finemoe.server.models import Models, Options
from finemoe.server.run import serve
from finemoe.server.worker import StoppedError
from finemoe.text import Tokenizer
from server.conftest import Live
from server.talkers import write_run

CACHE = 1 << 20
PATH = "/update_weights_from_disk"
PROMPT = [40 + place for place in range(40)]  # of more than a block, so that it is found again


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another with its weights drawn otherwise, and what is no such model."""
    folder = tmp_path_factory.mktemp("renewed")
    write_run(folder / "own", chat=False, seed=2)
    write_run(folder / "below" / "other", chat=False, seed=3)
    write_run(folder / "below" / "wider", chat=False, hidden_size=48)
    Tokenizer.train(["xyz abc"] * 9, vocab_size=300).save(
        write_run(folder / "below" / "spelt", chat=False) / "tokenizer.json"
    )
    for file in (write_run(folder / "below" / "damaged", chat=False) / "checkpoints").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    (folder / "below" / "link").symlink_to(folder / "own")
    return folder


def said(live: Live, name: str = "m") -> Any:
    asked = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 0}
    answer = live.post("/v1/completions", model=name, **asked).json()
    return answer["choices"][0]["logprobs"]["token_logprobs"], answer["finemoe"]["weight_version"]


def test_nobody_may_unless_it_was_said_at_the_start(start: Callable[..., Live], folder: Path) -> None:
    live = start({"m": folder / "own"}, Options(cache_bytes=CACHE))
    refused = live.post(PATH, model_path=str(folder / "below" / "other"))
    assert refused.status_code == 403
    assert "--weights-below" in refused.json()["error"]["message"]
    assert said(live)[1] == "default"


REFUSED = {
    "elsewhere": ("{folder}/own", "must lie below"),
    "up and down": ("../own", "must lie below"),
    "a link": ("link", "must lie below"),
    "the folder itself": ("{folder}/below", "must lie below"),
    "not there, elsewhere": ("/no/such/thing", "must lie below"),
    "no name": ("a\\0b", "must lie below"),
    "nothing": ("nothing", "there is nothing here"),
    "another architecture": ("wider", "another architecture"),
    "another tokenizer": ("spelt", "another tokenizer"),
    "damaged": ("damaged", "damaged"),
}


def test_what_may_not_be_or_does_not_fit_is_refused(start: Callable[..., Live], folder: Path) -> None:
    live = start({"m": folder / "own"}, Options(cache_bytes=CACHE, weights_below=folder / "below"))
    said(live)  # from here on the prompt is in the cache, where it may round differently than when it is read
    before = said(live)
    for asked, why in REFUSED.values():
        refused = live.post(PATH, model_path=asked.format(folder=folder).replace("\\0", "\0"))
        assert refused.status_code == 400, asked
        assert why in refused.json()["error"]["message"], asked
    assert live.post(PATH, model_path="other", model="n").status_code == 404
    assert said(live) == before


def test_what_was_read_before_is_forgotten(start: Callable[..., Live], folder: Path) -> None:
    live = start({"m": folder / "own"}, Options(cache_bytes=CACHE, weights_below=folder / "below"))
    fresh = start({"m": folder / "below" / "other"}, Options(cache_bytes=CACHE))
    before, expected = said(live)[0], said(fresh)[0]
    assert before != pytest.approx(expected, abs=1e-3)
    done = live.post(PATH, model_path="other")
    assert done.json()["success"] is True
    assert said(live) == (pytest.approx(expected, abs=1e-5), "other")
    again = live.post(PATH, model_path=str(folder / "below" / "other"), weight_version="step 7").json()
    assert again["weight_version"] == "step 7"
    assert said(live)[1] == "step 7"


def test_requests_in_flight_end_with_the_old_and_later_ones_have_the_new(
    start: Callable[..., Live], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"m": folder / "own", "n": folder / "own"}
    live = start(sources, Options(cache_bytes=CACHE, weights_below=folder / "below"), load=False)
    fresh = start({"m": folder / "below" / "other"}, Options(cache_bytes=CACHE))
    old, new = said(live)[0], said(fresh)[0]
    engine, passes, go = live.engine("m"), [0], threading.Event()
    ordinary = engine.step

    def step() -> Any:
        passes[0] += 1
        if passes[0] == 3:  # in the middle of the first answer
            assert go.wait(30)
        return ordinary()

    monkeypatch.setattr(engine, "step", step)
    found: dict[str, Any] = {}
    body = {"model_path": "other", "model": "m"}

    def keep(name: str, work: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.update({name: work()}))
        thread.start()
        return thread

    threads = [keep("first", lambda: said(live))]
    while passes[0] < 3:
        time.sleep(0.01)
    threads.append(keep("renewed", lambda: httpx.post(live.address + PATH, json=body, timeout=60).status_code))
    models = live.app.state.server.models
    while models.open:
        time.sleep(0.01)
    threads.append(keep("later", lambda: said(live)))
    time.sleep(0.1)
    assert said(live, "n")[1] == "default", "another model is opened meanwhile"
    assert not found
    go.set()
    for thread in threads:
        thread.join(60)
    assert found["first"] == (pytest.approx(old, abs=1e-5), "default")
    assert found["later"] == (pytest.approx(new, abs=1e-5), "other")
    assert found["renewed"] == 200


def test_a_model_that_was_closed_is_opened_with_what_it_had_last(start: Callable[..., Live], folder: Path) -> None:
    sources = {"a": folder / "own", "b": folder / "own"}
    one = 4 * measure(read_model_config(sources["a"]), 1).total_parameters
    memory = int(1.9 * (one + CACHE))
    live = start(sources, Options(cache_bytes=CACHE, memory=memory, weights_below=folder), load=False)
    assert live.post(PATH, model_path="below/other").json()["error"]["message"].startswith("which model?")
    for name in ("step-1", "step-2"):
        shutil.copytree(folder / "below" / "other", folder / "below" / name)
    assert live.post(PATH, model_path="below/step-1", model="a").status_code == 200
    new = said(live, "a")
    old = said(live, "b")
    assert [one.name for one in live.app.state.server.models.open] == ["b"]
    assert said(live, "a") == (pytest.approx(new[0], abs=1e-5), "step-1")
    assert old[0] != pytest.approx(new[0], abs=1e-3)
    said(live, "b")
    shutil.rmtree(folder / "below" / "step-1")  # as a trainer does that has written the next
    assert live.post(PATH, model_path="below/step-2", model="a").status_code == 200
    assert said(live, "a") == (pytest.approx(new[0], abs=1e-5), "step-2")
    said(live, "b")
    shutil.rmtree(folder / "below" / "step-2")
    assert said(live, "a") == (pytest.approx(old[0], abs=1e-5), "default"), "a trainer sees it, and gives them again"


def test_closing_ends_a_model_that_is_given_new_weights(folder: Path) -> None:
    """Else its thread, and what waits for it, would be left when a server stops in the middle of a renewal."""

    async def stopped() -> None:
        models = Models({"m": folder / "own"}, Options(cache_bytes=CACHE))
        served = await models.get("m")
        served.worker.open += 1  # somebody is answered, whose end the new weights wait for
        renewing = asyncio.create_task(models.renew("m", folder / "below" / "other", "other"))
        while models.open:
            await asyncio.sleep(0.01)
        await models.close()
        assert not served.worker._thread.is_alive()
        served.worker.open -= 1
        with pytest.raises(StoppedError):
            await renewing
        assert not models.open

    asyncio.run(stopped())


def test_a_folder_that_is_not_there_is_told_at_the_start(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--weights-below .*there is no such folder"):
        serve(str(folder / "own"), options=Options(weights_below=folder / "missing"), port=0)


def test_the_key_guards_it(start: Callable[..., Live], folder: Path) -> None:
    live = start({"m": folder / "own"}, Options(cache_bytes=CACHE, weights_below=folder), key="secret")
    assert live.post(PATH, model_path="below/other").status_code == 401
