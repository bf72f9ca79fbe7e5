"""How methods on conversations are measured: on what was held out, on general text, and by answers to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
from torch import Tensor

from finemoe.data import PreparedData, prepare
from finemoe.data.corpora import CorpusConfig
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine
from finemoe.generation.runner import cache_bytes
from finemoe.methods.conversations import Conversations
from finemoe.methods.setting import Setting
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer
from finemoe.training.objective import Terms
from finemoe.training.report import dead_share, mean_max_vio
from finemoe.training.validation import validate

_TOKENS = 8192  # of general text, per forward pass


@dataclass(frozen=True)
class HeldOutFigures:
    """Means over what was held out, the loss first, and answers to be read."""

    values: Mapping[str, float | None]
    """None: of nothing that was held out it could be said."""
    load: Mapping[int, Tensor]
    samples: tuple[Mapping[str, Any], ...] = ()

    @property
    def headline(self) -> float | None:
        """The loss."""
        return next(iter(self.values.values()))

    def to_record(self) -> dict[str, Any]:
        """With the load of experts, and the samples."""
        record: dict[str, Any] = dict(self.values)
        if self.load:
            record["max_vio"] = mean_max_vio(self.load)
            record["dead_experts"] = dead_share(self.load)
            record["load"] = {str(layer): load.tolist() for layer, load in self.load.items()}
        if self.samples:
            record["samples"] = [dict(sample) for sample in self.samples]
        return record

    def to_summary(self) -> dict[str, Any]:
        """Figures under `final_` and their names, and the last samples."""
        figures: dict[str, Any] = {f"final_{name}": value for name, value in self.values.items()}
        if self.load:
            figures |= {"max_vio": mean_max_vio(self.load), "dead_experts": dead_share(self.load)}
        return {**figures, **({"samples": [dict(one) for one in self.samples]} if self.samples else {})}


@dataclass(frozen=True)
class Sampling:
    """Held-out questions that the model answers while it learns, greedily."""

    tokenizer: Tokenizer
    prompts: tuple[tuple[int, ...], ...]
    tokens: int

    @staticmethod
    def of(data: Conversations, count: int, tokens: int) -> Sampling:
        """The first `count` questions held out, each up to where its first answer begins."""
        prompts, packer = [], data.validation
        for item in packer.fitted.items[:count]:
            ids, trained = packer.stored.segment(int(item) * packer.stored.segments_per_item)
            first = int(np.flatnonzero(trained)[0])
            prompts.append(tuple(ids[:first].tolist()))
        return Sampling(data.tokenizer, tuple(one for one in prompts if one), tokens)

    def __call__(self, model: Transformer) -> tuple[Mapping[str, Any], ...]:
        """Answers of `model`, which is in eval mode; `ended`: it stopped by itself."""
        if not self.prompts:
            return ()
        tokenizer = self.tokenizer
        engine = Engine(
            model,
            end_of_text_id=tokenizer.end_of_text_id,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
            cache_bytes=cache_bytes(model, [len(prompt) + self.tokens for prompt in self.prompts]),
            tokenizer=tokenizer,
        )
        sampling = SamplingConfig(temperature=0, max_new_tokens=self.tokens)
        done = engine.generate(self.prompts, sampling)
        return tuple(
            {
                "prompt": tokenizer.decode(prompt),
                "answer": tokenizer.decode(one.completion),
                "ended": one.finish_reason == "stop",
            }
            for prompt, one in zip(self.prompts, done, strict=True)
        )


class HasHeldOut(Protocol):
    """Data of which some was held out."""

    def held_out(self) -> Iterator[Any]:
        """Batches, always the same in the same order."""
        ...


class HasFigures(Protocol):
    """An objective with figures beside its headline."""

    @property
    def headline(self) -> str:
        """The term that reports call the loss."""
        ...

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the terms that are measured too."""
        ...

    def counts(self, batch: Any) -> dict[str, float]:
        """As in `training.objective.Objective`."""
        ...

    def terms(self, model: Transformer, batch: Any) -> Terms:
        """As in `training.objective.Objective`."""
        ...


@final
@dataclass(frozen=True)
class GeneralText:
    """Documents that have nothing to do with what is learnt: what the model loses of what it knew."""

    prepared: PreparedData

    @staticmethod
    def of(corpus: CorpusConfig | None, setting: Setting) -> GeneralText | None:
        """Those that are held out of `corpus`; None where none is named.

        Raises:
            DataError: they cannot be read.
        """
        if corpus is None:
            return None
        return GeneralText(prepare(setting.data.model_copy(update={"corpus": corpus, "packing": "concatenate"})))

    def __call__(self, model: Transformer) -> float:
        """Nats per token."""
        per_pass = max(1, _TOKENS // self.prepared.config.sequence_length)
        batches = self.prepared.validation_batches(per_pass)
        return validate(model, batches, isolate_documents=False, bytes_per_token=1.0).loss


@dataclass(frozen=True)
class HeldOut:
    """Measures an objective, and its figures, on what was held out."""

    data: HasHeldOut
    objective: HasFigures
    sampling: Sampling | None = None
    general: GeneralText | None = None

    def __call__(self, model: Transformer) -> HeldOutFigures:
        """Means over all of it."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        load: dict[int, Tensor] = {}
        wanted = (self.objective.headline, *self.objective.figures)
        for batch in self.data.held_out():
            batch = batch.to(model.embedding.weight.device)
            terms = self.objective.terms(model, batch)
            for name, count in self.objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
            for name in wanted:
                sums[name] = sums.get(name, 0.0) + terms.sums[name].item()
            for layer, record in terms.routing.items():
                load[layer] = load[layer] + record.load.cpu() if layer in load else record.load.cpu()
        means = {name: sums[name] / counts[name] for name in wanted if counts[name]}
        headline, *others = means
        values = {"validation_loss": means[headline], **{f"validation_{name}": means[name] for name in others}}
        if self.general is not None:
            values["general_loss"] = self.general(model)
        return HeldOutFigures(values, load, self.sampling(model) if self.sampling is not None else ())
