"""Operators that join, gate or pick maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conelens.operators.base import Bound, Operator, Step


class Add(Operator):
    """Sum of maps; the signal goes down every branch."""

    kind = "add"
    linear = True

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        total = inputs[0] + inputs[1]
        for extra in inputs[2:]:
            total += extra
        return total

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [signal for _ in step.edges]


@dataclass(eq=False)
class Gate(Operator):
    """Map times a computed gate, which the top-down pass holds constant (input 0 is the map, input 1 the gate)."""

    spatial: tuple[bool, bool]  # does the gate vary along this axis, or is it broadcast?
    rule: str | None
    kind = "gate"
    remembers = True

    @property
    def translates(self) -> bool:  # type: ignore[override]
        return all(self.spatial)

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        return (low, high) if edge == 0 or self.spatial[axis] else (low * 0, low * 0 + 1)

    def spread(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int, out_size: int) -> tuple[Bound, Bound]:
        return (low, high) if edge == 0 or self.spatial[axis] else (low * 0, low * 0 + out_size)

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        if step is not None:
            step.memo["gate"] = inputs[1]
        return inputs[0] * inputs[1]

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [signal * step.memo["gate"], None]

    def refusal(self) -> str | None:
        return None if self.rule else "a gate (map times computed map) has no canonical deconvnet rule"

    def advice(self) -> str:
        return "state one: conelens.trace(model, example, policy={'gate': 'hold'})"


class Product(Gate):
    """The product of two maps, neither of which is a gate; it runs forward, but no signal passes down."""

    kind = "product"

    def refusal(self) -> str | None:
        return "a product of two maps, neither of which is a gate, has no deconvnet rule"

    def advice(self) -> str:
        return Operator.advice(self)


@dataclass(eq=False)
class Concat(Operator):
    """Concatenation of channels."""

    channels: list[int]
    kind = "concat"
    linear = True

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return torch.cat(list(inputs), 1)

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return list(signal.split(self.channels, 1))


@dataclass(eq=False)
class SelectChannels(Operator):
    """Channels picked by index: slices, splits, the permutation of a channel shuffle; index -1 gives a channel of zeros."""

    index: Tensor  # [C_out] int64
    in_channels: int
    kind = "select"
    linear = True

    def __post_init__(self) -> None:
        self._used = (self.index >= 0).nonzero().flatten()
        self._zeros = len(self._used) < len(self.index)

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        if not self._zeros:
            return x.index_select(1, self.index)
        out = x.new_zeros((x.shape[0], len(self.index), *x.shape[2:]))
        return out.index_copy_(1, self._used, x.index_select(1, self.index[self._used]))

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        out = signal.new_zeros((signal.shape[0], self.in_channels, *signal.shape[2:]))
        if not self._zeros:
            return [out.index_add_(1, self.index, signal)]
        return [out.index_add_(1, self.index[self._used], signal.index_select(1, self._used))]
