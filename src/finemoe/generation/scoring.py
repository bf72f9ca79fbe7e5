"""How probable given tokens are: many windows through one model, in passes of similar length, each window on its own.

A window's score does not depend on what shares its pass, nor on how many rows a pass may have: every pass is padded to
where the C++ kernels go one and the same way for every row (`steady`). On other devices and in other precisions the
last bits may differ; results say which it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError
from finemoe.generation.steady import FEW_ROWS, LEAST_WIDTH, width_for
from finemoe.model.logprobs import token_logprobs
from finemoe.model.transformer import Transformer
from finemoe.text.fill_in_the_middle import middle_marks

MOST_TOKENS = 8192
"""Of one pass, padding included, unless a single row is longer."""
DEFAULT_REACH = 2048
"""Window of a model that does not say how long its sequences may be."""
_MOST_LOGITS = 1 << 21
"""Logits at once: 8 MiB in float32."""


@dataclass(frozen=True)
class Window:
    """Tokens, the last `num_targets` of which are asked for; at least one stands before them."""

    tokens: tuple[int, ...]
    num_targets: int


@dataclass(frozen=True)
class WindowScore:
    """What the model makes of the tokens asked for."""

    logprob: float
    """Nats, summed in float64."""
    greedy: bool
    """Each was the most probable one; of equals, all are."""


@dataclass(frozen=True)
class Windows:
    """The windows of one request. Their scores add up."""

    windows: tuple[Window, ...]
    truncated: bool = False
    """Something was cut from the left of the context."""

    @property
    def num_targets(self) -> int:
        """Tokens asked for."""
        return sum(window.num_targets for window in self.windows)


def reach_of(opened: LanguageModel) -> int:
    """Most tokens that the model reads at once here."""
    return opened.reach or DEFAULT_REACH


def continuation_windows(opened: LanguageModel, context: str, continuation: str) -> Windows:
    """The continuation after its context, tokenised together and split where the context's own tokens end.

    As lm-evaluation-harness does it: blanks that end the context move to the continuation, so that a token such as
    ` Paris` stays whole. A token that straddles the border counts with the side that the number of the context's
    tokens puts it on. What is read is then still the text as it stands, where the harness reads the context's own
    tokens. Where the border swallows the whole continuation, its last token is asked for. An empty context is the token
    that begins a document. What is too long loses tokens from the left.

    Raises:
        ConfigError: there is nothing to ask for.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before = opened.encode(bare) if bare else []
    whole = opened.encode(bare + continuation) if bare else opened.tokenizer.encode(continuation)
    if not whole:
        raise ConfigError("a continuation without a token cannot be scored: the task asks for an empty text")
    if not before:
        if whole[0] != opened.first_id or len(whole) == 1:
            whole = [opened.first_id, *whole]
        border = 1
    else:
        border = min(len(before), len(whole) - 1)
    reach, count = reach_of(opened), len(whole) - border
    if count > reach:
        cut = rolling_windows(whole[border:], whole[border - 1], reach)
        return Windows(tuple(cut), truncated=True)
    return Windows((Window(tuple(whole[-(reach + 1) :]), count),), truncated=len(whole) > reach + 1)


def text_windows(opened: LanguageModel, text: str) -> Windows:
    """A whole text, each of its tokens asked for once; none for an empty text."""
    ids = opened.tokenizer.encode(text)
    return Windows(tuple(rolling_windows(ids, opened.first_id, reach_of(opened))))


