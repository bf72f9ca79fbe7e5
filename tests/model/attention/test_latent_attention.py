"""Multi-head latent attention against V2's equations token by token: both forms, cached or not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.attention.latent import LatentAttention, LatentCache, LatentConfig
from finemoe.model.attention.places import Places
from finemoe.model.backends import ATTENTION_KERNELS, backend_for
from finemoe.model.config import Kernels
from oracles import attention as oracle
from oracles import rope
from oracles.models import LATENT, YARN

BATCH, SEQ, HIDDEN = 2, 5, 10
FORMS = ["expanded", "absorbed"]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
CAUSAL = torch.ones(BATCH, SEQ, SEQ, dtype=torch.bool).tril()
MASKS = {"causal": None, "documents": CAUSAL & (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :])}

SHAPES: dict[str, dict[str, Any]] = {
    "all on": {},
    "plain queries": {"q_lora_rank": None},
    "half-split": {"rope": {"layout": "half_split", "scaling": YARN}},
    "no scaling": {"rope": {"layout": "interleaved", "theta": 300.0}},
    "wide latents": {"kv_lora_rank": 40, "q_lora_rank": 20},
    # V2-Lite: 16 heads of 128 + 64, values of 128, latents of 512; an eighth of a head, two heads
    "V2-Lite": {
        "num_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "one head, wide values": {"num_heads": 1, "v_head_dim": 13, "qk_rope_head_dim": 2},
}


def drawn(
    changes: dict[str, Any], form: Any = "auto", kernel: str = "sdpa", hidden: int = HIDDEN, seed: int = 1
) -> LatentAttention:
    """A module whose attention is far from even, and whose norms are not 1."""
    config = LatentConfig.model_validate({**LATENT, **changes})
    module = LatentAttention(config, hidden, 1.0, backend_for(Kernels.model_validate({"attention": kernel})), form)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def expected_output(module: LatentAttention, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The oracle in double precision, with frequencies and scale from their own formulas."""
    config = module.config
    scaling, theta = config.rope.scaling, config.rope.theta
    frequencies = rope.plain(config.qk_rope_head_dim, theta)
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if scaling is not None:
        fields = (scaling.factor, scaling.original_max_positions, scaling.beta_fast)
        frequencies = rope.yarn(config.qk_rope_head_dim, theta, *fields)
        scale *= (0.1 * math.log(scaling.factor) + 1) ** 2
    return oracle.latent_attention(module, hidden, POSITIONS, CAUSAL if mask is None else mask, frequencies, scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_those_of_the_equations(
    changes: dict[str, Any], mask: Tensor | None, form: str
) -> None:
    module = drawn(changes, form)
    hidden = torch.randn(BATCH, SEQ, HIDDEN, requires_grad=True)
    found = module(hidden, places=Places(POSITIONS, None if mask is None else mask[:, None]), cache=None)
    expected = expected_output(module, hidden, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    leaves, direction = {"hidden": hidden, **dict(module.named_parameters())}, torch.randn_like(found)
    gradients = torch.autograd.grad((found * direction).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((expected * direction).sum(), list(leaves.values()))
    for name, gradient, want in zip(leaves, gradients, wanted, strict=True):
        assert (gradient - want).norm() < 1e-5 * want.norm(), name


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_both_forms_agree_in_double_precision(mask: Tensor | None, kernel: str) -> None:
    # Norms and rotation round to float32 in both alike; what remains is the order of the products.
    hidden, outputs = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64), []
    for form in FORMS:
        module = drawn({}, form, kernel).double()
        masked = None if mask is None else mask[:, None]
        outputs.append(module(hidden, places=Places(POSITIONS, masked), cache=None))
    tolerance = 1e-12 if kernel != "reference" else 1e-5  # the reference computes in float32
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("widths", [(1,) * 5, (5,), (2, 3), (3, 1, 1)], ids=["token by token", "whole", "2+3", "3+1+1"])
def test_cached_is_uncached(widths: tuple[int, ...], kernel: str, form: str) -> None:
    module, hidden = drawn({}, form, kernel), torch.randn(BATCH, SEQ, HIDDEN)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    with torch.no_grad():
        whole = module(hidden, places=Places(positions), cache=None)
        cache, found, done = module.new_cache(BATCH, 8), [], 0
        for width in widths:
            part = slice(done, done + width)
            found.append(module(hidden[:, part], places=Places(positions[:, part]), cache=cache))
            done += width
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_different_lengths_share_a_cache(form: str) -> None:
    # Row 0 prefills 4 tokens, row 1 only 2 and two of padding; then each decodes at its own position.
    module, hidden = drawn({}, form), torch.randn(BATCH, 6, HIDDEN)
    lengths = [4, 2]
    with torch.no_grad():
        cache = module.new_cache(BATCH, 8)
        start = torch.arange(4).expand(BATCH, 4)
        first = module(hidden[:, :4], places=Places(start), cache=cache)
        found = [[first[b, : lengths[b]]] for b in range(BATCH)]
        for step in range(2):
            at = torch.tensor([[length + step] for length in lengths])
            fresh = torch.stack([hidden[b, at[b]] for b in range(BATCH)])
            output = module(fresh, places=Places(at), cache=cache)
            for b in range(BATCH):
                found[b].append(output[b])
        for b, length in enumerate(lengths):
            alone = hidden[b : b + 1, : length + 2]
            whole = module(alone, places=Places(torch.arange(length + 2)[None]), cache=None)
            torch.testing.assert_close(torch.cat(found[b]), whole[0], rtol=1e-4, atol=1e-4)


def test_cache_holds_the_normed_latent_and_the_turned_key_and_nothing_else() -> None:
    module, hidden = drawn({}), torch.randn(BATCH, SEQ, HIDDEN)
    cache = module.new_cache(BATCH, 8)
    module(hidden, places=Places(POSITIONS - POSITIONS[:, :1]), cache=cache)
    stored = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in stored) == BATCH * 8 * (7 + 4)
    assert module.config.cache_elements_per_token() == 7 + 4
    down = hidden.double() @ module.kv_down_proj.weight.T.double()
    latent = oracle.norm(down[..., :7], module.kv_norm.weight.double(), 1e-6)
    torch.testing.assert_close(cache.states[:, :SEQ, :7].double(), latent, rtol=1e-4, atol=1e-5)
    scaling = module.config.rope.scaling
    frequencies = rope.yarn(4, 1e4, scaling.factor, scaling.original_max_positions, scaling.beta_fast)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    turned = rope.rotate(down[:, None, :, 7:], positions, frequencies, "interleaved")[:, 0]
    torch.testing.assert_close(cache.states[:, :SEQ, 7:].double(), turned, rtol=1e-4, atol=1e-4)
    assert not cache.states[:, SEQ:].any()


def test_cache_refuses_a_position_beyond_its_capacity() -> None:
    cache = LatentCache(torch.zeros(1, 4, 5), 3)
    states = (torch.ones(1, 1, 3), torch.ones(1, 1, 2))
    cache.update(*states, Places(torch.tensor([[3]])))
    with pytest.raises(IndexError, match=r"position 4 .* capacity of 4"):
        cache.update(*states, Places(torch.tensor([[4]])))


def test_cache_mask_shows_each_row_its_own_past() -> None:
    cache = LatentCache(torch.zeros(2, 8, 5), 3)
    places = Places(torch.tensor([[0, 1], [3, 4]]))
    states, seen = cache.update(torch.ones(2, 2, 3), 2 * torch.ones(2, 2, 2), places)
    assert states.shape == (2, 5, 5)
    mask = seen.mask
    assert mask[0, 0].tolist() == [[True, False, False, False, False], [True, True, False, False, False]]
    assert mask[1, 0].tolist() == [[True, True, True, True, False], [True] * 5]
    assert states[1, :, 2].tolist() == [0, 0, 0, 1, 1]
    assert states[1, :, 3].tolist() == [0, 0, 0, 2, 2]


def test_rows_of_a_cache_are_its_memory_and_can_change_places() -> None:
    cache = LatentCache(torch.zeros(3, 2, 5), 3)
    cache.rows(2, 3).update(torch.ones(1, 1, 3), torch.ones(1, 1, 2), Places(torch.tensor([[1]])))
    cache.swap(0, 2)
    assert cache.states.sum(-1).tolist() == [[0, 5], [0, 0], [0, 0]]


def products(config: LatentConfig, form: str, queries: int, keys: int) -> int:
    """Multiplications that grow with the number of keys, counted on the shapes of each form."""
    heads, latent = config.num_heads, config.kv_lora_rank
    if form == "expanded":
        up = keys * latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
        return up + queries * keys * heads * (config.qk_head_dim + config.v_head_dim)
    return queries * keys * heads * (latent + config.qk_rope_head_dim + latent)


@pytest.mark.parametrize("queries", [1, 2, 16, 85, 170, 171, 172, 512, 4096])
@pytest.mark.parametrize("shape", ["V2", "narrow"])
def test_auto_takes_the_form_with_fewer_products(shape: str, queries: int) -> None:
    v2 = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config = LatentConfig.model_validate({**LATENT, **(v2 if shape == "V2" else {"kv_lora_rank": 2})})
    cheaper = min(FORMS, key=lambda form: (products(config, form, queries, 1000), form))
    assert config.prefers_absorbed(queries) == (cheaper == "absorbed")


def test_auto_expands_in_training_and_absorbs_in_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    module, used = drawn({"kv_lora_rank": 40}), []
    for name in FORMS:
        original = getattr(module, f"_{name}")

        def spied(*arguments: Any, name: str = name, original: Any = original) -> Tensor:
            used.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, f"_{name}", spied)
    hidden, positions = torch.randn(1, 20, HIDDEN), torch.arange(20)[None]
    module(hidden, places=Places(positions), cache=None)
    cache = module.new_cache(1, 21)
    module(hidden, places=Places(positions), cache=cache)
    module(hidden[:, :1], places=Places(torch.tensor([[20]])), cache=cache)
    assert used == ["expanded", "expanded", "absorbed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cached", [False, True])
def test_bfloat16_autocast_tracks_float32(cached: bool, form: str) -> None:
    module, hidden = drawn({"rope": {"layout": "interleaved"}}, form), torch.randn(BATCH, SEQ, HIDDEN)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    for parameter in module.parameters():
        parameter.data *= 0.6
    with torch.no_grad():
        exact = module(hidden, places=Places(positions), cache=None)
        with torch.autocast("cpu", torch.bfloat16):
            cache = module.new_cache(BATCH, SEQ) if cached else None
            rounded = module(hidden, places=Places(positions), cache=cache)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_an_odd_rotary_part_is_refused() -> None:
    with pytest.raises(ValueError, match="qk_rope_head_dim 3 is odd"):
        LatentConfig.model_validate({**LATENT, "qk_rope_head_dim": 3})


def test_released_models_rotate_interleaved_unless_told_otherwise() -> None:
    fields = {key: value for key, value in LATENT.items() if key != "rope"}
    assert LatentConfig.model_validate(fields).rope.layout == "interleaved"
