"""Operators that keep a map's places: affine maps, non-linearities, normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.operators.base import Bound, Operator, Pair, Step
from conelens.operators.space import Spatial


@dataclass(eq=False)
class Affine(Operator):
    """Per-channel scale and shift: batch normalisation in evaluation mode, arithmetic with constants."""

    factor: Tensor | None  # [C]
    shift: Tensor | None  # [C]
    kind: str = "affine"  # type: ignore[misc]
    keeps_zero = False
    linear = True

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        factor = None if self.factor is None else self.factor[:, None, None]
        shift = None if self.shift is None else self.shift[:, None, None]
        if factor is None:
            return x if shift is None else x + shift
        return x * factor if shift is None else torch.addcmul(shift, x, factor)

    def change(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return inputs[0] if self.factor is None else inputs[0] * self.factor[:, None, None]

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [self.change([signal], step)]


class Rectify(Operator):
    """ReLU; top-down it rectifies the signal, whatever the forward mask was (Zeiler & Fergus 2014)."""

    kind = "relu"

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return torch.relu(inputs[0])

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [torch.relu(signal)]


@dataclass(eq=False)
class Activation(Operator):
    """Another element-wise non-linearity. ``rule`` "clamp" rectifies the signal, "gradient" multiplies by the slope."""

    name: str
    function: Callable[[Tensor], Tensor]
    rule: str | None
    kind: str = "activation"  # type: ignore[misc]
    keeps_zero = False

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        if step is not None and self.rule == "gradient":
            step.memo["input"] = inputs[0]
        return self.function(inputs[0])

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        if self.rule == "clamp":
            return [torch.relu(signal)]
        return [_vector_jacobian(self.function, step.memo["input"], signal)]

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.rule == "gradient"

    def refusal(self) -> str | None:
        return None if self.rule else f"{self.name} has no canonical deconvnet rule"

    def advice(self) -> str:
        return f"state one: conelens.trace(model, example, policy={{'{self.name}': 'clamp' or 'gradient'}})"


@dataclass(eq=False)
class Opaque(Operator):
    """A function of all channels of a cell, such as softmax or their maximum; it runs forward, but no signal passes down."""

    name: str
    function: Callable[[Tensor], Tensor]
    kind: str = "opaque"  # type: ignore[misc]
    keeps_zero = False

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return self.function(inputs[0])

    def refusal(self) -> str | None:
        return f"{self.name} across channels has no deconvnet rule"


@dataclass(eq=False)
class LocalResponseNorm(Operator):
    """Response normalisation across channels; the identity top-down by default, its true Jacobian as an option."""

    size: int
    alpha: float
    beta: float
    k: float
    jacobian: bool = False
    kind = "lrn"

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.jacobian

    def _function(self, x: Tensor) -> Tensor:
        return F.local_response_norm(x, self.size, self.alpha, self.beta, self.k)

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        if step is not None and self.jacobian:
            step.memo["input"] = inputs[0]
        return self._function(inputs[0])

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [_vector_jacobian(self._function, step.memo["input"], signal) if self.jacobian else signal]


@dataclass(eq=False)
class GroupNorm(Operator):
    """Instance or group normalisation: statistics of the whole map, which the top-down pass holds constant ("hold")."""

    groups: int
    weight: Tensor | None  # [C]
    bias: Tensor | None
    eps: float
    size: Pair
    rule: str | None
    kind: str = "group_norm"  # type: ignore[misc]
    keeps_zero = False
    translates = False
    remembers = True

    def __post_init__(self) -> None:
        rows, columns = (torch.eye(cells, dtype=torch.float64) for cells in self.size)
        self._everywhere = Spatial(rows, columns)

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        return low * 0, low * 0 + in_size

    def spread(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int, out_size: int) -> tuple[Bound, Bound]:
        return low * 0, low * 0 + out_size

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        if step is None:
            return y
        step.memo["input"] = x
        return self._everywhere.forward([y], step)

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        grouped = step.memo["input"].unflatten(1, (self.groups, -1)).flatten(2)
        scale = (grouped.var(2, correction=0) + self.eps).rsqrt().repeat_interleave(signal.shape[1] // self.groups, 1)
        if self.weight is not None:
            scale = scale * self.weight
        (spread,) = self._everywhere.topdown(signal, step)
        assert spread is not None
        return [spread * scale[:, :, None, None]]

    def refusal(self) -> str | None:
        return None if self.rule else f"{self.kind} (statistics of the whole map) has no canonical deconvnet rule"

    def advice(self) -> str:
        return f"state one: conelens.trace(model, example, policy={{'{self.kind}': 'hold'}})"


def _vector_jacobian(function: Callable[[Tensor], Tensor], x: Tensor, signal: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, signal.clone())
    return gradient
