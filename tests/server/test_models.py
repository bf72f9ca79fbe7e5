"""Several models: opened on demand, closed when memory is short; a broken pass ends what ran and nothing else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from finemoe.analysis.written import Cards
from finemoe.checkpoint.open import read_model_config
from finemoe.core.errors import ConfigError, FinemoeError
from finemoe.model.size import measure
from finemoe.server import asking, embeddings, models
from finemoe.server.models import Limits, Models, Options
from finemoe.server.run import named
from finemoe.server.worker import apart
from server.conftest import Live
from server.talkers import write_run

CACHE = 1 << 20


def test_names_come_from_paths_or_are_given(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert named([f"{tmp_path}/a", f"b={tmp_path}/a"]) == {"a": tmp_path / "a", "b": tmp_path / "a"}
    assert named([f"{tmp_path}/x/../a/"]) == {"a": Path(f"{tmp_path}/x/../a/")}
    assert named(["x/model.gguf"]) == {"model": Path("x/model.gguf")}
    with pytest.raises(ConfigError, match="two models are called a"):
        named([f"{tmp_path}/a", "elsewhere/a"])


def test_what_is_no_model_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FinemoeError, match="neither"):
        Models({"x": tmp_path}, Options())


def test_a_model_is_opened_in_a_thread_that_ends_with_it(
    start: Callable[..., Live], writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Helpers of another thread that computed would put those of the engine to sleep: a third of its tokens a second.
    opened: list[threading.Thread] = []
    ordinary = models.prepare

    def prepare(*given: Any) -> Any:
        opened.append(threading.current_thread())
        return ordinary(*given)

    monkeypatch.setattr(models, "prepare", prepare)
    live = start({"m": writer}, Options(cache_bytes=CACHE), load=False)
    assert live.post("/v1/completions", model="m", prompt="x", max_tokens=2).status_code == 200
    assert len(opened) == 1
    opened[0].join(5)
    assert not opened[0].is_alive()


def test_what_opening_raises_is_raised() -> None:
    with pytest.raises(FinemoeError, match="no model"):
        apart(lambda: (_ for _ in ()).throw(FinemoeError("no model")))
    assert apart(lambda: threading.current_thread().name) == "opening"


def test_models_are_opened_when_asked_for_and_the_least_used_goes(start: Callable[..., Live], tmp_path: Path) -> None:
    sources = {name: write_run(tmp_path / name, chat=False, seed=seed) for seed, name in enumerate("abc")}
    one = 4 * measure(read_model_config(sources["a"]), 1).total_parameters
    live = start(sources, Options(cache_bytes=CACHE, memory=int(2.9 * (one + CACHE))), load=False)

    def loaded() -> dict[str, bool]:
        return {card["id"]: card["finemoe"]["loaded"] for card in live.client.get("/v1/models").json()["data"]}

    ask = lambda name: live.post("/v1/completions", model=name, prompt="x", max_tokens=2, temperature=0)  # noqa: E731
    assert loaded() == {"a": False, "b": False, "c": False}
    first = ask("a").json()["choices"][0]["text"]
    assert ask("b").status_code == 200
    assert ask("a").status_code == 200
    assert loaded() == {"a": True, "b": True, "c": False}
    assert ask("c").status_code == 200
    assert loaded() == {"a": True, "b": False, "c": True}
    assert ask("b").status_code == 200
    assert ask("a").json()["choices"][0]["text"] == first


def test_a_model_that_broke_after_the_start_is_told_and_the_others_go_on(
    start: Callable[..., Live], writer: Path, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", chat=False)
    live = start({"writer": writer, "other": other}, Options(cache_bytes=CACHE), load=False)
    for path in (other / "checkpoints").rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    refused = live.post("/v1/completions", model="other", prompt="x")
    assert refused.status_code == 503
    assert "log" in refused.json()["error"]["message"]
    assert str(tmp_path) not in refused.text
    assert live.post("/v1/completions", model="writer", prompt="x", max_tokens=2).status_code == 200


def test_a_broken_pass_ends_what_ran_and_the_next_request_is_answered(
    start: Callable[..., Live], writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start({"writer": writer}, Options(cache_bytes=CACHE))
    engine, worker = live.engine("writer"), live.app.state.server.models.opened("writer").worker

    def broken() -> Any:
        if len(worker._jobs) < 2:  # both are to run
            return []
        raise RuntimeError("a defect with /a/path in it")

    monkeypatch.setattr(engine, "step", broken)
    answers: list[Any] = []
    ask = lambda **more: answers.append(  # noqa: E731
        live.post("/v1/completions", model="writer", prompt="x", max_tokens=4, **more)
    )
    threads = [threading.Thread(target=ask, kwargs={"stream": stream}) for stream in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by_status = {answer.status_code: answer.text for answer in answers}
    assert "something broke" in by_status[500]
    assert "something broke" in by_status[200].splitlines()[0]
    assert "/a/path" not in "".join(by_status.values())
    assert live.post("/v1/completions", model="writer", prompt="x", max_tokens=4).status_code == 200
    assert live.engine("writer") is not engine


def test_a_model_is_described(live: Live) -> None:
    card = live.client.get("/v1/models/talker").json()
    facts = card["finemoe"]
    assert (facts["chat"], facts["tools"], facts["reasoning"], facts["context"]) == (True, True, True, 256)
    assert facts["guesses"] == ["text", "module"]
    assert facts["layers"][0] == {"layer": 0, "kind": "dense"}
    assert facts["layers"][1] == {"layer": 1, "kind": "moe", "experts": 8, "active": 2, "shared": 1}
    assert not live.client.get("/v1/models/writer").json()["finemoe"]["chat"]
    assert live.client.get("/v1/models/none").status_code == 404
    assert live.client.get("/v1/models/writer/experts").status_code == 404


def test_cards_of_an_analysis_are_shown(start: Callable[..., Live], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chat=False)
    card = {
        "layer": 1, "expert": 3, "share": 0.2, "tokens": [{"text": "def"}, {"text": "␣x"}],
        "domains": [{"domain": "code", "lift": 2.0}, {"domain": "prose", "lift": 0.5}],
    }  # fmt: skip
    (run / "experts").mkdir()
    experts = read_model_config(run).blocks[1].feed_forward.num_routed_experts
    layers = [{"layer": layer, "experts": experts} for layer in read_model_config(run).moe_layers]
    report = {"kind": "experts", "model": {"source": "elsewhere/run"}, "layers": layers, "cards": [card]}
    live = start({"run": run}, Options(cache_bytes=CACHE))
    assert not live.client.get("/v1/models/run").json()["finemoe"]["cards"]
    refused = live.client.get("/v1/models/run/experts").json()["error"]["message"]
    assert "finemoe analyze experts run --out run/experts" in refused
    (run / "experts" / "results.json").write_text(json.dumps(report))  # while it is served
    assert live.client.get("/v1/models/run").json()["finemoe"]["cards"]
    found = live.client.get("/v1/models/run/experts").json()["experts"]["1"]["3"]
    assert found == {"title": "def ␣x", "domain": "code", "tokens": ["def", "␣x"], "share": 0.2}


def test_an_analysis_of_another_model_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", chat=False)
    config = read_model_config(run)
    experts = config.blocks[1].feed_forward.num_routed_experts
    layers = [{"layer": layer, "experts": experts} for layer in config.moe_layers]
    files = [tmp_path / "one.gguf", tmp_path / "other.gguf"]
    (tmp_path / "one-experts").mkdir()
    report = {"model": {"source": "one.gguf"}, "layers": layers, "cards": []}
    (tmp_path / "one-experts" / "results.json").write_text(json.dumps(report))
    assert [Cards(file, config).newest() is not None for file in files] == [True, False]
    assert Cards(files[0], config.model_copy(update={"blocks": config.blocks[:2]})).newest() is None
    (run / "experts").mkdir()
    for broken in ("{", "[]", json.dumps({**report, "layers": 3}), json.dumps({**report, "cards": None})):
        (run / "experts" / "results.json").write_text(broken)
        assert Cards(run, config).newest() is None
    (run / "experts" / "results.json").write_text(json.dumps(report))
    assert Cards(run, config).newest() == report


def test_names_are_parts_of_addresses() -> None:
    with pytest.raises(ConfigError, match="has no slash: org-m=x"):
        named(["org/m=x"])


def test_a_model_that_is_closed_while_a_prompt_is_read_is_told(
    start: Callable[..., Live], writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start({"writer": writer}, Options(cache_bytes=CACHE))
    worker = live.app.state.server.models.opened("writer").worker
    monkeypatch.setattr(worker, "_closing", True)  # as another request's model needs the room
    for path, asked in (("/v1/completions", {"prompt": "x"}), ("/v1/embeddings", {"input": "x"})):
        refused = live.post(path, model="writer", **asked)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
    monkeypatch.setattr(worker, "_closing", False)


def test_a_model_that_goes_while_a_prompt_is_read_is_opened_again(
    start: Callable[..., Live], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {name: write_run(tmp_path / name, chat=False) for name in "ab"}
    one = 4 * measure(read_model_config(sources["a"]), 1).total_parameters
    live = start(sources, Options(cache_bytes=CACHE, memory=int(1.9 * (one + CACHE))), load=False)
    ordinary, asked = asking.completion, []

    def completion(request: Any, *rest: Any) -> Any:
        asked.append(request.model)
        if asked == ["a"]:  # the other needs its room just now
            body = {"model": "b", "prompt": "x", "max_tokens": 2}
            assert httpx.post(f"{live.address}/v1/completions", json=body, timeout=60).status_code == 200
        return ordinary(request, *rest)

    monkeypatch.setattr(asking, "completion", completion)
    assert live.post("/v1/completions", model="a", prompt="x", max_tokens=2).status_code == 200
    assert asked == ["a", "b", "a"]


def test_an_engine_in_any_state_or_none_at_all_leaves_nobody_waiting(
    start: Callable[..., Live], writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start({"writer": writer}, Options(cache_bytes=CACHE))
    worker = live.app.state.server.models.opened("writer").worker

    def broken(*given: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(worker.engine, "step", broken)
    monkeypatch.setattr(worker.engine, "cancel", broken)
    monkeypatch.setattr(worker, "_make_engine", broken)
    assert live.post("/v1/completions", model="writer", prompt="x", max_tokens=4).status_code == 500
    worker._thread.join(10)
    assert not worker._thread.is_alive()
    again = httpx.post(f"{live.address}/v1/completions", json={"model": "writer", "prompt": "x", "max_tokens": 4})
    assert again.status_code == 200
    assert live.app.state.server.models.opened("writer").worker is not worker


def test_vectors_wait_in_the_same_bounds(
    start: Callable[..., Live], writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start({"writer": writer}, Options(limits=Limits(max_running=1, max_waiting=1), cache_bytes=CACHE))
    ordinary = embeddings._vector
    monkeypatch.setattr(embeddings, "_vector", lambda *given: time.sleep(0.3) or ordinary(*given))
    answers: list[int] = []
    body = {"model": "writer", "input": "x"}
    ask = lambda: answers.append(httpx.post(f"{live.address}/v1/embeddings", json=body, timeout=60).status_code)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {200, 429}
    live.wait_until_idle("writer")
    assert live.post("/v1/embeddings", model="writer", input="x").status_code == 200


def test_caches_count_too(start: Callable[..., Live], tmp_path: Path) -> None:
    sources = {name: write_run(tmp_path / name, chat=False) for name in "ab"}
    size = models.prepare("a", sources["a"], Options()).bytes
    together = Options(memory=int(1.5 * size))
    capped = models.prepare("a", sources["a"], together)
    assert capped.bytes <= size
    live = start(sources, Options(memory=int(1.9 * capped.bytes), cache_bytes=None), load=False)
    for name in "aba":
        assert live.post("/v1/completions", model=name, prompt="x", max_tokens=2).status_code == 200
        held = live.app.state.server.models.open
        assert sum(one.bytes for one in held) <= 1.9 * capped.bytes


def test_what_never_fits_is_told(start: Callable[..., Live], writer: Path) -> None:
    with pytest.raises(ConfigError, match="--memory allows 100,000: give more"):
        models.prepare_all({"writer": writer}, Options(cache_bytes=CACHE, memory=100_000))
    live = start({"writer": writer}, Options(cache_bytes=CACHE, memory=100_000), load=False)
    for _ in range(2):
        refused = live.post("/v1/completions", model="writer", prompt="x", max_tokens=2)
        assert refused.status_code == 503
        assert "larger than the memory" in refused.json()["error"]["message"]
