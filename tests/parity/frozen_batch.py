"""The batch that TRL's trainers and our objectives are both given: conversations, and pairs of answers."""

from __future__ import annotations

import random
from typing import Any

import torch

from finemoe.data.batch import PackedBatch, TokenBatch

LABELS = (70, 71)
"""The words for good and bad; nothing else in the batch has their ids."""


def frozen() -> dict[str, Any]:
    """Conversations with several answers each, and pairs whose answers differ in length."""
    draw = random.Random(7)

    def ids(count: int) -> list[int]:
        return [draw.randrange(72, 256) for _ in range(count)]

    conversations = []
    for turns in ((5, 3, 4, 9), (2, 14), (7, 1, 3, 2, 6, 5)):
        mask = [int(turn % 2) for turn, count in enumerate(turns) for _ in range(count)]
        conversations.append({"ids": ids(sum(turns)), "mask": mask})
    lengths = ((6, 3, 8), (4, 11, 2), (9, 5, 5), (3, 1, 7))
    pairs = [{"prompt": ids(p), "chosen": ids(c), "rejected": ids(r)} for p, c, r in lengths]
    return {"conversations": conversations, "pairs": pairs, "labels": list(LABELS)}


BATCH = frozen()


def pack(segments: list[tuple[list[int], list[int], list[int]]], items: int) -> PackedBatch:
    """Tokens, targets and weights of documents, in one row."""
    columns = [torch.tensor([value for segment in segments for value in segment[which]]) for which in range(3)]
    positions = torch.cat([torch.arange(len(segment[0])) for segment in segments])
    documents = torch.cat([torch.full((len(segment[0]),), n) for n, segment in enumerate(segments)])
    columns[2] = columns[2].float()
    rows = TokenBatch(*(one[None] for one in (*columns, positions, documents)))
    return PackedBatch(rows, items, len(segments), torch.arange(items))


def conversations() -> PackedBatch:
    talks = BATCH["conversations"]
    return pack([(one["ids"][:-1], one["ids"][1:], one["mask"][1:]) for one in talks], len(talks))


def pairs_of_answers() -> PackedBatch:
    segments = []
    for pair in BATCH["pairs"]:
        for side in ("chosen", "rejected"):
            ids = pair["prompt"] + pair[side]
            mask = [0] * len(pair["prompt"]) + [1] * len(pair[side])
            segments.append((ids[:-1], ids[1:], mask[1:]))
    return pack(segments, len(BATCH["pairs"]))


def pairs_to_judge() -> PackedBatch:
    """An answer is followed by the word for good, which is the only target that counts."""
    segments = []
    for pair in BATCH["pairs"]:
        for side in ("chosen", "rejected"):
            ids = pair["prompt"] + pair[side]
            segments.append((ids, [*ids[1:], LABELS[0]], [0] * (len(ids) - 1) + [1]))
    return pack(segments, len(BATCH["pairs"]))
