"""Answers of a server are those of the engine in process; one that cannot give them is refused at once."""

from __future__ import annotations

import base64
import io
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finemoe.checkpoint.open import load_model, load_tokenizer
from finemoe.core.errors import ConfigError, OutageError
from finemoe.generation.config import SamplingConfig
from finemoe.methods.grpo import served as served_module
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.rollout import Drawn
from finemoe.methods.grpo.scoring import Policies
from finemoe.methods.grpo.served import FromServer
from finemoe.methods.grpo.source import Asked, OwnEngine
from finemoe.server.models import Options
from methods.grpo.tiny_policy import base
from methods.grpo.tiny_servers import between, serving
from server.conftest import Live

SEED = 8_765_432_109_876_543_210
ROOM = 6
ASKED = [Asked((5, 6, 7), tuple(range(20, 40))), Asked((9, 10), (3, 4, 8))]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def live(start: Path) -> Iterator[Live]:
    with serving(start, start.parent) as server:
        yield server


def sampling(temperature: float = 1.0) -> SamplingConfig:
    return SamplingConfig(seed=SEED, temperature=temperature, max_new_tokens=ROOM, tempered_logprobs=temperature != 1)


def source(start: Path, folder: Path, address: str, temperature: float = 1.0, **more: Any) -> FromServer:
    """A source for the model at `start`, of a run in `folder`, as runs have it; `more`: keys of server, or method."""
    own = {name: more.pop(name) for name in ("replay", "importance_cap") if name in more}
    server = {"url": address, "patience_seconds": 1.0, **more}
    config = GRPOConfig.model_validate({"temperature": temperature, "server": server, **own})
    model, tokenizer = load_model(start), load_tokenizer(start)
    policies = Policies(config, model, str(start), nullcontext, tokenizer.vocab_size, begins=True)
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    first = Asked(ASKED[0].ids, (0,))
    return FromServer(config, model, tokenizer, policies.of_policy, folder, first, sampling(temperature), 32, True)


