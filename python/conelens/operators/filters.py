"""Convolution and fully connected layers, forward and transposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from conelens.operators.base import Operator, Pair, Sliding, Step


@dataclass(eq=False)
class Conv2d(Sliding):
    """Convolution; ``padding`` is (top, left, bottom, right), so that 'same' padding of even kernels is exact."""

    weight: Tensor  # [Co, Ci / groups, kh, kw]
    bias: Tensor | None
    stride: Pair
    padding: tuple[int, int, int, int]
    dilation: Pair
    groups: int
    kind = "conv"
    keeps_zero = False
    linear = True

    def taps(self, axis: int) -> int:
        return self.weight.shape[2 + axis]

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        (x,) = inputs
        padding: Pair = (0, 0)
        if step is None:
            top, left, bottom, right = self.padding
            if (top, left) == (bottom, right):
                padding = (top, left)
            else:
                x = F.pad(x, (left, right, top, bottom))
        return self.apply(x, self.bias, padding)

    def apply(self, x: Tensor, bias: Tensor | None, padding: Pair) -> Tensor:
        """The filters on ``x`` with this much padding."""
        return F.conv2d(x, self.weight, bias, self.stride, padding, self.dilation, self.groups)

    def folded(self, factor: Tensor | None, shift: Tensor | None) -> Conv2d:
        """This convolution with the affine map of its output (batch norm) in its own weights."""
        weight, bias = self.weight.double(), None if self.bias is None else self.bias.double()
        if factor is not None:
            weight = weight * factor.double()[:, None, None, None]
            bias = None if bias is None else bias * factor.double()
        if shift is not None:
            bias = shift.double() if bias is None else bias + shift.double()
        dtype = self.weight.dtype
        return replace(self, weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))

    def unit(self, x: Tensor, channels: Tensor) -> Tensor:
        """Outputs [U, 1, 1, 1] of single ``channels`` [U]: one dot product each instead of every channel's."""
        kernel = self.weight[channels]
        if self.groups > 1:
            x = x.unflatten(1, (self.groups, -1))[torch.arange(len(x), device=x.device), self._group(channels)]
        if self.dilation != (1, 1):
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


# With fewer rows MKL takes matrix-vector products, which round up to four times worse than the products of many rows that the
# same layer runs elsewhere: one image's result would then be the worst of a sweep.
_GEMM_ROWS = 4


@dataclass(eq=False)
class Linear(Operator):
    """Fully connected layer on a vector map [U, F, 1, 1]."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    kind = "linear"
    keeps_zero = False
    linear = True

    def forward(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        x = inputs[0].flatten(1)
        rows = len(x)
        if 0 < rows < _GEMM_ROWS and x.device.type == "cpu" and x.dtype == torch.float32:
            x = x[:1].expand(_GEMM_ROWS, -1) if rows == 1 else torch.cat([x, x[:1].expand(_GEMM_ROWS - rows, -1)])
        return F.linear(x, self.weight, self.bias)[:rows, :, None, None]

    def change(self, inputs: Sequence[Tensor], step: Step | None) -> Tensor:
        return F.linear(inputs[0].flatten(1), self.weight)[:, :, None, None]

    def topdown(self, signal: Tensor, step: Step) -> list[Tensor | None]:
        return [(signal.flatten(1) @ self.weight)[:, :, None, None]]

    def project_unit(self, values: Tensor, channels: Tensor) -> Tensor:
        """Top-down signal of single units: ``values`` [U] at output ``channels`` [U] → [U, in, 1, 1]."""
        return (self.weight[channels] * values[:, None].to(self.weight.dtype))[:, :, None, None]

    def macs(self, out_shape: tuple[int, int, int]) -> float:
        return float(self.weight.numel())
