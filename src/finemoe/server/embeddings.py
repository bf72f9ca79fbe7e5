"""A vector for each text, from the last hidden states."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.generation.scoring import reach_of
from finemoe.server.asking import MIXED, check_length
from finemoe.server.errors import ApiError
from finemoe.server.models import Served
from finemoe.server.schema import EmbeddingRequest


async def embed(request: EmbeddingRequest, served: Served) -> tuple[list[Tensor], int]:
    """A vector of length 1 for each input, float32, and how many tokens were read.

    Raises:
        ApiError: an input that is empty or too long.
    """
    given: Any = request.input
    whole = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    texts = await asyncio.to_thread(_encoded, whole, served)
    while True:
        version, vectors = served.weight_version, list[Tensor]()
        for ids in texts:  # one at a time: others may take their turn between them
            vectors.append(await served.worker.call(partial(_vector, served, ids, request.pooling)))
        if served.weight_version == version:  # else weights were renewed between two of them
            return vectors, sum(map(len, texts))


def _encoded(inputs: Sequence[Any], served: Served) -> list[list[int]]:
    reach, size, found = reach_of(served.opened), served.opened.tokenizer.vocab_size, []
    for number, one in enumerate(inputs):
        if isinstance(one, int):
            raise ApiError(400, MIXED, param="input")
        if isinstance(one, str):
            check_length(one, served.opened, "input")
        ids = served.opened.encode(one) if isinstance(one, str) else list(one)
        if not ids:
            raise ApiError(400, f"input {number} is empty", param="input")
        if any(not 0 <= token < size for token in ids):
            raise ApiError(400, f"input {number} has ids outside the vocabulary of {size:,}", param="input")
        if len(ids) > reach:
            said = f"input {number} has {len(ids):,} tokens, and the model reads {reach:,}"
            raise ApiError(400, said, param="input", code="context_length_exceeded")
        found.append(ids)
    return found


@torch.inference_mode()
def _vector(served: Served, ids: Sequence[int], pooling: str) -> Tensor:
    model = served.opened.model
    hidden = model(torch.tensor([ids], device=model.embedding.weight.device)).hidden[0].float().cpu()
    return F.normalize(hidden.mean(dim=0) if pooling == "mean" else hidden[-1], dim=0)
