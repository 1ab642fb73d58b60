"""Oracles of pooling and unpooling in plain loops, written from the rules alone, and inputs that test them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@dataclass(frozen=True)
class Window:
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def __str__(self) -> str:
        k, s, p, d = ("x".join(map(str, v)) for v in (self.kernel, self.stride, self.padding, self.dilation))
        return f"k{k}-s{s}-p{p}-d{d}{'-ceil' if self.ceil_mode else ''}"

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair, Pair]:
        return self.kernel, self.stride, self.padding, self.dilation

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def like_torch(self) -> bool:
        """torch takes padding up to half a window."""
        return all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))


WINDOWS = (
    Window((2, 2), (2, 2)),
    Window((2, 2), (2, 2), (1, 1), ceil_mode=True),
    Window((3, 3), (2, 2)),
    Window((3, 3), (2, 2), (1, 1), ceil_mode=True),
    Window((3, 3), (1, 1), (1, 1)),
    Window((2, 2), (1, 1)),
    Window((3, 3), (3, 3), (1, 1)),
    Window((3, 2), (2, 2), (1, 0)),
    Window((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True),
    Window((4, 2), (2, 2), (2, 1), (2, 1)),
    Window((5, 4), (2, 2), (2, 1), ceil_mode=True),
    Window((1, 2), (2, 2)),
    Window((3, 1), (1, 2)),
    Window((3, 3), (1, 1), (2, 2), (2, 2)),
    Window((17, 16), (2, 3), (8, 8)),
)


def map_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, special: bool = False) -> Tensor:
    """Small integers, so that ties are many; with `special` also NaN and both infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, shape, generator=generator).to(dtype)
    if special:
        kind = torch.randint(0, 12, shape, generator=generator)
        for number, value in ((0, math.nan), (1, -math.inf), (2, math.inf), (3, -0.0)):
            x[kind == number] = value
        x[..., : shape[-1] // 2] = torch.where(kind[..., : shape[-1] // 2] > 1, -math.inf, x[..., : shape[-1] // 2])
    return x


def pool_oracle(x: Tensor, window: Window, relu: bool) -> tuple[Tensor, Tensor]:
    """Pooled values and switches by one loop over cells and taps."""
    cells = x.double().tolist()
    n_count, c_count, height, width = x.shape
    sizes = []
    for size, k, s, p, d in zip((height, width), *window.geometry, strict=True):
        starts = []  # of windows that reach no further than the padding; in ceil mode one more, unless it starts there
        start = -p
        while start + d * (k - 1) < size + p:
            starts.append(start)
            start += s
        if window.ceil_mode and start < size and (not starts or starts[-1] + d * (k - 1) + 1 < size + p):
            starts.append(start)
        sizes.append(starts)
    pooled = torch.empty(n_count, c_count, len(sizes[0]), len(sizes[1]), dtype=torch.float64)
    switches = torch.empty(pooled.shape, dtype=torch.int64)
    for n in range(n_count):
        for c in range(c_count):
            for i, top in enumerate(sizes[0]):
                for j, left in enumerate(sizes[1]):
                    best, switch = None, -1
                    for tap in range(window.taps):
                        y = top + tap // window.kernel[1] * window.dilation[0]
                        x_ = left + tap % window.kernel[1] * window.dilation[1]
                        if not (0 <= y < height and 0 <= x_ < width):
                            continue
                        value = cells[n][c][y][x_]
                        if relu and value < 0:
                            value = 0.0
                        if best is None or value > best or math.isnan(value):
                            best, switch = value, tap
                    pooled[n, c, i, j], switches[n, c, i, j] = best, switch
    return pooled, switches


def random_switches(shape: tuple[int, ...], window: Window, size: Pair | None, seed: int) -> Tensor:
    """Switches that point into the map of `size`; anywhere in their windows without one. Some maps admit none: None."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.uint8 if window.taps <= 256 else torch.int32
    switches = torch.empty(shape, dtype=dtype)
    for i in range(shape[2]):
        for j in range(shape[3]):
            taps = []
            for tap in range(window.taps):
                y = i * window.stride[0] - window.padding[0] + tap // window.kernel[1] * window.dilation[0]
                x = j * window.stride[1] - window.padding[1] + tap % window.kernel[1] * window.dilation[1]
                if size is None or (0 <= y < size[0] and 0 <= x < size[1]):
                    taps.append(tap)
            chosen = torch.randint(0, len(taps), shape[:2], generator=generator)
            switches[:, :, i, j] = torch.tensor(taps)[chosen].to(dtype)
    return switches


def unpool_oracle(
    pooled: Tensor, switches: Tensor, window: Window, size: Pair, relu: bool, origin: Tensor | None = None
) -> Tensor:
    """Scatter-add in float64 over windows in row-major order, one cell at a time."""
    n_count, c_count, h, w = pooled.shape
    out_size = size
    if origin is not None:
        out_size = tuple(  # type: ignore[assignment]
            (n - 1) * s + d * (k - 1) + 1
            for n, k, s, d in zip((h, w), window.kernel, window.stride, window.dilation, strict=True)
        )
    out = torch.zeros(n_count, c_count, *out_size, dtype=torch.float64)
    values = pooled.double()
    for n in range(n_count):
        first = (0, 0) if origin is None else tuple(origin[n].tolist())
        for i in range(h):
            for j in range(w):
                for c in range(c_count):
                    tap = int(switches[n, c, i, j])
                    y = (first[0] + i) * window.stride[0] - window.padding[0]
                    x = (first[1] + j) * window.stride[1] - window.padding[1]
                    y += tap // window.kernel[1] * window.dilation[0]
                    x += tap % window.kernel[1] * window.dilation[1]
                    if 0 <= y < size[0] and 0 <= x < size[1]:
                        if origin is not None:
                            y -= first[0] * window.stride[0] - window.padding[0]
                            x -= first[1] * window.stride[1] - window.padding[1]
                        out[n, c, y, x] += values[n, c, i, j]
    return out.clamp(min=0) if relu else out
