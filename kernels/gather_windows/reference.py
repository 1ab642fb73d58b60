"""Specification of gather_windows and its adjoint in plain PyTorch. See README.md for the rules."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[int, int]


def _cells(origin: Tensor, size: Pair) -> tuple[Tensor, Tensor]:
    """Coordinates y [U,h,1] and x [U,1,w] of cells of the given size from origin [U,2] on."""
    height, width = (torch.arange(n, device=origin.device) for n in size)
    y, x = origin.long()[:, :, None].unbind(1)
    return (y + height)[:, :, None], (x + width)[:, None, :]


def _within(y: Tensor, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """[U,h,w] bool: which cells lie in [0, size)."""
    return (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])


def _samples(units: int, samples: int, rows: Tensor | None, like: Tensor) -> Tensor:
    """[U,1,1]: the sample of base that each unit reads."""
    if rows is not None:
        chosen = rows.long()
    elif samples == units:
        chosen = torch.arange(units, device=like.device)
    else:
        chosen = torch.zeros(units, dtype=torch.int64, device=like.device)
    return chosen[:, None, None]


def _read(x: Tensor, sample: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """[U,h,w,C]: cells of x [N,C,H,W]; an index outside reads the nearest one inside."""
    indices = (sample, row, column)
    limits = (x.shape[0], x.shape[2], x.shape[3])
    return x.permute(0, 2, 3, 1)[tuple(i.clamp(0, n - 1) for i, n in zip(indices, limits, strict=True))]


def gather_windows(
    base: Tensor,
    patch: Tensor | None,
    patch_origin: Tensor | None,
    window_origin: Tensor,
    window_size: Pair,
    rows: Tensor | None,
    fill: float,
    add: bool,
) -> Tensor:
    """base [B,C,H,W], patch [U,C,h,w] -> [U,C,*window_size]; a row outside [0, B) gives `fill` alone."""
    units, samples, map_size = window_origin.shape[0], base.shape[0], base.shape[2:]
    sample = _samples(units, samples, rows, base)
    y, x = _cells(window_origin, window_size)
    inside = _within(y, x, map_size) & (sample >= 0) & (sample < samples)
    windows = _read(base, sample, y, x) if samples else base.new_zeros(units, *window_size, base.shape[1])
    if patch is not None and patch_origin is not None:
        row, column = y - patch_origin[:, 0, None, None], x - patch_origin[:, 1, None, None]
        covered = _within(row, column, patch.shape[2:])[..., None]
        own = _read(patch, torch.arange(units, device=base.device)[:, None, None], row, column)
        windows = torch.where(covered, windows + own if add else own, windows)
    return windows.masked_fill(~inside[..., None], fill).permute(0, 3, 1, 2)


def gather_windows_backward(
    grad: Tensor,
    base_shape: tuple[int, ...],
    patch_size: Pair | None,
    patch_origin: Tensor | None,
    window_origin: Tensor,
    rows: Tensor | None,
    add: bool,
) -> tuple[Tensor, Tensor | None]:
    """The adjoint: grad [U,C,wh,ww] of the windows -> grads of base and of patch. Linear, of differentiable parts."""
    (units, channels, *window_size), map_size = grad.shape, base_shape[2:]
    sample = _samples(units, base_shape[0], rows, grad)
    y, x = _cells(window_origin, (window_size[0], window_size[1]))
    known = (sample >= 0) & (sample < base_shape[0])
    to_base = _within(y, x, map_size) & known
    grad_patch = None
    if patch_size is not None and patch_origin is not None:
        if not add:
            row, column = y - patch_origin[:, 0, None, None], x - patch_origin[:, 1, None, None]
            to_base = to_base & ~_within(row, column, patch_size)
        py, px = _cells(patch_origin, patch_size)
        row, column = py - window_origin[:, 0, None, None], px - window_origin[:, 1, None, None]
        seen = _within(py, px, map_size) & _within(row, column, tuple(window_size)) & known
        own = _read(grad, torch.arange(units, device=grad.device)[:, None, None], row, column)
        grad_patch = own.masked_fill(~seen[..., None], 0).permute(0, 3, 1, 2)
    height, width = map_size
    wide = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
    flat = wide.new_zeros(base_shape[0] * height * width + 1, channels)  # the last line takes what reaches no cell
    target = torch.where(to_base, (sample * height + y) * width + x, flat.shape[0] - 1)
    flat = flat.index_put((target,), wide.permute(0, 2, 3, 1), accumulate=True)
    grad_base = flat[:-1].reshape(base_shape[0], height, width, channels).permute(0, 3, 1, 2)
    return grad_base.to(grad.dtype), grad_patch
