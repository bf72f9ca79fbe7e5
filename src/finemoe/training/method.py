"""Method: what a way of training fills in. The loop itself is never copied, and knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from finemoe.data.batch import Batch
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer
from finemoe.training.objective import Objective
from finemoe.training.report import StepReport

BatchT = TypeVar("BatchT", bound=Batch)
BatchT_co = TypeVar("BatchT_co", bound=Batch, covariant=True)


class TrainingData(Protocol[BatchT_co]):
    """What is trained on."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the text; it is saved with the run."""
        ...

    @property
    def sequences_per_epoch(self) -> int:
        """Positions after which everything was read once: what `training.epochs` counts."""
        ...

    @property
    def companions(self) -> Mapping[str, str]:
        """Texts by file name that belong beside the tokenizer and are not in `start_from`: a chat template."""
        ...

    @property
    def report(self) -> Mapping[str, Any]:
        """What was read and left out, for data.json. A key that ends in `sha256` must not change when a run resumes."""
        ...

    def batch(self, position: int, num_sequences: int) -> BatchT_co:
        """Sequences `position` to `position + num_sequences`, counted from the start of the run.

        A pure function of its arguments, and of what the method saves as its state: a position is then all that a
        resume needs.
        """
        ...

    def token_frequencies(self) -> Tensor:
        """[ids] int64: how often each id of the tokenizer occurs; asked for by balanced hash tables only."""
        ...


@dataclass(frozen=True)
class Group:
    """How a parameter is trained: factors of the optimizer's own settings. Equal groups share one."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0


def everything(name: str) -> Group | None:
    """Train all parameters alike."""
    return Group()


def nothing(report: StepReport) -> Sequence[str]:
    """Nothing to say."""
    return ()


@dataclass(frozen=True)
class Selected:
    """A parameter that is trained, and how."""

    name: str
    parameter: nn.Parameter
    group: Group


class StandIn(Protocol):
    """Trains tensors of its own in the place of the model's: some rows of a stack, factors of a low rank.

    The model computes with its own weights at all times, and is saved with them. The stand-in takes their gradient,
    with a hook, as soon as the backward pass has it, and writes what became of its tensors back after every update.
    """

    def __call__(self, model: Transformer, selected: list[Selected]) -> list[Selected]:
        """What the optimizer steps instead of `selected`."""
        ...


class BeforeUpdate(Protocol):
    """Between the backward pass and the update, in order."""

    def __call__(self, parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        """Change `.grad` in place.

        Args:
            parameters: by name, those that are trained.
            norm: scalar, of all their gradients together as the backward pass left them.

        Returns:
            figures by name for the report of the step; a figure that is not finite stops the run.
        """
        ...


class AfterUpdate(Protocol):
    """After the optimizer has stepped, in order: loss-free balancing, rows that must stay as they were."""

    def __call__(self, model: Transformer, load: Mapping[int, Tensor], progress: float) -> None:
        """Change `model` in place.

        Args:
            model: after the update.
            load: [experts] assignments of the whole step, by layer index.
            progress: share of the run done before this step.
        """
        ...


class Measured(Protocol):
    """What a measurement found."""

    @property
    def headline(self) -> float | None:
        """The figure that the progress line shows; None where it could not be measured."""
        ...

    def to_record(self) -> dict[str, Any]:
        """JSON-able figures for a line of metrics.jsonl."""
        ...

    def to_summary(self) -> dict[str, Any]:
        """The same of the last measurement, for summary.json."""
        ...


_TAKEN = {"kind", "step", "tokens", "seconds", "training_loss"}


@dataclass(frozen=True)
class Figures:
    """A measurement that is a few numbers by name, the first of them its headline."""

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if wrong := sorted(_TAKEN & set(self.values)):
            raise ValueError(f"the run has figures of that name itself: {', '.join(wrong)}; choose others")

    @property
    def headline(self) -> float:
        """The first value."""
        return next(iter(self.values.values()))

    def to_record(self) -> dict[str, Any]:
        """As they are."""
        return dict(self.values)

    def to_summary(self) -> dict[str, Any]:
        """Under `final_` and their names."""
        return {f"final_{name}": value for name, value in self.values.items()}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint keeps of a part of a method."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able."""


