"""How positions share kernel calls: a checked-in cost model merges the ways through the network until calls are worth making.

Positions that go through all layers alike (equal widths, equal phase) stack without loss, but near the border of deep layers
hardly two do. Merging classes widens their regions to the larger ones, and saves calls. The classes of rows and of columns
multiply, so one axis is merged as if the other were like it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conelens.changed import AxisClass, AxisSpans, axis_class, signatures
from conelens.execution import Turn
from conelens.graph import Graph
from conelens.operators import Conv2d, Operator

# One of so many classes merges at a time: a few merges at once where there are hundreds, one by one where there are few.
AT_ONCE = 16


@dataclass(frozen=True)
class Rates:
    """What the model believes of a device; only ratios matter."""

    macs: float  # multiply-accumulates per second of a stock convolution
    call: float  # seconds that one step costs whatever its size
    weights: float  # bytes per second at which a convolution reads, or lays out anew, its filters on each call


RATES = {"cpu": Rates(1.0e11, 4.0e-5, 1.0e10), "cuda": Rates(1.5e14, 1.5e-5, 2.0e12)}


class _Layer:
    """One convolution along one axis: widths and leads of all classes, and what a class of them costs."""

    def __init__(self, graph: Graph, turn: Turn, spans: AxisSpans, groups: Sequence[np.ndarray], delta: bool) -> None:
        op = turn.op
        assert isinstance(op, Conv2d)
        self.op, self.axis, self.delta = op, spans.axis, delta
        self.channels = float(op.weight.shape[0] * op.weight.shape[1])
        low, high = spans.spans[turn.node]
        begin, end = spans.spans[turn.sources[0]]
        lead = begin - (low * op.stride[spans.axis] - op.padding[spans.axis])
        self.out, self.held, self.most = (_largest(values, groups) for values in (high - low, end - begin, lead))
        self.least = -_largest(-lead, groups)

    def taps(self, i: np.ndarray | int, j: np.ndarray | int) -> np.ndarray:
        """(output, tap) pairs along the axis for one position of class ``i`` merged with class ``j``."""
        out, held = np.maximum(self.out[i], self.out[j]), np.maximum(self.held[i], self.held[j])
        kernel = self.op.taps(self.axis)
        if not self.delta:
            return out * kernel
        lead = np.minimum(self.least[i], self.least[j])
        held = held + np.maximum(self.most[i], self.most[j]) - lead
        stride, dilation = self.op.stride[self.axis], self.op.dilation[self.axis]
        total = np.zeros_like(out)
        for tap in range(kernel):
            first = -((tap * dilation - lead) // stride)
            last = (held - 1 + lead - tap * dilation) // stride + 1
            total += np.maximum(np.minimum(last, out) - np.maximum(first, 0), 0)
        return total

    def merge(self, i: int, j: int) -> None:
        """Class ``i`` takes in class ``j``."""
        for held, pick in ((self.out, max), (self.held, max), (self.least, min), (self.most, max)):
            held[i] = pick(held[i], held[j])


def _largest(values: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([values[members].max() for members in groups])


def axis_classes(graph: Graph, turns: Sequence[Turn], spans: AxisSpans, rates: Rates, delta: bool) -> list[AxisClass]:
    """Classes of the positions of one axis for the ``turns`` that run on regions."""
    groups = signatures(graph, spans, [turn.node for turn in turns])
    layers = [_Layer(graph, turn, spans, groups, delta) for turn in turns if isinstance(turn.op, Conv2d)]
    per_pair = sum(_call_seconds(turn.op, rates) for turn in turns if not turn.passed)
    groups = _merged(groups, layers, per_pair * rates.macs)
    return [axis_class(graph, spans, np.sort(members)) for members in groups]


def _call_seconds(op: Operator, rates: Rates) -> float:
    weights = op.weight.numel() * op.weight.element_size() if isinstance(op, Conv2d) else 0
    return rates.call + weights / rates.weights


def _merged(groups: list[np.ndarray], layers: list[_Layer], overhead: float) -> list[np.ndarray]:
    """Greedy: the cheapest merges, while each costs less than the calls it saves, ``overhead`` MACs per pair of classes."""
    alive = np.arange(len(groups))
    count = np.array([float(len(members)) for members in groups])
    totals = np.array([float((layer.taps(alive, alive) * count).sum()) for layer in layers])
    weights = np.array([layer.channels for layer in layers])
    extra = np.zeros((len(groups), len(groups), len(layers)))
    for i in range(len(groups)):
        _compare(extra, layers, count, i, alive)
    while len(alive) > 1:
        worse = extra[np.ix_(alive, alive)]
        cost = (worse**2) @ weights + worse @ (2 * weights * totals)
        cost[np.tril_indices(len(alive))] = np.inf
        saved = overhead * (len(alive) ** 2 - (len(alive) - 1) ** 2)
        pairs = _cheapest(cost, saved, max(1, len(alive) // AT_ONCE))
        if not pairs:
            break
        merged = [(int(alive[a]), int(alive[b])) for a, b in pairs]
        alive = np.setdiff1d(alive, [j for _, j in merged])
        for i, j in merged:
            totals = totals + extra[i, j]
            groups[i] = np.concatenate([groups[i], groups[j]])
            for layer in layers:
                layer.merge(i, j)
            count[i] += count[j]
        for i, _ in merged:
            _compare(extra, layers, count, i, alive)
    return [groups[i] for i in alive]


def _cheapest(cost: np.ndarray, limit: float, most: int) -> list[tuple[int, int]]:
    """Up to ``most`` disjoint pairs of the lowest cost below ``limit``."""
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for place in np.argsort(cost, axis=None, kind="stable")[: 4 * most]:
        a, b = divmod(int(place), len(cost))
        if cost[a, b] >= limit or len(pairs) == most:
            break
        if a not in taken and b not in taken:
            pairs.append((a, b))
            taken |= {a, b}
    return pairs


def _compare(extra: np.ndarray, layers: list[_Layer], count: np.ndarray, i: int, others: np.ndarray) -> None:
    """Additional taps per layer if class ``i`` and each of ``others`` were one."""
    for number, layer in enumerate(layers):
        apart = layer.taps(i, i) * count[i] + layer.taps(others, others) * count[others]
        both = layer.taps(i, others) * (count[i] + count[others]) - apart
        extra[i, others, number] = extra[others, i, number] = both
