"""Our models in EleutherAI's lm-evaluation-harness: `pip install finemoe[eval]`.

From Python:

    model = harness_model("runs/tiny")
    lm_eval.simple_evaluate(model, tasks=["hellaswag"])

From the shell, with all of the harness's own options:

    python -m finemoe.evaluation.harness run --model finemoe --model_args path=runs/tiny --tasks hellaswag
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finemoe.checkpoint.language_model import LanguageModel, Weights, open_language_model
from finemoe.core.errors import ConfigError, FinemoeError
from finemoe.core.logs import progress
from finemoe.evaluation.runner import Answers, Settings, answer_all, fingerprint, request_key
from finemoe.evaluation.task import Answer, Generate, Generated, LogLikelihood, Request, Rolling, Scored

_ROWS = 16
"""Of a pass, where nobody says; what comes out does not depend on it."""
_MOST_NEW_TOKENS = 256
"""What the harness writes where a task does not say."""


def harness_model(
    path: str | Path, *, batch: int = _ROWS, weights: Weights = "auto", answers: str | Path | None = None
) -> Any:
    """The model at `path` as an `lm_eval.api.model.LM`.

    `answers`: a JSON Lines file as `finemoe evaluate --out` keeps them. Requests found there, equal to the character
    and of the same model, are not answered again; new answers are added.

    Raises:
        ConfigError: lm_eval is not installed.
        FinemoeError: no model there.
    """
    return _model_class()(path=str(path), batch=batch, weights=weights, answers=answers)


class Answerer:
    """A model that answers requests in their order, each different one once."""

    def __init__(self, opened: LanguageModel, batch: int, answers: Answers | None = None) -> None:
        """`answers`: kept ones, to which new ones are added."""
        self._opened = opened
        self._settings = Settings(batch=batch)
        self._answers = answers or Answers()
        self._key = fingerprint(opened)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to `requests`, one after the other."""
        known = self._answers.known
        keys = [request_key(self._key, request, self._settings.seed) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        with progress("answering", len(missing), "requests") as advance:
            for settled, _ in answer_all(self._opened, missing, self._settings):
                for key, answer in settled:
                    self._answers.keep(key, answer, task="harness", item=key[:16])
                advance(len(settled))
        return [known[key] for key in keys]

    def close(self) -> None:
        """Close the file of kept answers."""
        self._answers.close()


def generation_request(prompt: str, options: Mapping[str, Any]) -> Request:
    """The harness's `generate_until`.

    Raises:
        ConfigError: an option that would change what is written and is not known here.
    """
    known = {"until", "max_gen_toks", "max_new_tokens", "temperature", "do_sample", "top_p", "top_k"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"generation_kwargs: {', '.join(unknown)} is not known here; known are {', '.join(sorted(known))}"
        )
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(str(stop) for stop in until if stop)
    temperature = float(options.get("temperature") or 0.0)
    drawn = bool(options.get("do_sample", temperature > 0)) and temperature > 0
    if drawn and (options.get("top_k") or options.get("top_p") not in (None, 1, 1.0)):
        raise ConfigError("generation_kwargs: top_k and top_p are not taken here: draw at a temperature alone")
    most = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _MOST_NEW_TOKENS)
    return Generate(prompt, stops, most, temperature=temperature if drawn else 0.0)


def _model_class() -> Any:
    """The class, made when asked for: its parent belongs to a package that may be missing."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError("the harness needs lm_eval: pip install 'finemoe[eval]'") from error

    class FinemoeLM(LM):
        """A model of ours."""

        def __init__(
            self,
            path: str,
            batch: int | None = None,
            weights: Weights = "auto",
            answers: str | Path | None = None,
            batch_size: Any = None,
            max_batch_size: Any = None,
            device: Any = None,
        ) -> None:
            """The last three are the harness's own options. Its batch_size counts without `batch`, if it is not 1.

            1 is what the harness says for somebody who said nothing; whoever means it gives batch=1.
            """
            super().__init__()
            said = int(batch_size) if str(batch_size).isdecimal() else 1
            rows = int(batch) if batch is not None else said if said > 1 else _ROWS
            kept = None if answers is None else Answers(Path(answers))
            self.answerer = Answerer(open_language_model(path, weights), rows, kept)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(log-likelihood, greedy) of each (context, continuation)."""
            scored = self._scored(requests, [LogLikelihood(*request.args) for request in requests])
            pairs = [(answer.logprob, answer.greedy) for answer in scored]
            self._remember("loglikelihood", requests, pairs)
            return pairs

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of each whole text."""
            scored = self._scored(requests, [Rolling(request.args[0]) for request in requests])
            values = [answer.logprob for answer in scored]
            self._remember("loglikelihood_rolling", requests, values)
            return values

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """The completion of each (prompt, options), without what stopped it."""
            asked = [generation_request(*request.args) for request in requests]
            texts = [answer.texts[0] for answer in self.answerer.answer(asked) if isinstance(answer, Generated)]
            self._remember("generate_until", requests, texts)
            return texts

        def _scored(self, requests: Sequence[Any], asked: Sequence[Request]) -> list[Scored]:
            return [answer for answer in self.answerer.answer(asked) if isinstance(answer, Scored)]

        def _remember(self, kind: str, requests: Iterable[Any], answers: Iterable[Any]) -> None:
            """For the harness's own cache of answers."""
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial(kind, request.args, answer)

    return FinemoeLM


def main() -> None:
    """The harness's own command line, which then knows `--model finemoe`.

    Raises:
        SystemExit: with the message of a mistake that the user can mend.
    """
    try:
        cls = _model_class()
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model

        register_model("finemoe")(cls)
        cli_evaluate()
    except FinemoeError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
