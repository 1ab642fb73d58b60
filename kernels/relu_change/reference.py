"""Specification of relu_change and its gradient in plain PyTorch. See README.md for the rules."""

from __future__ import annotations

import torch
from torch import Tensor

from conelens.kernels.gather_windows import reference as windows


def _under(base: Tensor, change: Tensor, origin: Tensor, rows: Tensor | None) -> Tensor:
    """The cells of base [B,C,H,W] under each unit's change, [U,C,h,w]; 0 where there is none."""
    size = (change.shape[2], change.shape[3])
    return windows.gather_windows(base, None, None, origin, size, rows, 0, False)


def _inside(base: Tensor, change: Tensor, origin: Tensor, rows: Tensor | None) -> Tensor:
    """[U,1,h,w] bool: which cells of the changes lie on a cell of base."""
    everywhere = torch.ones((base.shape[0], 1, *base.shape[2:]), dtype=torch.bool, device=base.device)
    return _under(everywhere, change, origin, rows)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def relu_change(change: Tensor, base: Tensor, origin: Tensor, rows: Tensor | None) -> Tensor:
    """change [U,C,h,w] of base [B,C,H,W] -> [U,C,h,w]; a row outside [0, B) gives 0 alone."""
    z = _wide(_under(base, change, origin, rows))
    after = torch.maximum(_wide(change) + z.clamp(max=0), -z.clamp(min=0))
    return after.to(change.dtype).masked_fill(~_inside(base, change, origin, rows), 0)


def relu_change_backward(
    grad: Tensor, change: Tensor, base: Tensor, origin: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """grad [U,C,h,w] of the result -> grads of change and of base. Linear in grad, of differentiable parts."""
    z = _wide(_under(base, change, origin, rows))
    grad = grad.masked_fill(~_inside(base, change, origin, rows), 0)
    after, before = _wide(change) + z > 0, z > 0
    to_base = grad * (after.to(grad.dtype) - before.to(grad.dtype))
    grad_base, _ = windows.gather_windows_backward(to_base, tuple(base.shape), None, None, origin, rows, False)
    return grad * after, grad_base
