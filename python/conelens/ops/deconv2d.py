"""deconv2d: the transposed filters of a convolution, with unpooling and rectification fused into their load."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from conelens.errors import ArgumentError
from conelens.kernels.deconv2d import reference

IntOrPair = int | Sequence[int]
Pair = tuple[int, int]


def _pair(value: IntOrPair) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def deconv2d(
    y: Tensor,
    weight: Tensor,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    groups: int = 1,
    dilation: IntOrPair = 1,
    *,
    output_size: IntOrPair | None = None,
    map_size: IntOrPair | None = None,
    pool: tuple[IntOrPair, IntOrPair, IntOrPair, IntOrPair] | None = None,
    switches: Tensor | None = None,
    relu: bool = False,
    origin: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """First version on the reference; see kernels/deconv2d/reference.py for the meaning of the arguments."""
    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    k = (weight.shape[2], weight.shape[3])
    extra = _pair(output_padding)
    pools = None if pool is None else tuple(_pair(v) for v in pool)
    if map_size is not None:
        on = _pair(map_size)
    elif pools is None and origin is None:
        on = (y.shape[2], y.shape[3])
    elif output_size is not None:
        size = _pair(output_size)
        on = tuple((size[i] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in (0, 1))
    else:
        raise ArgumentError("deconv2d: with pool or origin, give output_size or map_size: the maps' size is unknown.")
    if output_size is not None:
        to = _pair(output_size)
    else:
        to = tuple((on[i] - 1) * s[i] - 2 * p[i] + d[i] * (k[i] - 1) + 1 + extra[i] for i in (0, 1))
    result = reference.deconv2d(y, weight, s, p, groups, d, to, on, pools, switches, relu, origin)
    return result if out is None else out.copy_(result)
