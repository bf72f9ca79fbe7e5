"""ModelConfig: the whole architecture as one frozen value, block by block; ModelRecipe: its compact form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from finemoe.core.config import Config, union_of
from finemoe.model.attention import AttentionConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.balance import BalanceConfig
from finemoe.model.moe.layer import MoEConfig

FeedForwardConfig: Any = union_of((DenseConfig, MoEConfig))


class BlockConfig(Config):
    """One transformer block."""

    attention: AttentionConfig
    """How tokens look at each other."""
    feed_forward: FeedForwardConfig
    """What each token goes through after it: one SwiGLU, or a mixture of experts."""


class ModelConfig(Config):
    """Everything that defines a Transformer. Blocks are an explicit list, because pruning makes layers differ."""

    vocab_size: PositiveInt
    """[tokens] Ids the model knows; at least as many as the tokenizer has."""
    hidden_size: PositiveInt
    """[components] Width of the residual stream."""
    blocks: tuple[BlockConfig, ...]
    """Every layer spelt out, with its attention and feed_forward."""
    tie_embeddings: bool = False
    """Use the input embedding as output head too."""
    init_std: PositiveFloat = 0.006
    """[standard deviation] Of every weight at the start; 0.006 in the papers, at hidden sizes of 1280 and more."""
    norm_eps: PositiveFloat = 1e-6
    """[added] To the mean square under the root in every RMSNorm."""
    max_positions: PositiveInt | None = None
    """[tokens] Longest sequence the model is made for; None: as long as it was trained on."""
    mtp: tuple[BlockConfig, ...] = ()
    """The block of each multi-token prediction module, one a depth (V3 section 2.2)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.blocks:
            raise ValueError("blocks is empty: a model needs at least one layer")
        return self

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that route."""
        return tuple(i for i, block in enumerate(self.blocks) if isinstance(block.feed_forward, MoEConfig))


def with_balance(config: ModelConfig, balance: BalanceConfig) -> ModelConfig:
    """The same model with these balance losses in every layer whose router learns; what is computed stays the same.

    Raises:
        ValidationError: a layer's router or experts do not go with them.
    """

    def changed(block: BlockConfig) -> dict[str, Any]:
        table = block.model_dump()
        if isinstance(block.feed_forward, MoEConfig) and block.feed_forward.router.learned:
            table["feed_forward"]["balance"] = balance.model_dump()
        return table

    table = config.model_dump()
    return ModelConfig.model_validate(
        {**table, "blocks": [changed(b) for b in config.blocks], "mtp": [changed(b) for b in config.mtp]}
    )


def without_capacity(config: ModelConfig) -> ModelConfig:
    """The same model with no limit to what an expert takes while it trains: what it computes in use, always."""

    def changed(block: BlockConfig) -> BlockConfig:
        layer = block.feed_forward
        if not isinstance(layer, MoEConfig) or layer.capacity_factor is None:
            return block
        idle = {"capacity_factor": None, "capacity_level": "expert", "capacity_exempt": 0.0}
        return block.model_copy(update={"feed_forward": layer.model_copy(update=idle)})

    blocks, mtp = (tuple(changed(block) for block in some) for some in (config.blocks, config.mtp))
    return config.model_copy(update={"blocks": blocks, "mtp": mtp})


def can_begin_with(model: ModelConfig, opened: ModelConfig) -> bool:
    """Whether a run of `model` can begin with the weights of `opened`.

    They may differ in what concerns training alone, and prediction modules may have been left out.
    """
    mine, theirs = _weights_alone(model), _weights_alone(opened)
    return {**theirs, "mtp": mine["mtp"]} == mine and (not mine["mtp"] or mine["mtp"] == theirs["mtp"])


def _weights_alone(config: ModelConfig) -> dict[str, Any]:
    table = config.model_dump()
    for block in (*table["blocks"], *table["mtp"]):
        for name in ("balance", "capacity_factor", "capacity_level", "capacity_exempt"):
            block["feed_forward"].pop(name, None)
    return table


class LeadingBlocks(Config):
    """The first `count` layers, where they differ from the rest; what is left out is as in the rest."""

    count: PositiveInt
    """[layers] How many layers at the bottom differ."""
    attention: AttentionConfig | None = None
    """Theirs; left out, as in the rest."""
    feed_forward: FeedForwardConfig | None = None
    """Theirs; left out, as in the rest."""


class ModelRecipe(Config):
    """The compact form that presets and recipes use: one block repeated, and what differs at the bottom."""

    vocab_size: PositiveInt
    """[tokens] Ids the model knows, which is also the size of a tokenizer that is trained for it."""
    hidden_size: PositiveInt
    """[components] Width of the residual stream."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """[layers] Transformer blocks."""
    attention: AttentionConfig
    """How tokens look at each other."""
    feed_forward: FeedForwardConfig
    """What each token goes through after it: one SwiGLU, or a mixture of experts."""
    leading: LeadingBlocks | None = None
    """Layers at the bottom that differ from the rest, such as a dense first one."""
    tie_embeddings: bool = False
    """Use the input embedding as output head too."""
    init_std: PositiveFloat = 0.006
    """[standard deviation] Of every weight at the start; presets scale the papers' 0.006 by 1 / sqrt(hidden_size)."""
    norm_eps: PositiveFloat = 1e-6
    """[added] To the mean square under the root in every RMSNorm."""
    max_positions: PositiveInt | None = None
    """[tokens] Longest sequence the model is made for; left out, as long as it was trained on."""
    mtp_depth: Annotated[int, Field(ge=0, le=10_000)] = 0
    """[modules] Multi-token prediction modules, each with a block like the last layer's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.leading is not None and self.leading.count > self.num_layers:
            raise ValueError(f"leading.count {self.leading.count} is above num_layers {self.num_layers}")
        return self


def expand(recipe: ModelRecipe) -> ModelConfig:
    """The full ModelConfig of a compact recipe."""
    block = BlockConfig(attention=recipe.attention, feed_forward=recipe.feed_forward)
    blocks = [block] * recipe.num_layers
    if recipe.leading is not None:
        first = BlockConfig(
            attention=recipe.leading.attention or recipe.attention,
            feed_forward=recipe.leading.feed_forward or recipe.feed_forward,
        )
        blocks[: recipe.leading.count] = [first] * recipe.leading.count
    names = ("vocab_size", "hidden_size", "tie_embeddings", "init_std", "norm_eps", "max_positions")
    shared: Mapping[str, Any] = {name: getattr(recipe, name) for name in names}
    return ModelConfig(blocks=tuple(blocks), mtp=(blocks[-1],) * recipe.mtp_depth, **shared)


class Kernels(Config):
    """How the model is computed; never what it computes."""

    attention: Literal["reference", "sdpa"] = "sdpa"
    """sdpa: the fastest there is; reference: the formula, slow and obvious."""
    experts: Literal["auto", "loop", "sorted_slices", "grouped_mm", "native"] = "auto"
    """auto: grouped_mm for bf16 on CUDA, else native where it can run; `finemoe train` measures instead."""
    products: Literal["auto", "torch", "native"] = "auto"
    """Of linear layers, dense SwiGLUs, norms and the loss. native (and auto): the C++ kernels where they can run."""
    recompute: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
