"""What the experts of one layer take: counts of their tokens, and how far those are from what the text holds.

Everything is counted in one pass over the text, in memory that the text's length does not decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from finemoe.analysis.usage import pair_counts

LEAST_COUNT = 5
"""Times an expert must have taken a token for its lift to mean anything."""
LEAST_SHARE = 0.002
"""And the share of the expert's assignments that it must make up."""
_PENDING = 1 << 20  # pairs kept before they are summed: 24 bytes each

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@final
class PairSums:
    """For each pair of expert and token that occurs: how often, and the sum of its gate weights.

    Memory: 24 bytes a distinct pair, of which there are at most experts · vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._keys: Ints = np.zeros(0, dtype=np.int64)
        self._sums: Floats = np.zeros((0, 2))
        self._pending: list[tuple[Ints, Floats]] = []

    def add(self, experts: Ints, tokens: Ints, gates: Floats) -> None:
        """Count assignments; the three arrays have one entry each."""
        sums = np.stack((np.ones(len(gates)), gates), axis=1)
        self._pending.append((experts * self._vocab_size + tokens, sums))
        if sum(len(keys) for keys, _ in self._pending) >= _PENDING:
            self._compact()

    def of(self, expert: int) -> tuple[Ints, Ints, Floats]:
        """Its tokens in ascending order, how often it took each, and the gate weight it gave each in sum."""
        self._compact()
        first, last = np.searchsorted(self._keys, (expert * self._vocab_size, (expert + 1) * self._vocab_size))
        sums = self._sums[first:last]
        return self._keys[first:last] % self._vocab_size, sums[:, 0].astype(np.int64), sums[:, 1]

    def _compact(self) -> None:
        if not self._pending:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._pending)])
        values = np.concatenate([self._sums, *(sums for _, sums in self._pending)])
        self._pending = []
        self._keys, place = np.unique(keys, return_inverse=True)
        columns = [np.bincount(place, weights=values[:, i], minlength=len(self._keys)) for i in range(2)]
        self._sums = np.stack(columns, axis=1)


@final
class HighestGates:
    """The places in the text where each expert had its highest gate weights; of equal ones the earlier."""

    def __init__(self, num_experts: int, most: int) -> None:
        self._most = most
        self.gates: Floats = np.full((num_experts, most), -np.inf)
        """[experts, most], falling; minus infinity where there is none."""
        self.places: Ints = np.full((num_experts, most), -1, dtype=np.int64)
        """[experts, most]; -1 where there is none."""

    def add(self, experts: Ints, gates: Floats, places: Ints) -> None:
        """Consider assignments that stand at `places` of the text."""
        better = gates >= self.gates[experts, -1]
        old = self.places >= 0
        owner = np.concatenate((np.nonzero(old)[0], experts[better]))
        gate = np.concatenate((self.gates[old], gates[better]))
        place = np.concatenate((self.places[old], places[better]))
        order = np.lexsort((place, -gate, owner))
        owner, gate, place = owner[order], gate[order], place[order]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        kept = rank < self._most
        self.gates.fill(-np.inf)
        self.places.fill(-1)
        self.gates[owner[kept], rank[kept]] = gate[kept]
        self.places[owner[kept], rank[kept]] = place[kept]


@final
class LayerTally:
    """All that is counted of one MoE layer."""

    def __init__(self, num_experts: int, num_domains: int, vocab_size: int, contexts: int) -> None:
        self.counts: Ints = np.zeros((num_domains, num_experts), dtype=np.int64)
        """[domains, experts] assignments."""
        self.gates: Floats = np.zeros(num_experts)
        """[experts] sum of gate weights."""
        self.joint: Ints = np.zeros((num_experts, num_experts), dtype=np.int64)
        """[experts, experts] tokens that went to both; the diagonal is the load."""
        self.pairs = PairSums(vocab_size)
        self.highest = HighestGates(num_experts, contexts)

    def add(self, domain: int, tokens: Ints, places: Ints, experts: Ints, gates: Floats) -> None:
        """Count a stretch of text of one domain.

        Args:
            domain: its number.
            tokens: [tokens] ids.
            places: [tokens] where in the whole text each stands.
            experts: [tokens, k] what each was sent to.
            gates: [tokens, k] with what weight.
        """
        num_experts, k = len(self.gates), experts.shape[1]
        flat = experts.reshape(-1)
        weights = gates.reshape(-1)
        self.counts[domain] += np.bincount(flat, minlength=num_experts)
        self.gates += np.bincount(flat, weights=weights, minlength=num_experts)
        self.joint += pair_counts(experts, num_experts)
        self.pairs.add(flat, np.repeat(tokens, k), weights)
        self.highest.add(flat, weights, np.repeat(places, k))


def membership(experts: Ints, num_experts: int) -> NDArray[np.bool_]:
    """[tokens, experts]: whether a token went there, from `experts [tokens, k]`."""
    chosen = np.zeros((len(experts), num_experts), dtype=bool)
    np.put_along_axis(chosen, experts, True, axis=1)
    return chosen


@dataclass(frozen=True)
class TokenLift:
    """A token that an expert takes, against how common it is."""

    token: int
    count: int
    """Times the expert took it."""
    share: float
    """P(token | expert): its part of the expert's gate weight."""
    lift: float
    """`share` over the token's part of the whole text."""


