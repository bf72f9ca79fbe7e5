"""Child-Tuning (arXiv 2109.05687): in every step only a part of the weights, the child network, has a gradient.

F, free of the task, draws the child anew in every step. D, driven by it, keeps the weights with the largest Fisher
information of the task, found once before the run. As in the released optimizer the whole gradient is clipped first,
and masked behind that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, final

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.core.errors import ConfigError
from finemoe.core.logs import logger
from finemoe.core.seeds import generator
from finemoe.methods.setting import Held, Kept, Setting, TrainableConfig, numbers
from finemoe.methods.trainables.fisher import Per, sequences_at_once, squared_gradients
from finemoe.methods.trainables.parts import matches
from finemoe.methods.trainables.ranking import STACK, Granularity, masks_of
from finemoe.model.transformer import Transformer
from finemoe.training.method import Group, Method, Saved

_SEQUENCES = 256
_MOST_SEED = (1 << 63) - 1


class ChildConfig(TrainableConfig):
    """A child network: the weights that have a gradient."""

    kind: Literal["child"] = "child"
    mode: Literal["F", "D"]
    """F: drawn anew in every step, and what is kept counts 1/share. D: the weights under `blocks.` that the task needs
    most by their Fisher information, chosen once before the run; embeddings, head, last norm and prediction modules are
    always kept."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """[share] How much is kept: with F the probability of each, with D the part of what is ranked."""
    granularity: Granularity = "parameter"
    """What is kept or masked as one: a single weight, as in the paper; a row, which is the last dimension of a tensor;
    or a routed expert of a layer, where all else under `blocks.` is frozen and so are routers."""
    fisher: Per | None = None
    """Of D. batch, the default: gradients of the means over a step's sequences, squared, as in the released code.
    example: of single sequences, the empirical Fisher information."""
    fisher_sequences: PositiveInt | None = None
    """[sequences] Of D: how many the Fisher information is taken from, 256 where nothing is said; none twice."""
    masked: Literal["published", "held"] = "published"
    """What becomes of a masked weight. published: its gradient is 0, but decoupled decay and Adam's momentum move it
    still, as in the released optimizer. held: it stays exactly as it is in that step."""

    @property
    def moves_routers(self) -> bool:
        """Whether routers are trained: by whole experts they are not, and their biases stay too."""
        return self.granularity != "expert"

    @property
    def reads_before(self) -> int:
        """What the Fisher information is taken from."""
        return (self.fisher_sequences or _SEQUENCES) if self.mode == "D" else 0

    def held(self, shapes: Mapping[str, tuple[int, ...]], setting: Setting) -> Held:
        """Masks of D, what is put back where masked weights are held, and the Fisher information while it is found."""
        by_expert = self.granularity == "expert"
        moving = {name: shape for name, shape in shapes.items() if not by_expert or _is_of_experts(name)}
        ranked = {name: shape for name, shape in moving.items() if name.startswith("blocks.")}
        masked = ranked if by_expert or self.mode == "D" else moving
        masks = sum(_mask_numbers(shape, self.granularity) for shape in masked.values())
        kept: tuple[Kept, ...] = ()
        if self.mode == "D" or self.masked == "held":
            kept = (Kept("masks", masks, 'a coarser trainable.granularity, such as "row"'),)
        if self.masked == "held":
            kept = (*kept, Kept("weights to be put back", 4 * numbers(masked), 'trainable.masked = "published"'))
        if self.mode == "F":
            return Held(numbers(moving), kept=kept)
        found = Kept("gradients and Fisher information", 8 * numbers(ranked), 'trainable.mode = "F"')
        at_once = sequences_at_once(self.fisher or "batch", self.fisher_sequences or _SEQUENCES, setting)
        return Held(numbers(moving), kept=kept, before=(found,), sequences_before=at_once)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("fisher", "fisher_sequences"):
            if self.mode == "F" and getattr(self, name) is not None:
                raise ValueError(
                    f'{name} = {getattr(self, name)!r} is for mode = "D": a child that is drawn has no Fisher '
                    f"information; leave {name} out"
                )
        return self


def _is_of_experts(name: str) -> bool:
    """Whether a parameter moves where whole experts are masked: their stacks, and what is outside of `blocks.`."""
    stays = name.startswith("blocks.") and not STACK.fullmatch(name)
    return not stays and not matches(name, ("routers",))


def _mask_numbers(shape: tuple[int, ...], granularity: Granularity) -> int:
    match granularity:
        case "parameter":
            return math.prod(shape)
        case "row":
            return math.prod(shape[:-1])
        case "expert":
            return shape[0]


@final
class Child:
    """Draws or finds the masks, and puts them on the gradients: a mask is True where a gradient is kept."""

    def __init__(self, config: ChildConfig, method: Method[Any], setting: Setting) -> None:
        """`method`: what is tuned."""
        self._config, self._method, self._setting = config, method, setting
        self._generator = generator(setting.seed, "child", "masks")
        self._device = torch.device("cpu")
        self._masks: dict[str, Tensor] = {}  # of D, by parameter; each spreads over the parameter's shape
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def select(self, name: str) -> Group | None:
        """By whole experts, nothing else under `blocks.`, and no router wherever it is."""
        if self._config.granularity == "expert" and not _is_of_experts(name):
            return None
        return self._method.select(name)

    def prepare(self, model: Transformer, begins: bool) -> None:
        """Find the child of D, where the run begins.

        Raises:
            ConfigError: nothing under `blocks.` is trained, or the data hold nothing to learn from.
            TrainingError: a gradient is not finite.
        """
        config, self._device = self._config, model.embedding.weight.device
        if config.mode == "F" or not begins:
            return
        ranked = [name for name, _ in model.named_parameters() if name.startswith("blocks.") and self.select(name)]
        if not ranked:
            raise ConfigError('trainable.mode "D" ranks what is under `blocks.`, and none of it is trained: use "F"')
        per, sequences = config.fisher or "batch", config.fisher_sequences or _SEQUENCES
        found = squared_gradients(model, self._method, self._setting, ranked, per, sequences)
        self._masks, said = masks_of(found, config.share, config.granularity)
        logger.info("child-tuning D, by the Fisher information of each %s: %s", per, said)

    def before_update(self, parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        """Mask the gradients, which were clipped before; the figure is the share of them that was kept."""
        mask_of = self._masks.get if self._config.mode == "D" else self._drawing(parameters)
        scale = 1 / self._config.share if self._config.mode == "F" else 1.0
        kept, count = torch.zeros((), dtype=torch.int64, device=self._device), 0  # read once: a GPU waits for that
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            count += parameter.numel()
            mask = mask_of(name)
            if mask is None:
                kept += parameter.numel()
                continue
            kept += mask.sum() * (parameter.numel() // mask.numel())
            parameter.grad.mul_(mask.to(parameter.grad.dtype).mul_(scale))
            if self._config.masked == "held":
                self._before.append((parameter, mask, parameter.detach().clone()))
        return {"gradients_kept": kept.item() / max(1, count)}

    @torch.no_grad()
    def after_update(self, model: Transformer, load: Mapping[int, Tensor], progress: float) -> None:
        """Put masked weights back where they were, if they are held."""
        for parameter, mask, before in self._before:
            parameter.copy_(torch.where(mask, parameter, before))
        self._before.clear()

    def state(self) -> Saved:
        """The masks of D; of F where its random stream stands."""
        return Saved(self._masks if self._config.mode == "D" else {"generator": self._generator.get_state()})

    def restore(self, saved: Saved) -> None:
        """As saved."""
        if self._config.mode == "D":
            self._masks = {name: mask.to(self._device, copy=True) for name, mask in saved.tensors.items()}
        else:
            self._generator.set_state(saved.tensors["generator"].cpu())

    def _drawing(self, parameters: Mapping[str, nn.Parameter]) -> Callable[[str], Tensor | None]:
        """Masks of one step. What is saved is a stream on the CPU, which seeds that of the step where the model is."""
        seed = int(torch.randint(_MOST_SEED, (), generator=self._generator))
        stream = torch.Generator(self._device).manual_seed(seed)
        experts: dict[str, Tensor] = {}

        def draw(*shape: int) -> Tensor:
            drawn = torch.empty(shape, dtype=torch.bool, device=self._device)
            return drawn.bernoulli_(self._config.share, generator=stream)

        def mask_of(name: str) -> Tensor | None:
            shape = parameters[name].shape
            if self._config.granularity == "parameter":
                return draw(*shape)
            if self._config.granularity == "row":
                return draw(*shape[:-1], 1)
            stack = STACK.fullmatch(name)
            if stack is None:
                return None
            if stack[1] not in experts:
                experts[stack[1]] = draw(shape[0], 1, 1)
            return experts[stack[1]]

        return mask_of


def build(config: ChildConfig, method: Method[Any], setting: Setting) -> Method[Any]:
    """`method` of which a child network is trained.

    Raises:
        ConfigError: by expert, and no layer of the model has routed experts.
    """
    if config.granularity == "expert" and not setting.model.moe_layers:
        raise ConfigError(
            'trainable.granularity "expert" keeps or masks whole routed experts, and the model is dense, without any: '
            'use "row" or "parameter"'
        )
    child = Child(config, method, setting)
    how = "drawn anew in every step" if config.mode == "F" else "those with the largest Fisher information"
    what = "what trains" if config.mode == "F" else "what trains under `blocks.`"
    if config.granularity == "expert":
        what, how = "the routed experts", f"{how}; all else under `blocks.` and every router stay as they are"
    note = f"child-tuning {config.mode}, by {config.granularity}: a share of {config.share:g} of {what}, {how}"
    return replace(
        method,
        select=child.select,
        prepare=(*method.prepare, child.prepare),
        before_update=(*method.before_update, child.before_update),
        after_update=(*method.after_update, child.after_update),
        state={**method.state, "child": child},
        notes=(*method.notes, note),
    )
