"""Texts that go on: prompts of every form, echo, log-probabilities in the older shape, gaps that are filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from finemoe.checkpoint.language_model import open_language_model
from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.generation.generate import generate
from server.conftest import Live

PROMPT = "def main():\n  "


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    given = {"model": "writer", "prompt": PROMPT, "max_tokens": 10, "seed": 3, **more}
    return client.completions.create(**given)


def together(stream: Any) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            own = found.setdefault(choice.index, {"text": "", "tokens": [], "values": [], "offsets": [], "tops": []})
            own["text"] += choice.text
            own["reason"] = choice.finish_reason
            if choice.logprobs:
                own["tokens"] += choice.logprobs.tokens
                own["values"] += choice.logprobs.token_logprobs
                own["offsets"] += choice.logprobs.text_offset
                own["tops"] += choice.logprobs.top_logprobs
    return found


MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "several prompts": {"prompt": ["def", "x = ", ""], "n": 2},
    "ids": {"prompt": [40, 41, 42]},
    "lists of ids": {"prompt": [[40, 41], [42]]},
    "echo": {"echo": True},
    "echo, scored": {"echo": True, "logprobs": 2},
    "scored": {"logprobs": 3},
    "scored, itself alone": {"logprobs": 0},
    "stop": {"stop": "e"},
    "greedy": {"temperature": 0},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_a_stream_is_the_whole_text(client: openai.OpenAI, more: dict[str, Any]) -> None:
    whole, pieces = ask(client, **more), together(ask(client, **more, stream=True))
    assert len(pieces) == len(whole.choices)
    for choice in whole.choices:
        own = pieces[choice.index]
        assert (own["text"], own["reason"]) == (choice.text, choice.finish_reason)
        if choice.logprobs:
            assert own["tokens"] == choice.logprobs.tokens
            assert own["values"] == choice.logprobs.token_logprobs
            assert own["offsets"] == choice.logprobs.text_offset
            assert own["tops"] == choice.logprobs.top_logprobs


def test_texts_are_those_of_the_engine(client: openai.OpenAI, writer: Path) -> None:
    (own,) = generate(writer, PROMPT, temperature=0.8, top_p=0.9, seed=7, max_new_tokens=10, quiet=True)
    answer = ask(client, temperature=0.8, top_p=0.9, seed=7)
    assert answer.choices[0].text == own.completion


def test_prompts_are_scored_as_the_model_does(client: openai.OpenAI, writer: Path) -> None:
    opened = open_language_model(writer)
    ids = opened.encode(PROMPT)
    with torch.no_grad():
        logprobs = opened.model.logits(opened.model(torch.tensor([ids])).hidden)[0].log_softmax(-1)
    found = ask(client, echo=True, logprobs=2, max_tokens=1).choices[0]
    assert found.text.startswith(PROMPT)
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.top_logprobs[0] is None
    own = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    assert found.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
    assert len(found.logprobs.tokens) == len(ids) + 1
    for offset, token in zip(found.logprobs.text_offset, found.logprobs.tokens, strict=True):
        assert found.text[offset:].startswith(token) or token.startswith("bytes:\\x")
    for value, top in zip(found.logprobs.token_logprobs[1:], found.logprobs.top_logprobs[1:], strict=True):
        assert max(top.values()) >= value
        assert value in top.values()


def test_each_of_several_prompts_gets_what_it_gets_alone(client: openai.OpenAI) -> None:
    prompts = ["def", "x = ", "return"]
    many = ask(client, prompt=prompts, temperature=0)
    for choice, prompt in zip(many.choices, prompts, strict=True):
        assert choice.text == ask(client, prompt=prompt, temperature=0).choices[0].text


def test_copies_differ_and_share_their_prompt(client: openai.OpenAI) -> None:
    answer = ask(client, n=4, max_tokens=20)
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage.prompt_tokens == ask(client).usage.prompt_tokens


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ids outside": ({"prompt": [5, 999]}, "999 is outside"),
    "ids and texts mixed": ({"prompt": ["a", [1]]}, ""),
    "no tokens for a gap": ({"suffix": "x"}, "fill"),
    "echo of a gap": ({"suffix": "x", "echo": True}, "exclude each other"),
    "too many choices": ({"n": 17}, "more than the 16"),
    "best_of": ({"extra_body": {"best_of": 1}}, "best_of is not supported"),
    "too long": ({"prompt": "word " * 300}, "shorten"),
    "too long with what is asked for": ({"prompt": "a " * 100, "max_tokens": 128}, "or fewer"),
    "no such source": ({"extra_body": {"finemoe": {"guess": "module"}}}, "no prediction module"),
}


@pytest.mark.parametrize(("more", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(client: openai.OpenAI, more: dict[str, Any], says: str) -> None:
    if says:
        with pytest.raises(openai.BadRequestError, match=says):
            ask(client, **more)
    else:
        assert ask(client, **more).choices  # each prompt by itself


def test_routes_are_those_that_the_model_takes(client: openai.OpenAI, writer: Path) -> None:
    answer = ask(client, temperature=0, extra_body={"finemoe": {"routing": True}}).choices[0]
    opened = open_language_model(writer)
    engine = Engine(opened.model, tokenizer=opened.tokenizer, end_of_text_id=opened.tokenizer.end_of_text_id)
    ids = tuple(opened.encode(PROMPT))
    engine.submit(Request(ids, SamplingConfig(temperature=0.0, max_new_tokens=10)))
    drawn = [event.token_id for event in engine.events()]
    tokens = answer.finemoe["tokens"]
    assert [token["id"] for token in tokens] == drawn
    with torch.no_grad():
        whole = opened.model(torch.tensor([[*ids, *drawn]]), record=True)
    for layer, record in whole.routing.items():
        decision = record.decision
        assert decision is not None
        for place, token in enumerate(tokens, len(ids) - 1):
            assert token["experts"][str(layer)] == decision.expert_ids[place].tolist()
            assert token["gates"][str(layer)] == pytest.approx(decision.gate_weights[place].tolist(), abs=1e-3)
            assert 0 < token["shared"][str(layer)] < 1


def test_experts_are_switched_off_and_forced(client: openai.OpenAI) -> None:
    def routed(**experts: Any) -> list[dict[str, Any]]:
        own = {"routing": True, "experts": experts}
        return ask(client, temperature=0, extra_body={"finemoe": own}).choices[0].finemoe["tokens"]

    plain = routed()
    often = plain[0]["experts"]["1"][0]
    assert all(often not in token["experts"]["1"] for token in routed(disabled={"1": [often]}))
    rare = next(expert for expert in range(8) if all(expert not in token["experts"]["2"] for token in plain[:1]))
    assert all(rare in token["experts"]["2"] for token in routed(forced={"2": [rare]}))
    assert all(len(token["experts"]["1"]) == 1 for token in routed(active=1))
    assert all("shared" not in token for token in routed(shared=False))
    assert ask(client, temperature=0).choices[0].text == "".join(token["token"] for token in plain)


EXPERTS: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer": ({"disabled": {"7": [0]}}, "layer 7 has no experts; those that have: 1, 2"),
    "a dense layer": ({"disabled": {"0": [0]}}, "layer 0 has no experts"),
    "no such expert": ({"forced": {"1": [8]}}, "experts 0 to 7, not 8"),
    "both at once": ({"forced": {"1": [3]}, "disabled": {"1": [3]}}, "expert 3 is disabled and forced"),
    "too few left": ({"disabled": {"1": [0, 1, 2, 3, 4, 5, 6]}}, "1 experts left, and a token would go to 2"),
    "too many forced": ({"forced": {"1": [0, 1, 2]}}, "3 experts are forced"),
    "more than there are": ({"active": 9}, "8 experts left"),
}


@pytest.mark.parametrize(("experts", "says"), EXPERTS.values(), ids=EXPERTS)
def test_what_no_expert_can_do_is_refused(client: openai.OpenAI, experts: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, extra_body={"finemoe": {"experts": experts}})


@pytest.mark.parametrize("guess", ["text", "module"])
def test_guesses_change_no_text(client: openai.OpenAI, guess: str) -> None:
    plain = ask(client, model="talker", temperature=0, max_tokens=60)
    fast = ask(client, model="talker", temperature=0, max_tokens=60, extra_body={"finemoe": {"guess": guess}})
    assert fast.choices[0].text == plain.choices[0].text
    assert plain.finemoe["tokens_per_pass"] == 1.0
    assert fast.finemoe["tokens_per_pass"] >= 1.0
    if guess == "text":
        assert fast.finemoe["tokens_per_pass"] > 1.0  # greedy texts of drawn weights repeat themselves


def test_vectors(client: openai.OpenAI, writer: Path) -> None:
    opened = open_language_model(writer)
    with torch.no_grad():
        hidden = opened.model(torch.tensor([opened.encode("def main")])).hidden[0]
    mean = torch.nn.functional.normalize(hidden.mean(0), dim=0).tolist()
    given = {"model": "writer", "input": ["def main", "x"]}
    found = client.embeddings.create(**given)  # type: ignore[arg-type]  # base64, as the client asks by itself
    assert found.data[0].embedding == pytest.approx(mean, abs=1e-5)
    last = client.embeddings.create(**given, encoding_format="float", extra_body={"pooling": "last"})  # type: ignore[arg-type]
    own = torch.nn.functional.normalize(hidden[-1], dim=0).tolist()
    assert last.data[0].embedding == pytest.approx(own, abs=1e-5)
    assert found.usage.prompt_tokens == len(opened.encode("def main")) + len(opened.encode("x"))
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.embeddings.create(model="writer", input=[""])


def test_tokens_there_and_back(live: Live) -> None:
    found = live.post("/tokenize", model="writer", text="def é main").json()
    assert found["count"] == len(found["ids"]) == len(found["tokens"])
    assert live.post("/detokenize", model="writer", ids=found["ids"]).json() == {"text": "def é main"}
    refused = live.post("/detokenize", model="writer", ids=[100000])
    assert refused.status_code == 400
    assert "outside the vocabulary" in refused.json()["error"]["message"]
