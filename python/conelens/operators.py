"""The operators a traced network is made of: how each runs forward, what it reads, and how a top-down signal passes it.

Every map is ``[U, C, H, W]``; a vector of F features is a map ``[U, F, 1, 1]``. An operator is run either on whole maps or on
*windows*: inputs then hold exactly the cells that ``reach`` asks for, with everything outside the map already filled by
``outside``. One class serves both, so the cone and the whole image cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens import ops
from conelens.errors import UnsupportedOperatorError

Pair = tuple[int, int]
Offset = Pair | np.ndarray  # one (y, x) for all units, or [U, 2]
Bound = Any  # int or np.ndarray of int64: the interval algebra is the same for one unit and for many


class Place:
    """Where the windows of a batch of units lie: ``low`` [U, 2], the map coordinate of their first cell, and their ``size``.

    ``low`` may be given as (base, stride, positions): most callers of the interior route never ask for it.
    """

    __slots__ = ("_low", "_moved", "size")

    def __init__(self, low: np.ndarray | None, size: Pair, moved: tuple[np.ndarray, ...] | None = None) -> None:
        self._low = low
        self._moved = moved
        self.size = size

    @property
    def low(self) -> np.ndarray:
        if self._low is None:
            assert self._moved is not None
            base, stride, positions = self._moved
            self._low = base + stride * positions
        return self._low

    @property
    def origin(self) -> Offset:
        """(y, x) when all units share it, else ``low``."""
        low = self.low
        if len(low) == 1 or (low == low[0]).all():
            return int(low[0, 0]), int(low[0, 1])
        return low


@dataclass(frozen=True)
class Edge:
    """What one input of a node must provide: a window of ``size`` that begins at ``offset`` of the one held for it."""

    offset: Offset
    size: Pair


@dataclass
class Step:
    """What an operator may need besides its inputs: where its windows lie, and a memo shared by the two passes."""

    edges: list[Edge]
    sources: list[Place]  # the windows held for the inputs
    output: Place
    memo: dict[str, Any] = field(default_factory=dict)

    def read(self, edge: int) -> Place:
        """Where the window that an input provides lies on its map."""
        return Place(self.sources[edge].low + np.asarray(self.edges[edge].offset), self.edges[edge].size)


class Operator:
    """One operator. The defaults describe an element-wise one that keeps zero at zero."""

    kind: ClassVar[str] = "operator"
    keeps_zero: ClassVar[bool] = True  # a zero cell outside the map stays zero
    outside: ClassVar[float] = 0.0  # what cells outside the map count as

    translates: bool = True  # ``reach`` moves with the output cell, whatever the size of the map
    remembers: bool = False  # the top-down pass needs an input of the forward pass

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        """Half-open interval of input ``edge`` that outputs ``[low, high)`` read along ``axis``, not clipped to the map."""
        return low, high

    def scale(self, axis: int) -> int:
        """Input cells per output cell (the stride)."""
        return 1

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        """Output map; ``step`` is None on whole maps, where the operator pads by itself."""
        raise NotImplementedError

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        """Signal for each input on exactly the window that ``reach`` asks for; None where the signal stops."""
        raise NotImplementedError

    def refusal(self) -> str | None:
        """Why a top-down signal cannot pass, or None."""
        return None

    def advice(self) -> str:
        """What the user can do about a refusal."""
        return "only layers below it can be projected"

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        """Multiply-accumulates (or element visits) for an output of this shape, for the cost model."""
        channels, height, width = out_shape
        return float(channels * height * width)


class Input(Operator):
    kind = "input"

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        return 0.0


@dataclass(eq=False)
class Conv2d(Operator):
    """Convolution; ``padding`` is (top, left, bottom, right), so that 'same' padding of even kernels is exact."""

    weight: Tensor  # [Co, Ci / groups, kh, kw]
    bias: Tensor | None
    stride: Pair
    padding: tuple[int, int, int, int]
    dilation: Pair
    groups: int
    kind = "conv"
    keeps_zero = False

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        span = self.dilation[axis] * (self.weight.shape[2 + axis] - 1) + 1
        start = self.padding[axis]
        return low * self.stride[axis] - start, (high - 1) * self.stride[axis] - start + span

    def scale(self, axis: int) -> int:
        return self.stride[axis]

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        padding: Pair = (0, 0)
        if step is None:
            top, left, bottom, right = self.padding
            if (top, left) == (bottom, right):
                padding = (top, left)
            else:
                x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def folded(self, affine: Affine) -> Conv2d:
        """This convolution with the affine map of its output (batch norm) in its own weights."""
        weight, bias = self.weight.double(), None if self.bias is None else self.bias.double()
        if affine.factor is not None:
            weight = weight * affine.factor.double()[:, None, None, None]
            bias = None if bias is None else bias * affine.factor.double()
        if affine.shift is not None:
            bias = affine.shift.double() if bias is None else bias + affine.shift.double()
        dtype = self.weight.dtype
        return replace(self, weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))

    def unit(self, x: Tensor, channels: Tensor) -> Tensor:
        """Outputs [U, 1, 1, 1] of single ``channels`` [U]: one dot product each instead of every channel's."""
        kernel = self.weight[channels]
        if self.groups > 1:
            x = x.unflatten(1, (self.groups, -1))[torch.arange(len(x), device=x.device), self._group(channels)]
        x = x[:, :, :: self.dilation[0], :: self.dilation[1]]
        values = (x * kernel).sum((1, 2, 3), keepdim=True)
        return values if self.bias is None else values + self.bias[channels][:, None, None, None]

    def _group(self, channels: Tensor) -> Tensor:
        return torch.div(channels, self.weight.shape[0] // self.groups, rounding_mode="floor")

    def project_unit(self, values: Tensor, channels: Tensor) -> Tensor:
        """Top-down signal of single units: ``values`` [U] at ``channels`` [U] of a 1x1 window → [U, Ci, span, span]."""
        kernel = self.weight[channels] * values.reshape(-1, 1, 1, 1).to(self.weight.dtype)
        if self.groups > 1:
            per_group = self.weight.shape[1]
            full = kernel.new_zeros((kernel.shape[0], self.groups, per_group, *kernel.shape[2:]))
            full[torch.arange(len(kernel), device=kernel.device), self._group(channels)] = kernel
            kernel = full.flatten(1, 2)
        if self.dilation != (1, 1):
            (dy, dx), (kh, kw) = self.dilation, self.weight.shape[2:]
            spread = kernel.new_zeros((*kernel.shape[:2], dy * (kh - 1) + 1, dx * (kw - 1) + 1))
            spread[:, :, ::dy, ::dx] = kernel
            kernel = spread
        return kernel

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        channels, height, width = out_shape
        _, per_group, kh, kw = self.weight.shape
        return float(channels * height * width) * per_group * kh * kw


@dataclass(eq=False)
class Linear(Operator):
    """Fully connected layer on a vector map [U, F, 1, 1]."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    kind = "linear"
    keeps_zero = False

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return F.linear(inputs[0].flatten(1), self.weight, self.bias)[:, :, None, None]

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [(signal.flatten(1) @ self.weight)[:, :, None, None]]

    def project_unit(self, values: Tensor, channels: Tensor) -> Tensor:
        """Top-down signal of single units: ``values`` [U] at output ``channels`` [U] → [U, in, 1, 1]."""
        return (self.weight[channels] * values[:, None].to(self.weight.dtype))[:, :, None, None]

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        return float(self.weight.numel())


@dataclass(eq=False)
class MaxPool2d(Operator):
    """Max pooling with switches; its top-down signal goes where the maximum was (Zeiler & Fergus 2014, unpooling)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool
    kind = "max_pool"
    keeps_zero = False  # a window that leaves the map may still reach into it
    outside = -float("inf")

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        start = self.padding[axis]
        return low * self.stride[axis] - start, (high - 1) * self.stride[axis] - start + span

    def scale(self, axis: int) -> int:
        return self.stride[axis]

    def pool(self, x: Tensor, whole: bool, relu: bool) -> tuple[Tensor, Tensor]:
        """(pooled, switches) of a whole map, or of a window without any padding."""
        padding, ceil_mode = (self.padding, self.ceil_mode) if whole else ((0, 0), False)
        return ops.max_pool2d_with_switches(x, self.kernel, self.stride, padding, self.dilation, ceil_mode, relu=relu)

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        pooled, switches = self.pool(inputs[0], step is None, relu=False)
        if step is not None:
            step.memo["switches"] = switches
        return pooled

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        return super().macs(out_shape) * self.kernel[0] * self.kernel[1]


@dataclass(eq=False)
class Spatial(Operator):
    """Any separable linear map of space, ``rows @ x @ columns.T``: average pooling, resizing, reflection, slicing.

    ``window`` = (kernel, stride, padding) where the operator is a sliding one, so that receptive fields continue past the
    border; otherwise they are read off the non-zero entries.
    """

    rows: Tensor  # [H_out, H_in] float64
    columns: Tensor  # [W_out, W_in] float64
    window: tuple[Pair, Pair, Pair] | None = None
    kind: str = "spatial"  # type: ignore[misc]
    keeps_zero = True  # rows outside the map are zero

    @property
    def translates(self) -> bool:  # type: ignore[override]
        return self.window is not None

    def __post_init__(self) -> None:
        self._extent: list[tuple[np.ndarray, np.ndarray]] = []
        for matrix in (self.rows, self.columns):
            used = matrix.cpu().numpy() != 0
            first = np.where(used.any(1), used.argmax(1), 0)
            last = np.where(used.any(1), used.shape[1] - used[:, ::-1].argmax(1), 0)
            self._extent.append((first, last))
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        if self.window is not None:
            kernel, stride, padding = (pair[axis] for pair in self.window)
            return low * stride - padding, (high - 1) * stride - padding + kernel
        first, last = self._extent[axis]
        bounds = [
            (int(first[lo:hi].min()), int(last[lo:hi].max())) if lo < hi else (0, 1)
            for lo, hi in zip(
                np.clip(np.atleast_1d(low), 0, len(first)).tolist(),
                np.clip(np.atleast_1d(high), 0, len(first)).tolist(),
                strict=True,
            )
        ]
        starts, ends = np.array(bounds, dtype=np.int64).T
        return (starts, ends) if np.ndim(low) else (int(starts[0]), int(ends[0]))

    def scale(self, axis: int) -> int:
        if self.window is not None:
            return self.window[1][axis]
        matrix = (self.rows, self.columns)[axis]
        return max(1, round(matrix.shape[1] / matrix.shape[0]))

    def matrices(self, like: Tensor, step: Step | None) -> tuple[Tensor, Tensor]:
        """(rows, columns) cut to the windows of ``step``: 2-D where all units share them, else [U, 1, out, in]."""
        key = (like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = (self.rows.to(like), self.columns.to(like))
        whole = self._cast[key]
        if step is None:
            return whole
        if "matrices" not in step.memo:
            step.memo["matrices"] = tuple(
                _cut(matrix, *((p.low[:, axis], p.size[axis]) for p in (step.output, step.read(0))))
                for axis, matrix in enumerate(whole)
            )
        return step.memo["matrices"]

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        rows, columns = self.matrices(inputs[0], step)
        return torch.matmul(rows, torch.matmul(inputs[0], columns.transpose(-1, -2)))

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        rows, columns = self.matrices(signal, step)
        return [torch.matmul(rows.transpose(-1, -2), torch.matmul(signal, columns))]


def _cut(matrix: Tensor, out: tuple[np.ndarray, int], read: tuple[np.ndarray, int]) -> Tensor:
    """Sub-matrices [U, 1, out size, in size] at (origins [U], size) on both sides, zero outside; 2-D when all units agree."""
    (out_low, out_size), (in_low, in_size) = out, read
    if (out_low == out_low[0]).all() and (in_low == in_low[0]).all():
        out_low, in_low = out_low[:1], in_low[:1]
    height, width = matrix.shape
    row = out_low[:, None] + np.arange(out_size)
    col = in_low[:, None] + np.arange(in_size)
    valid = ((row >= 0) & (row < height))[:, :, None] & ((col >= 0) & (col < width))[:, None, :]
    index = np.clip(row, 0, height - 1)[:, :, None] * width + np.clip(col, 0, width - 1)[:, None, :]
    cut = matrix.reshape(-1)[torch.from_numpy(index).to(matrix.device)]
    cut = cut * torch.from_numpy(valid).to(matrix.device)
    return cut[0] if len(cut) == 1 else cut[:, None]


@dataclass(eq=False)
class Affine(Operator):
    """Per-channel scale and shift: batch normalisation in evaluation mode, arithmetic with constants."""

    factor: Tensor | None  # [C]
    shift: Tensor | None  # [C]
    kind: str = "affine"  # type: ignore[misc]
    keeps_zero = False

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        factor = None if self.factor is None else self.factor[:, None, None]
        shift = None if self.shift is None else self.shift[:, None, None]
        if factor is None:
            return x if shift is None else x + shift
        return x * factor if shift is None else torch.addcmul(shift, x, factor)

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [signal if self.factor is None else signal * self.factor[:, None, None]]


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


class Add(Operator):
    """Sum of maps; the signal goes down every branch."""

    kind = "add"

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


@dataclass(eq=False)
class Pad(Operator):
    """Constant padding (negative amounts crop); amounts are (top, left, bottom, right)."""

    amounts: tuple[int, int, int, int]
    value: float
    in_size: Pair
    kind = "pad"
    keeps_zero = False

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        return low - self.amounts[axis], high - self.amounts[axis]

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        if step is None:
            top, left, bottom, right = self.amounts
            return F.pad(x, (left, right, top, bottom), value=self.value)
        if self.value == 0.0:
            return x
        return x.masked_fill(~inside(step.read(0), self.in_size, x.device), self.value)

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [signal]


@dataclass(eq=False)
class Flatten(Operator):
    """A map as a vector, in row-major order of (channel, y, x)."""

    shape: tuple[int, int, int]
    kind = "flatten"
    translates = False

    def reach(self, edge: int, axis: int, low: Bound, high: Bound, in_size: int) -> tuple[Bound, Bound]:
        return low * 0, low * 0 + in_size

    def scale(self, axis: int) -> int:
        return self.shape[1 + axis]

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return inputs[0].flatten(1)[:, :, None, None]

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [signal.reshape(-1, *self.shape)]


def inside(place: Place, map_size: Pair, device: torch.device) -> Tensor:
    """Bool mask [U, 1, h, w] of the window cells that lie on the map."""
    masks = []
    for axis in (0, 1):
        cells = place.low[:, axis, None] + np.arange(place.size[axis])
        masks.append(torch.from_numpy((cells >= 0) & (cells < map_size[axis])).to(device))
    return masks[0][:, None, :, None] & masks[1][:, None, None, :]


def require_rule(operator: Operator, where: str) -> None:
    """Raise when a top-down signal cannot pass ``operator``."""
    reason = operator.refusal()
    if reason:
        raise UnsupportedOperatorError(f"cannot project through {where}: {reason}; {operator.advice()}")