class Stateful(Protocol):
    """A part of a method that changes while it trains, or that cannot be made again from the recipe."""

    def state(self) -> Saved:
        """All that going on from here needs. It may be its own: tensors and values are copied before the next step."""
        ...

    def restore(self, saved: Saved) -> None:
        """Be as `state` found it, on whatever device it works; copies the tensors."""
        ...


class Prepare(Protocol):
    """Before anything is selected or optimized, in order, on the model's device and at the precision of training."""

    def __call__(self, model: Transformer, begins: bool) -> None:
        """Keep a reference, add parameters.

        Args:
            model: as the run begins with it; where `begins` is False, of the same shapes, with weights that mean
                nothing: a checkpoint's weights, and the method's state, are put in afterwards.
            begins: the run begins here. What is costly and saved as state need be computed only then.
        """
        ...


@dataclass(frozen=True)
class Prompt:
    """A prompt, as people are shown it before anybody has answered."""

    ids: tuple[int, ...]
    """What the model reads."""
    right: tuple[str, ...] = ()
    """What the record holds to be right; any of them."""


@dataclass(frozen=True)
class Shown:
    """What the live line has in place of the loss, where that says little."""

    title: str
    names: tuple[str, ...]
    """Terms or figures of a step; of several, the numbers follow each other: 71/2/27 %. A step that lacks one of them
    shows nothing."""
    percent: bool = False
    """They are shares."""


class Note(str):
    """A sentence of `Method.warns` that is good to know, and warns of nothing."""

    __slots__ = ()


@dataclass(frozen=True)
class Method(Generic[BatchT]):
    """A way of training: what the trainer asks, in the order of a run."""

    data: TrainingData[BatchT]
    objective: Objective[BatchT]
    measure: Callable[[Transformer], Measured]
    """How good the model is now. Called in eval mode without gradients; what it draws at random leaves no trace."""
    select: Callable[[str], Group | None] = everything
    """By parameter name: how it is trained, or None to freeze it. Experts are stacked: none is chosen alone here."""
    checks: tuple[Callable[[Transformer], None], ...] = ()
    """Before all else, by names and shapes alone: the model may have no memory yet."""
    prepare: tuple[Prepare, ...] = ()
    """With any, every process holds the whole model for as long as they take."""
    stand_ins: tuple[StandIn, ...] = ()
    """After `prepare` and `select`, in order."""
    keeps_base: bool = False
    """The weights that the run began with are asked for again when it resumes, before those of the checkpoint."""
    before_update: tuple[BeforeUpdate, ...] = ()
    after_update: tuple[AfterUpdate, ...] = ()
    state: Mapping[str, Stateful] = field(default_factory=dict)
    """By a name of its own, without a slash: saved in every checkpoint, and restored."""
    writes: Mapping[str, Callable[[], Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    """By the name of a .jsonl file of the run: what came up since it was last asked for, each with its `step`."""
    warns: Callable[[StepReport], Sequence[str]] = nothing
    """Sentences about a step that people should read at once: warnings, or a `Note`."""
    shows: tuple[Shown, ...] = ()
    """What the live line has in place of the loss, where it says little; what matters most comes first."""
    hurry: Callable[[], object] = lambda: None
    """When a person asks the run to end, in a signal handler, so it sets a flag at most: what waits for something
    elsewhere that does not answer raises OutageError instead."""
    finish: Callable[[], object] = lambda: None
    """When the last step is done and the run is whole: what served the steps alone goes."""
    close: Callable[[], object] = lambda: None
    """When the run ends, well or not: processes that it started."""
    asks: Callable[[], Iterator[Prompt]] | None = None
    """Where the model writes itself what it learns, so that there is no batch without it: what it is asked, in the
    order of the first epoch. None: batches can be shown."""
    notes: tuple[str, ...] = ()
    """Lines for people at the start of a run: what trains besides the headline. Silently off, it would cost a run."""

    def __post_init__(self) -> None:
        if wrong := [name for name in self.state if "/" in name]:
            raise ValueError(f"parts of a method's state are saved as NAME/TENSOR, so no NAME has a slash: {wrong}")
