"""Engine against the obvious loop: the whole text again for every token, one prompt at a time, no cache."""

from typing import Any

import pytest
import torch

from finemoe.core import seeds
from finemoe.core.errors import DataError
from finemoe.generation import Engine, Request, SamplingConfig, pick
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer

END = 0
PROMPTS = [(5, 9, 300), (7,), tuple(range(100, 140)), (5, 9, 300), (2047, 3, 3, 8), (), tuple(range(1, 12))]


def make_model(**changes: Any) -> Transformer:
    table = {"preset": "tiny-moe", "vocab_size": 2048, "init_std": 0.08, **changes}
    model = Transformer(expand(resolve(table, "test")))
    initialize(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


@torch.inference_mode()
def uncached(model: Transformer, prompt: tuple[int, ...], sampling: SamplingConfig, repetition: int = 0) -> list[int]:
    """The oracle."""
    prompt = prompt or (END,)
    stream = seeds.generator(sampling.seed, "sampling", repetition, *prompt)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + sampling.max_new_tokens:
        logits = model.logits(model(torch.tensor([tokens])).hidden[:, -1])
        tokens.append(int(pick(logits, sampling, [stream])[0]))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
SAMPLED = SamplingConfig(temperature=0.9, top_k=200, top_p=0.95, seed=3, max_new_tokens=12)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("max_sequences", "chunk"), [(1, 256), (3, 256), (8, 256), (3, 4), (8, 1)])
def test_cached_batched_and_chunked_is_uncached(
    model: Transformer, sampling: SamplingConfig, max_sequences: int, chunk: int
) -> None:
    engine = Engine(model, end_of_text_id=END, max_sequences=max_sequences, chunk=chunk)
    sequences = engine.generate(PROMPTS, sampling)
    repetitions = [PROMPTS[:i].count(prompt) for i, prompt in enumerate(PROMPTS)]
    for sequence, prompt, repetition in zip(sequences, PROMPTS, repetitions, strict=True):
        assert sequence.completion == uncached(model, prompt, sampling, repetition)
        assert sequence.prompt == (prompt or (END,))
        assert len(sequence.logprobs) == len(sequence.completion)
        assert sequence.finish_reason == "length"


def test_logprobs_are_those_of_the_whole_text(model: Transformer) -> None:
    sequence = Engine(model, end_of_text_id=END, chunk=16).generate([PROMPTS[2]], SAMPLED)[0]
    text = torch.tensor([[*sequence.prompt, *sequence.completion]])
    with torch.inference_mode():
        logprobs = model.logits(model(text).hidden).log_softmax(-1)
    at = range(len(sequence.prompt) - 1, text.shape[1] - 1)
    expected = [logprobs[0, i, text[0, i + 1]].item() for i in at]
    torch.testing.assert_close(torch.tensor(sequence.logprobs), torch.tensor(expected))


def test_the_same_prompt_twice_draws_twice_and_the_seed_decides(model: Transformer) -> None:
    engine = Engine(model, end_of_text_id=END)
    first, second = engine.generate([(5, 6), (5, 6)], SAMPLED)
    again = engine.generate([(1, 2, 3), (5, 6)], SAMPLED)[1]
    other = engine.generate([(5, 6)], SAMPLED.model_copy(update={"seed": 4}))[0]
    assert first.completion == again.completion
    assert len({tuple(s.completion) for s in (first, second, other)}) == 3


def test_stop_ends_the_sequence_and_frees_its_slot(model: Transformer) -> None:
    plain = Engine(model).generate([(7,)], GREEDY)[0].completion
    at = next(i for i, token in enumerate(plain) if token not in plain[:i] and i)
    engine = Engine(model, end_of_text_id=plain[at], max_sequences=1)
    stopped, after = engine.generate([(7,), (5, 9, 300)], GREEDY)
    assert stopped.finish_reason == "stop"
    assert stopped.completion == plain[: at + 1]
    assert stopped.text_ids == plain[:at]
    assert after.completion == Engine(model).generate([(5, 9, 300)], GREEDY)[0].completion
    going_on = GREEDY.model_copy(update={"stop_at_end_of_text": False})
    assert engine.generate([(7,)], going_on)[0].completion == plain