def rolling_windows(ids: Sequence[int], first_id: int, length: int) -> Iterator[Window]:
    """Windows over `ids`, each of which is a target once; the model reads at most `length` tokens at a time.

    The first window begins with `first_id`, every other with the token before its targets. The last is filled up with
    as much of what came before as fits (lm-evaluation-harness, `loglikelihood_rolling`).
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        begin = max(0, end - length - 1) if start else 0
        tokens = (first_id, *ids[:end]) if start == 0 else tuple(ids[begin:end])
        yield Window(tokens, end - start)


def middle_ids(opened: LanguageModel, prefix: str, suffix: str, room: int) -> tuple[list[int], bool]:
    """A prompt of at most `room` ids that asks for what stands between prefix and suffix, and whether it had to be cut.

    Prefix, suffix, middle: the gap is written where the text ends. Cut are the beginning of the prefix and, beyond a
    quarter of the room, the end of the suffix: what is far from the gap.

    Raises:
        ConfigError: the tokenizer has no tokens for it.
    """
    mark = middle_marks(opened.tokenizer)
    before, after = opened.tokenizer.encode(prefix), opened.tokenizer.encode(suffix)
    lead = [*opened.encode(""), mark.begin]
    marks = len(lead) + 2
    behind = after[: max(1, room // 4, room - marks - len(before))]
    kept = max(0, room - marks - len(behind))
    cut = len(behind) < len(after) or kept < len(before)
    return [*lead, *before[len(before) - min(kept, len(before)) :], mark.hole, *behind, mark.end], cut


@torch.inference_mode()
def score(
    model: Transformer, windows: Sequence[Window], rows: int, most_tokens: int = MOST_TOKENS
) -> Iterator[tuple[list[tuple[int, WindowScore]], int]]:
    """Score every window; yield after each pass what it settled, as (index into `windows`, score), and tokens read.

    What one row reads serves every window that reads the same or less of it: the one-token options of a question are
    one row. Longest first, so that a lack of memory shows at once.

    Args:
        model: in eval mode.
        windows: of any length.
        rows: most in one pass.
        most_tokens: most in one pass, padding included.
    """
    served = _rows(windows)
    for batch in _passes(list(served), rows, most_tokens):
        width = width_for(model, len(batch), len(batch[0]))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=model.head_weight.device)
        hidden = model(tokens).hidden
        asked = [(row, index) for row, inputs in enumerate(batch) for index in served[inputs]]
        yield _settle(model, hidden, asked, windows), sum(map(len, batch))


def _rows(windows: Sequence[Window]) -> dict[tuple[int, ...], list[int]]:
    """What rows have to be read, longest first, and which windows each serves.

    In the order of dictionaries, everything that begins with x follows x: so x has a longer one exactly if the next is.
    """
    wanted: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, window in enumerate(windows):
        wanted[window.tokens[:-1]].append(index)
    served: dict[tuple[int, ...], list[int]] = {}
    longest: tuple[int, ...] = ()
    for inputs in sorted(wanted, reverse=True):
        if longest[: len(inputs)] != inputs:
            longest = inputs
            served[longest] = []
        served[longest] += wanted[inputs]
    return {row: served[row] for row in sorted(served, key=lambda row: (-len(row), row))}


def _passes(rows: list[tuple[int, ...]], most_rows: int, most_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """`rows`, longest first, cut into passes."""
    start = 0
    while start < len(rows):
        count = min(most_rows, max(1, most_tokens // max(len(rows[start]), LEAST_WIDTH)))
        yield rows[start : start + count]
        start += count


def _settle(
    model: Transformer, hidden: Tensor, asked: list[tuple[int, int]], windows: Sequence[Window]
) -> list[tuple[int, WindowScore]]:
    """`asked`: row of `hidden [rows, width, hidden]` and index of a window that it serves."""
    states: list[Tensor] = []
    targets: list[int] = []
    counts: list[int] = []
    for row, index in asked:
        window = windows[index]
        last = len(window.tokens) - 1
        states.append(hidden[row, last - window.num_targets : last])
        targets += window.tokens[-window.num_targets :]
        counts.append(window.num_targets)
    logprobs, greedy = _logprobs(model, torch.cat(states), torch.tensor(targets, device=hidden.device))
    parts = zip(asked, logprobs.split(counts), greedy.split(counts), strict=True)
    return [(index, WindowScore(float(part.double().sum()), bool(best.all()))) for (_, index), part, best in parts]


def _logprobs(model: Transformer, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs` in pieces of about equal size, none of which has fewer than `FEW_ROWS` rows."""
    count = len(targets)
    most = max(FEW_ROWS, _MOST_LOGITS // model.config.vocab_size)
    pieces = -(-count // most)
    found = []
    for states_piece, targets_piece in zip(states.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
        rows = len(targets_piece)
        index = torch.arange(max(rows, FEW_ROWS), device=states.device).clamp(max=rows - 1)
        logprobs, greedy = token_logprobs(model, states_piece[index], targets_piece[index])
        found.append((logprobs[:rows].cpu(), greedy[:rows].cpu()))
    return torch.cat([logprobs for logprobs, _ in found]), torch.cat([greedy for _, greedy in found])
