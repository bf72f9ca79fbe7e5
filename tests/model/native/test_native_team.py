"""Threads that stand by through a pass: the same bits, however many there are, from wherever it is called."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from finemoe.model import native
from finemoe.model.attention.blocks import Group
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Block, Transformer

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

WIDE = {
    "vocab_size": 50,
    "hidden_size": 256,
    "num_layers": 3,
    "attention": {"kind": "grouped_query", "num_heads": 8, "num_kv_heads": 4, "head_dim": 32},
    "leading": {"count": 1, "feed_forward": {"kind": "dense", "ffn_hidden_size": 700}},
    "feed_forward": {
        "kind": "moe",
        "num_routed_experts": 64,
        "experts_per_token": 3,
        "expert_hidden_size": 100,
        "num_shared_experts": 1,
        "router": {"kind": "softmax_topk"},
    },
}
"""Wide enough that every product is cut into parts."""
LATENT = {
    "kind": "latent",
    "num_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["grouped", "latent"])
def made(request: pytest.FixtureRequest) -> Transformer:
    table = {**WIDE, "attention": LATENT} if request.param == "latent" else WIDE
    found = Transformer(expand(resolve(table, "the test"))).eval()
    initialize(found, seed=3)
    return found


@torch.inference_mode()
def run(made: Transformer, threads: int, sequences: int = 5) -> torch.Tensor:
    """What comes of some sequences' next tokens."""
    torch.set_num_threads(threads)
    positions = torch.arange(sequences)[:, None]
    groups = [Group(0, positions, torch.arange(2 * sequences).view(sequences, 2), 8)]
    tokens = torch.arange(sequences)[None] * 7 % 50
    cache = made.new_blocks(2 * sequences, 8)
    return made(tokens, positions=positions.view(1, -1), cache=cache, groups=groups).hidden


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_one_call_is_what_single_operations_are(
    threads: int, made: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router's product too, which torch shares among threads by itself."""
    found = [run(made, threads, sequences) for sequences in range(1, 12)]
    monkeypatch.setattr(Block, "where", lambda *_: None)
    for sequences, one in enumerate(found, 1):
        assert torch.equal(run(made, threads, sequences), one), sequences
    monkeypatch.undo()
    assert all(torch.equal(run(made, threads), found[4]) for _ in range(30))


def test_several_callers_at_once_have_teams_of_their_own(made: Transformer) -> None:
    expected = run(made, 3)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(made, 3), range(40)))
    assert all(torch.equal(one, expected) for one in found)


def test_a_team_ends_with_an_error_and_the_next_one_works(made: Transformer) -> None:
    expected = run(made, 3)
    for _ in range(5):
        torch.set_num_threads(3)
        with pytest.raises(RuntimeError, match="the blocks want more"):
            torch.ops.finemoe.decode_blocks(torch.zeros(1, 1, 8), 3, [], [], [], [])
        assert torch.equal(run(made, 3), expected)