def test_any_of_several_tokens_stops(model: Transformer) -> None:
    plain = Engine(model).generate([(7,)], GREEDY)[0].completion
    first, second = [at for at, token in enumerate(plain) if token not in plain[:at]][1:3]
    engine = Engine(model, end_of_text_id=plain[second], stop_ids=[plain[first], 10**6])
    stopped = engine.generate([(7,)], GREEDY)[0]
    assert (stopped.finish_reason, stopped.text_ids) == ("stop", plain[:first])
    other = Engine(model, end_of_text_id=plain[second], stop_ids=[10**6]).generate([(7,)], GREEDY)[0]
    assert other.text_ids == plain[:second]
    alone = Engine(model, stop_ids=[plain[first]])
    assert alone.generate([(7,)], GREEDY)[0].text_ids == plain[:first]
    with pytest.raises(DataError, match="needs an end-of-text token"):
        alone.generate([()], GREEDY)


def test_requests_with_different_parameters_share_a_batch_and_arrive_while_it_runs(
    model: Transformer,
) -> None:
    engine = Engine(model, end_of_text_id=END, max_sequences=2)
    requests = [Request((5, 9), GREEDY), Request((5, 9), SAMPLED), Request(tuple(range(50)), GREEDY)]
    for request in requests[:2]:
        engine.submit(request)
    events = engine.step()
    assert [event.sequence.id for event in events] == [0, 1]
    late = engine.submit(requests[2])  # longer than the cache in use: waits for the next one
    events += engine.events()
    assert late == 2
    assert engine.step() == []
    for number, request in enumerate(requests):
        drawn = [event.token_id for event in events if event.sequence.id == number]
        assert drawn == uncached(model, request.prompt, request.sampling)


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-v3"])
def test_a_prompt_is_read_beside_those_that_decode(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(preset=preset)
    shapes, forward = [], model.forward

    def recorded(tokens: torch.Tensor, **others: Any) -> Any:
        shapes.append(tuple(tokens.shape))
        return forward(tokens, **others)

    engine = Engine(model, max_sequences=3)
    lengths, prompts = [9, 3, 9, 9], [(5, 9), (7,), (8, 8, 8), tuple(range(100, 200))]
    requests = [
        Request(p, GREEDY.model_copy(update={"max_new_tokens": n})) for p, n in zip(prompts, lengths, strict=True)
    ]
    for request in requests:
        engine.submit(request)
    monkeypatch.setattr(model, "forward", recorded)
    events = list(engine.events())
    # Three short prompts in one pass without padding; the long one comes when the second is done, beside the others.
    assert shapes[:5] == [(1, 6), (1, 3), (1, 3), (1, 102), (1, 3)]
    monkeypatch.undo()
    for number, request in enumerate(requests):
        drawn = [event.token_id for event in events if event.sequence.id == number]
        assert drawn == uncached(model, request.prompt, request.sampling)


def test_expert_capacity_does_not_apply() -> None:
    tight = {"capacity_factor": 0.05}
    limited, free = make_model(feed_forward=tight), make_model()
    sequences = Engine(limited, end_of_text_id=END).generate(PROMPTS[:3], GREEDY)
    assert [s.completion for s in sequences] == [uncached(free, prompt, GREEDY) for prompt in PROMPTS[:3]]


def test_a_model_in_training_mode_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        Engine(make_model().train())


def test_ids_beyond_the_tokenizer_are_never_drawn(model: Transformer) -> None:
    hot = SamplingConfig(temperature=5.0, max_new_tokens=40)
    sequence = Engine(model, vocab_size=10).generate([(1,)], hot)[0]
    assert max(sequence.completion) < 10


def test_what_cannot_be_run_is_refused(model: Transformer) -> None:
    with pytest.raises(DataError, match="end-of-text"):
        Engine(model).submit(Request((), GREEDY))
    with pytest.raises(DataError, match="2048 is outside"):
        Engine(model).submit(Request((1, 2048), GREEDY))