def token_lifts(tally: LayerTally, expert: int, base: Ints, most: int) -> list[TokenLift]:
    """The tokens that an expert takes most against their base rate, highest lift first, at most `most`.

    A token counts if the expert took it at least `LEAST_COUNT` times and it makes up `LEAST_SHARE` of its assignments:
    the lift of what was seen once is an accident. Of equal lifts the larger share goes first, then the smaller id.

    Args:
        tally: of the layer.
        expert: its number.
        base: [vocab] how often each token stands in the text.
        most: tokens to return.
    """
    tokens, counts, gates = tally.pairs.of(expert)
    total = gates.sum()
    enough = counts >= max(LEAST_COUNT, LEAST_SHARE * counts.sum())
    if not total or not enough.any():
        return []
    tokens, counts, share = tokens[enough], counts[enough], gates[enough] / total
    lift = share / (base[tokens] / base.sum())
    order = np.lexsort((tokens, -share, -lift))[:most]
    return [TokenLift(int(tokens[i]), int(counts[i]), float(share[i]), float(lift[i])) for i in order]


@dataclass(frozen=True)
class DomainShares:
    """How the experts of one layer divide the domains. Arrays are over experts where not said otherwise."""

    share: Floats
    """[domains, experts] P(domain | expert); 0 for an expert that took nothing."""
    rate: Floats
    """[domains, experts] part of the domain's tokens that went to the expert."""
    lift: Floats
    """[domains, experts] `share` over the domain's part of the text."""
    specialization: Floats
    """1 - H(q) / log D, q the expert's rates made to sum to one: 0 takes of every domain alike, 1 of one alone. NaN for
    an expert that took nothing, or where there is one domain."""
    divergence: Floats
    """KL(P(domain | expert) || P(domain)) in bits; NaN for an expert that took nothing."""

    @property
    def score(self) -> float:
        """Mean specialisation of the layer's experts that took anything; NaN where there is none."""
        known = self.specialization[~np.isnan(self.specialization)]
        return float(known.mean()) if len(known) else float("nan")


def domain_shares(counts: Ints, tokens: Ints) -> DomainShares:
    """From `counts [domains, experts]` assignments and `tokens [domains]`, none of them 0."""
    load = counts.sum(axis=0)
    share = counts / np.maximum(load, 1)
    base = tokens / tokens.sum()
    rate = counts / tokens[:, None]
    evened = rate / np.where(load, rate.sum(axis=0), 1)
    divergence = _entropy_terms(share, base[:, None])
    specialization = np.full(len(load), np.nan)
    if len(tokens) > 1:
        specialization = np.clip(1 + _entropy_terms(evened, 1.0) / np.log2(len(tokens)), 0, 1)
    nothing = load == 0
    specialization[nothing], divergence[nothing] = np.nan, np.nan
    return DomainShares(share, rate, share / base[:, None], specialization, divergence)


def _entropy_terms(part: Floats, base: Floats | float) -> Floats:
    """Sum over the first axis of part · log2(part / base), 0 where part is 0."""
    logs = np.log2(np.where(part > 0, part / base, 1))
    total: Floats = (part * logs).sum(axis=0)
    return total


def mutual_information(counts: Ints) -> tuple[float, float]:
    """Bits that an assignment's expert tells of its domain, and what that would be by chance alone.

    The first is the mean divergence of the experts from the layer's own mix of domains, weighted by load. The second is
    the Miller-Madow bias (D - 1)(E - 1) / (2 n ln 2): what counts of n independent assignments show though nothing is
    there. Assignments of one text are not independent, so a figure not well above it says nothing.
    """
    total = counts.sum()
    if not total:
        return float("nan"), float("nan")
    joint = counts / total
    product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    terms = joint * np.log2(np.where(joint > 0, joint / np.where(product > 0, product, 1), 1))
    used = (counts.sum(axis=0) > 0).sum() - 1
    domains = (counts.sum(axis=1) > 0).sum() - 1
    return float(terms.sum()), float(used * domains / (2 * total * np.log(2)))


def overlap(first: Ints, second: Ints, num_experts: int) -> Floats:
    """[experts] Jaccard overlap of the tokens that go to each expert under two choices `[tokens, k]` of one text.

    NaN for an expert that neither choice uses.
    """
    one, other = membership(first, num_experts), membership(second, num_experts)
    together = (one & other).sum(axis=0)
    either = (one | other).sum(axis=0)
    result = np.full(num_experts, np.nan)
    np.divide(together, either, out=result, where=either > 0)
    return result
