"""Steady completions as they were made before there was one engine: a rectangular cache, prompts one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from finemoe.generation.sampling import pick
from finemoe.generation.sequence import Sequence
from finemoe.generation.steady import least_tokens, steady_rows
from finemoe.model.attention import AttentionCache
from finemoe.model.transformer import Transformer


@torch.inference_mode()
def complete(
    model: Transformer,
    sequences: Iterable[Sequence],
    finished: Callable[[Sequence], bool],
    *,
    stop_ids: frozenset[int],
    vocab_size: int,
) -> Iterator[Sequence]:
    """Run every sequence to its end, and yield it then; longest first keeps the slots full.

    Args:
        model: in eval mode.
        sequences: fresh ones, from `Sequence.start`.
        finished: asked after each token; True ends the sequence, as a string that stops does.
        stop_ids: tokens that end a sequence.
        vocab_size: ids from here on are never drawn.
    """
    queue = deque(sequences)
    if not queue:
        return
    slots = steady_rows(model)
    least = least_tokens(model)
    room = max(max(len(s.prompt), least) + s.sampling.max_new_tokens for s in queue)
    cache = model.new_cache(slots, room)
    running: dict[int, Sequence] = {}

    def ends(sequence: Sequence, logits: Tensor) -> bool:
        contexts = [sequence.context(stop_ids)]
        ids, logprobs = pick(logits[None, :vocab_size], sequence.sampling, [sequence.generator], contexts)
        sequence.append(int(ids[0]), float(logprobs[0]), stop_ids)
        return sequence.finish_reason is not None or finished(sequence)

    while queue or running:
        for row in range(slots):
            while row not in running and queue:
                sequence = queue.popleft()
                if ends(sequence, _read(model, sequence, [layer.rows(row, row + 1) for layer in cache], least)):
                    yield sequence
                else:
                    running[row] = sequence
        if running:
            logits = _decode(model, running, slots, cache)
            for row, sequence in list(running.items()):
                if ends(sequence, logits[row]):
                    del running[row]
                    yield sequence


def _read(model: Transformer, sequence: Sequence, cache: list[AttentionCache], least: int) -> Tensor:
    """The prompt alone, filled up to `least` tokens; the logits `[vocab]` of what follows it.

    What the filling leaves in the cache lies beyond the sequence, and is overwritten before it can be seen.
    """
    prompt = sequence.prompt
    sequence.num_cached = len(prompt)
    device = model.head_weight.device
    tokens = torch.tensor([[*prompt, *[0] * (least - len(prompt))]], device=device)
    hidden = model(tokens, positions=torch.arange(tokens.shape[1], device=device)[None], cache=cache).hidden
    return model.logits(hidden[:, len(prompt) - 1])[0]


def _decode(model: Transformer, running: dict[int, Sequence], slots: int, cache: list[AttentionCache]) -> Tensor:
    """One token of every slot; the logits `[slots, vocab]`. An idle one reads token 0 at place 0, for nobody."""
    device = model.head_weight.device
    tokens, positions = torch.zeros(2, slots, 1, dtype=torch.int64)
    for row, sequence in running.items():
        tokens[row, 0], positions[row, 0] = sequence.completion[-1], sequence.num_cached
        sequence.num_cached += 1
    return model.logits(model(tokens.to(device), positions=positions.to(device), cache=cache).hidden[:, 0])