def same(found: Sequence[Sequence[Drawn]], expected: Sequence[Sequence[Drawn]]) -> None:
    for one, other in zip([a for group in found for a in group], [b for group in expected for b in group], strict=True):
        assert (one.prompt, one.completion, one.finish_reason) == (other.prompt, other.completion, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.routes.keys() == other.routes.keys()
        assert len(one.routes) > 0
        for layer, chosen in other.routes.items():
            assert one.routes[layer].dtype == chosen.dtype
            assert torch.equal(one.routes[layer], chosen)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_one_seed_the_answers_are_those_of_the_engine_in_process(
    live: Live, start: Path, tmp_path: Path, temperature: float
) -> None:
    served = source(start, tmp_path, live.address, temperature, importance_cap=2.0, weights="fixed")
    served.renew(0)
    own = OwnEngine(served.model, served.tokenizer, nullcontext)
    found, expected = served(ASKED, sampling(temperature)), own(ASKED, sampling(temperature))
    same(found, expected)
    assert len({one.completion for one in found[0]}) > 10


def unlike(model: torch.nn.Module) -> None:
    """Other weights, and not a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["finemoe", "huggingface"])
def test_the_server_follows_the_policy(start: Path, tmp_path: Path, form: str) -> None:
    with serving(start, tmp_path) as live:
        served = source(start, tmp_path / "run", f"{live.address}/v1/", form=form)
        served.renew(0)
        before = served(ASKED, sampling())
        unlike(served.model)
        served.renew(1)
        found = served(ASKED, sampling())
        own = OwnEngine(served.model, served.tokenizer, nullcontext)
        same(found, own(ASKED, sampling()))
        assert found[0][0].logprobs != before[0][0].logprobs
        assert len(list((tmp_path / "run" / "served").glob("step-*"))) == 1


def test_weights_that_were_lost_are_given_again(start: Path, tmp_path: Path) -> None:
    """A server that begins anew, as one that somebody else renews, has others than it was given."""
    with serving(start, tmp_path) as live, between(live.address) as gate:
        served = source(start, tmp_path / "run", gate.address)
        unlike(served.model)
        served.renew(4)
        other = source(start, tmp_path / "other", live.address)
        other.renew(0)
        found = served(ASKED, sampling())
        same(found, OwnEngine(served.model, served.tokenizer, nullcontext)(ASKED, sampling()))
        assert [path for path, _ in gate.asked].count("/update_weights_from_disk") == 2


def experts_of(choice: dict[str, Any]) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))


def in_choices(change: Callable[[dict[str, Any]], object]) -> Callable[[str, dict[str, Any]], Any]:
    def changed(path: str, answer: dict[str, Any]) -> Any:
        for choice in answer["choices"] if path == "/v1/completions" else ():
            change(choice)
        return answer

    return changed


def resaid(choice: dict[str, Any], table: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, table)
    choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()


REFUSED: dict[str, tuple[Callable[[str, dict[str, Any]], Any], str]] = {
    "no ids": (in_choices(lambda one: one.pop("token_ids")), "gives no ids of its tokens .token_ids."),
    "no ids of the prompt": (in_choices(lambda one: one.pop("prompt_token_ids")), "no ids of the prompt"),
    "another prompt": (in_choices(lambda one: one["prompt_token_ids"].insert(0, 1)), "adds or changes tokens"),
    "no logprobs": (in_choices(lambda one: one.update(logprobs=None)), "gives no log-probabilities"),
    "few logprobs": (in_choices(lambda one: one["logprobs"]["token_logprobs"].pop()), "log-probabilities of"),
    "no experts": (in_choices(lambda one: one.pop("routed_experts")), "gives no routed experts"),
    "unreadable experts": (in_choices(lambda one: one.update(routed_experts="????")), "cannot be read"),
    "experts of the answer alone": (in_choices(lambda one: resaid(one, experts_of(one)[3:])), "of shape"),
    "other layers": (in_choices(lambda one: resaid(one, experts_of(one).repeat(9, 1))), "of shape"),
    "unknown experts": (in_choices(lambda one: resaid(one, experts_of(one) * 0 - 1)), "are none of layer"),
    "other ids": (in_choices(lambda one: one["token_ids"].__setitem__(0, 9999)), "wrote token id 9999"),
    "another end": (
        in_choices(lambda one: one.update(finish_reason="stop", token_ids=[40] * len(one["token_ids"]))),
        "ended an answer at token 40",
    ),
    "a limit of its own": (in_choices(lambda one: one.update(token_ids=[40], finish_reason="length")), "cut an answer"),
    "another model": (
        in_choices(lambda one: one["logprobs"].update(token_logprobs=[-9.0] * len(one["token_ids"]))),
        "nats from the model's .* method.server.bound is 0.1",
    ),
    "fewer answers": (lambda path, one: {**one, "choices": []}, "n = 1 answers"),
    "no such path": (lambda path, one: 404 if "completions" in path else one, "completions says 404: so it is"),
    "no weights": (lambda path, one: 404 if "weights" in path else one, "--weights-below .*or SGLang"),
    "weights refused": (lambda path, one: {**one, "success": False} if "weights" in path else one, "from_disk failed"),
    "no list of models": (lambda path, one: {} if path == "/v1/models" else one, "names no model"),
    "no JSON object": (lambda path, one: [] if "completions" in path else one, "OpenAI-compatible"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_is_refused_before_anything_is_trained(
    start: Path, tmp_path: Path, live: Live, case: str
) -> None:
    change, said = REFUSED[case]
    with between(live.address, change) as gate:
        served = source(start, start.parent / f"run-{tmp_path.name}", gate.address, replay="rollout")
        with pytest.raises(ConfigError, match=said) as refused:
            served.renew(0)
        assert gate.address in str(refused.value)


def test_experts_are_needed_without_replay_too(start: Path, tmp_path: Path, live: Live) -> None:
    """How far they are from those of the learning is told of every step."""
    change, said = REFUSED["no experts"]
    with between(live.address, change) as gate:
        served = source(start, tmp_path, gate.address, weights="fixed", importance_cap=2.0)
        with pytest.raises(ConfigError, match=said):
            served.renew(0)


def test_experts_that_stay_away_later_are_missed(start: Path, tmp_path: Path, live: Live) -> None:
    with between(live.address) as gate:
        served = source(start, tmp_path, gate.address, weights="fixed", importance_cap=2.0)
        for number, error in ((0, ConfigError), (1, OutageError)):  # later, what was trained is to be saved
            gate.change = lambda path, answer: answer
            served.renew(number)
            gate.change = REFUSED["no experts"][0]
            with pytest.raises(error, match="gives no routed experts"):
                served(ASKED, sampling())


def test_answers_are_taken_by_their_numbers(start: Path, tmp_path: Path, live: Live) -> None:
    def turned(path: str, answer: dict[str, Any]) -> Any:
        return {**answer, "choices": answer["choices"][::-1]} if path == "/v1/completions" else answer

    with between(live.address, turned) as gate:
        served = source(start, tmp_path, gate.address, weights="fixed", importance_cap=2.0)
        served.renew(0)
        same(served(ASKED, sampling()), OwnEngine(served.model, served.tokenizer, nullcontext)(ASKED, sampling()))


def test_what_others_write_is_read_too(start: Path, tmp_path: Path, live: Live) -> None:
    """SGLang's bare int32 beside the choices, of all layers; and nothing is asked of them that only ours knows.

    Complaint 11 of post-training: the whole distribution is asked for, whatever a model's own settings say.
    """
    moe = load_model(start).config.moe_layers
    whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

    def asked(body: dict[str, Any]) -> dict[str, Any]:
        assert "finemoe" not in body
        assert {name: body[name] for name in whole} == whole
        assert 0 <= body["seed"] < 1 << 31
        return {name: value for name, value in body.items() if name not in whole}

    def changed(path: str, answer: dict[str, Any]) -> Any:
        if path == "/v1/models":
            answer["data"][0]["owned_by"] = "somebody"
        for choice in answer["choices"] if path == "/v1/completions" else ():
            table = experts_of(choice)
            every = np.zeros((len(table), len(load_model(start).config.blocks), table.shape[2]), dtype="<i4")
            every[:, list(moe)] = table
            del choice["routed_experts"]
            answer["sglext"] = {"routed_experts": base64.b64encode(every.tobytes()).decode()}
        return answer

    with between(live.address, changed) as gate:
        gate.alter = asked
        served = source(start, tmp_path, gate.address, weights="fixed", importance_cap=2.0, replay="rollout")
        served.renew(0)
        (found,) = served([Asked((5, 6, 7), (4,))], sampling())
        seeds = [body["seed"] for _, body in gate.asked]
        assert seeds[0] == seeds[1] != seeds[2], "equal for equal questions alone"
        own = OwnEngine(served.model, served.tokenizer, nullcontext)
        expected = own([Asked((5, 6, 7), (0,))], sampling().model_copy(update={"seed": seeds[-1]}))
        same([found], expected)


@pytest.mark.parametrize("status", [503, 429, None])
def test_what_may_pass_is_asked_again(start: Path, tmp_path: Path, live: Live, status: int | None) -> None:
    left = [3]

    def change(path: str, answer: Any) -> Any:
        left[0] -= 1
        return status if left[0] >= 0 else answer

    with between(live.address, change) as gate:
        served = source(start, tmp_path, gate.address, patience_seconds=60.0, weights="fixed", importance_cap=2.0)
        served.renew(0)
        assert left[0] < 0
        left[0] = 1
        same(served(ASKED, sampling()), OwnEngine(served.model, served.tokenizer, nullcontext)(ASKED, sampling()))
        assert len(gate.asked) == 2 + 2 + 2 + 1, "two looks, at most 16 consecutive answers a request, one again"


@pytest.mark.parametrize("status", [503, None])
def test_patience_ends(start: Path, tmp_path: Path, live: Live, status: int | None) -> None:
    with between(live.address) as gate:
        served = source(start, tmp_path, gate.address, patience_seconds=0.3, weights="fixed", importance_cap=2.0)
        served.renew(0)
        gate.change = lambda path, answer: status
        with pytest.raises(OutageError, match=r"again for 0.3 s .method.server.patience_seconds"):
            served(ASKED, sampling())


def test_who_is_not_there_is_named(start: Path, tmp_path: Path) -> None:
    served = source(start, tmp_path, "http://127.0.0.1:9", patience_seconds=0.0)
    with pytest.raises(OutageError, match=r"http://127\.0\.0\.1:9 does not answer"):
        served.probe()


def test_who_ends_a_run_is_not_kept_by_a_server_that_hangs(start: Path, tmp_path: Path, live: Live) -> None:
    going, main = threading.Event(), threading.main_thread().ident
    assert main is not None

    def hangs(path: str, answer: Any) -> Any:
        signal.pthread_kill(main, signal.SIGINT)
        going.wait(60)

    with between(live.address) as gate:
        served = source(start, tmp_path, gate.address, weights="fixed", importance_cap=2.0, at_once=1)
        served.renew(0)
        gate.change = hangs
        with pytest.raises(KeyboardInterrupt):
            served(ASKED, sampling())
        asking = [thread for thread in threading.enumerate() if thread.name.startswith("asking")]
        assert [thread.daemon for thread in asking] == [True], "others are waited for when the process ends"
        count = len(gate.asked)
        going.set()
        asking[0].join(60)
        assert len(gate.asked) == count, "what had not begun is not asked"


def test_a_server_that_hangs_is_waited_for_a_little_when_the_run_is_asked_to_end(
    start: Path, tmp_path: Path, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "_GRACE", 0.3)
    going, asked_to_end = threading.Event(), threading.Event()

    def hangs(path: str, answer: Any) -> Any:
        asked_to_end.set()
        going.wait(60)
        return answer

    with between(live.address) as gate:
        served = source(start, tmp_path, gate.address, weights="fixed", importance_cap=2.0, at_once=1)
        served.renew(0)
        served.ended = asked_to_end.is_set
        gate.change = hangs
        with pytest.raises(OutageError, match="waited for no longer, since the run was asked to end"):
            served(ASKED, sampling())
        with pytest.raises(OutageError, match="waited for no longer"):
            served._patiently(lambda: going.wait(60))
        going.set()


def test_keys_come_from_the_environment(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live({"m": start}, Options(cache_bytes=4 << 20), key="secret")
    try:
        with pytest.raises(ConfigError, match="the environment has no OUR_KEY"):
            source(start, tmp_path, live.address, api_key_env="OUR_KEY")
        monkeypatch.setenv("OUR_KEY", "wrong")
        with pytest.raises(ConfigError, match="says 401: the key is missing or wrong"):
            source(start, tmp_path, live.address, api_key_env="OUR_KEY").probe()
        for wrong in ("two\nlines", "\u20ac"):
            monkeypatch.setenv("OUR_KEY", wrong)
            with pytest.raises(ConfigError, match="OUR_KEY holds no key") as refused:
                source(start, tmp_path, live.address, api_key_env="OUR_KEY")
            assert wrong not in str(refused.value)
        monkeypatch.setenv("OUR_KEY", "secret\n")
        source(start, tmp_path, live.address, api_key_env="OUR_KEY").probe()
    finally:
        live.stop()
