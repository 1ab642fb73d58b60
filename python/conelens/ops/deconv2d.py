"""deconv2d: transposed filters, with unpooling and rectification fused into their load."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.deconv2d import reference
from conelens.kernels.deconv2d.triton_configs import cuda_kernel_fits, prefer_triton, problem_of
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import BACKENDS, Implementations
from conelens.ops._register import Operator
from conelens.ops.max_unpool2d import check_origin, check_switches, unpool

Pair = tuple[int, int]
IntOrPair = int | Sequence[int]


@arguments.takes_arrays
def deconv2d(
    y: Tensor,
    weight: Tensor,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    output_padding: IntOrPair = 0,
    groups: int = 1,
    dilation: IntOrPair = 1,
    *,
    output_size: Sequence[int] | None = None,
    map_size: Sequence[int] | None = None,
    pool: tuple[IntOrPair, IntOrPair, IntOrPair, IntOrPair] | None = None,
    switches: Tensor | None = None,
    relu: bool = False,
    origin: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Transposed convolution of y [N,Ci,h,w] with the forward convolution's own weight [Ci,Co/groups,kh,kw].

    Output cell Y collects signal cell P through tap t where ``P * stride - padding + dilation * t == Y``, for
    ``0 <= Y < output_size``: any padding and size fit, so asymmetric forward padding works (its first half
    is ``padding``). Without ``output_size`` the size is that of ``F.conv_transpose2d``. There is no bias.

    The signal is y itself, or with ``pool = (kernel_size, stride, padding, dilation)`` y unpooled by
    ``switches`` (as max_unpool2d) onto the map that the filter acts on; ``relu`` rectifies the signal.
    ``map_size`` is the size of that map; without it, it follows from ``output_size`` by the formula of a
    convolution with symmetric padding.

    ``origin`` (int32 or int64 [N,2], may be negative) says that y is a window of its map and gives the
    coordinates of each sample's first cell. The result is then the natural window of size ``(h' - 1) * stride
    + dilation * (k - 1) + 1`` whose first cell is at ``origin' * stride - padding``, where origin' and h' are
    those of the signal: y's, or those of the natural window of the unpooling. Signal cells outside
    ``map_size`` count as zero and result cells outside ``output_size`` are zero; give one of them.

    Dtype and layout of the result are y's; halves accumulate in float32. Weights in ``torch.channels_last``
    save a transposition per call on the CPU. Zeros of the signal may be skipped, so an infinite weight times
    zero is zero there. Differentiable in y and weight, twice. Raises ArgumentError.
    """
    arguments.check_map(y, "y")
    _check_weight(weight, y, groups)
    _check_switches(pool, switches, y)
    check_origin(origin, y)
    sizes = (weight.shape[2], weight.shape[3], y.shape[2], y.shape[3])
    given = (stride, padding, output_padding, dilation, output_size, map_size, pool, origin is not None)
    try:
        geometry = _geometry.__wrapped__ if torch.compiler.is_compiling() else _geometry
        step, pad, spread, to, on, window = geometry(sizes, *given)
    except TypeError:  # lists cannot be looked up
        step, pad, spread, to, on, window = _geometry.__wrapped__(sizes, *given)
    args = (y, weight, step, pad, groups, spread, to, on, window, switches, bool(relu), origin)
    if out is None:
        return _OPERATOR(*args)
    shape = _output_shape(y, weight, step, groups, spread, to, window, origin)
    _OPERATOR.into(arguments.check_outs([("out", out, shape, y.dtype)], y, "y"), *args)
    return out


@functools.lru_cache(maxsize=4096, typed=True)
def _geometry(
    sizes: tuple[int, int, int, int],
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    output_size: Any,
    map_size: Any,
    pool: Any,
    windowed: bool,
) -> tuple[Pair, Pair, Pair, Pair, Pair, tuple[int, ...] | None]:
    """stride, padding, dilation, output_size, map_size, pool in the schema's form; checked.

    Remembered, because a small window costs less than this.
    """
    kernel, on = sizes[:2], sizes[2:]
    step, pad = arguments.pair(stride, "stride", 1), arguments.pair(padding, "padding", 0)
    spread = arguments.pair(dilation, "dilation", 1)
    window = _pool_window(pool)
    to = None if output_size is None else arguments.pair(output_size, "output_size", 1)
    if to is not None and output_padding not in (0, (0, 0), [0, 0]):
        raise ArgumentError("output_padding and output_size both decide the size of the result: give one of them")
    if map_size is not None:
        on = arguments.pair(map_size, "map_size", 1)
        if window is None and not windowed and on != sizes[2:]:
            raise ArgumentError(f"map_size is {on}, but y without pool and origin is the whole map, {sizes[2:]}")
    elif window is not None or windowed:
        on = _map_size(kernel, step, pad, spread, to)
    if to is None:
        to = _output_size(on, kernel, step, pad, spread, arguments.pair(output_padding, "output_padding", 0))
    return step, pad, spread, to, on, window


def _check_weight(weight: Any, y: Tensor, groups: int) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        raise ArgumentError(f"weight must be a tensor [Ci,Co/groups,kh,kw], got {getattr(weight, 'shape', weight)!r}")
    if weight.dtype != y.dtype or weight.device != y.device:
        raise ArgumentError(f"weight is {weight.dtype} on {weight.device} but y is {y.dtype} on {y.device}; make them alike")
    if groups < 1 or y.shape[1] % groups != 0:
        raise ArgumentError(f"groups must divide y's {y.shape[1]} channels, got {groups}")
    if y.shape[1] == 0:
        raise ArgumentError(f"y has no channels: shape {list(y.shape)}")
    if weight.shape[0] != y.shape[1]:
        raise ArgumentError(
            f"weight has {weight.shape[0]} filters but y has {y.shape[1]} channels; "
            "weight is the forward convolution's own [Ci,Co/groups,kh,kw]"
        )
    if 0 in weight.shape[1:]:
        raise ArgumentError(f"weight is empty: shape {list(weight.shape)}")


def _check_switches(pool: Any, switches: Tensor | None, y: Tensor) -> None:
    if (pool is None) != (switches is None):
        raise ArgumentError("pool and switches belong together: give both or neither")
    if switches is not None:
        if not isinstance(pool, tuple | list) or len(pool) != 4:
            raise ArgumentError(f"pool must be (kernel_size, stride, padding, dilation), got {pool!r}")
        check_switches(switches, y, arguments.window(pool[0], "pool kernel_size"))


def _pool_window(pool: Any) -> tuple[int, ...] | None:
    """pool -> kernel, stride, padding and dilation, each (y, x), in one row."""
    if pool is None:
        return None
    names = (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
    pairs = (arguments.pair(value, f"pool {name}", least) for value, (name, least) in zip(pool, names, strict=True))
    return tuple(v for pair in pairs for v in pair)


def _map_size(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, to: Pair | None) -> Pair:
    """Size of the map the filter acts on: what the forward convolution makes of output_size."""
    if to is None:
        raise ArgumentError("with pool or origin, give output_size (of the map written) or map_size (of the map read)")
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(to, kernel, stride, padding, dilation, strict=True)
    )
    if height < 1 or width < 1:
        raise ArgumentError(f"output_size {to} is smaller than the filter {kernel} with this padding; give map_size")
    return height, width


def _output_size(on: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, extra: Pair) -> Pair:
    height, width = (
        (size - 1) * s - 2 * p + d * (k - 1) + 1 + e
        for size, k, s, p, d, e in zip(on, kernel, stride, padding, dilation, extra, strict=True)
    )
    if height < 1 or width < 1:
        raise ArgumentError(f"padding {padding} leaves no output cell of a map of {on}; give output_size")
    return height, width


def _natural_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pair:
    height, width = ((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(size, kernel, stride, dilation, strict=True))
    return height, width


def _output_shape(
    y: Tensor,
    weight: Tensor,
    stride: Any,
    groups: int,
    dilation: Any,
    output_size: Any,
    pool: Any,
    origin: Any,
) -> tuple[int, int, int, int]:
    size = output_size
    if origin is not None:
        read: Sequence[int] = y.shape[2:]
        if pool is not None:
            read = _natural_size(read, pool[0:2], pool[2:4], pool[6:8])
        size = _natural_size(read, weight.shape[2:], stride, dilation)
    return y.shape[0], weight.shape[1] * groups, size[0], size[1]


def _fake(
    y: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    groups: int,
    dilation: Any,
    output_size: Any,
    map_size: Any,
    pool: Any,
    switches: Tensor | None,
    relu: bool,
    origin: Tensor | None,
) -> Tensor:
    return arguments.empty(_output_shape(y, weight, stride, groups, dilation, output_size, pool, origin), y)


def _in_layout_of(out: Tensor, like: Tensor) -> Tensor:
    layout = torch.channels_last if arguments.is_channels_last(like) else torch.contiguous_format
    return out.contiguous(memory_format=layout)


def _windows(pool: Sequence[int] | None) -> tuple[Pair, Pair, Pair, Pair] | None:
    """The schema's flat list -> (kernel, stride, padding, dilation)."""
    if pool is None:
        return None
    kernel, stride, padding, dilation = ((pool[i], pool[i + 1]) for i in (0, 2, 4, 6))
    return kernel, stride, padding, dilation


def _reference(
    y: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    groups: int,
    dilation: Any,
    output_size: Any,
    map_size: Any,
    pool: Any,
    switches: Tensor | None,
    relu: bool,
    origin: Tensor | None,
) -> Tensor:
    out = reference.deconv2d(
        y,
        weight,
        stride,
        padding,
        groups,
        dilation,
        output_size,
        map_size,
        _windows(pool),
        switches,
        relu,
        origin,
    )
    return _in_layout_of(out, y)


def _compiled(
    native: Native,
    y: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    groups: int,
    dilation: Any,
    output_size: Any,
    map_size: Any,
    pool: Any,
    switches: Tensor | None,
    relu: bool,
    origin: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    y, weight = arguments.readable(y), weight.resolve_neg()
    origin = None if origin is None else origin.contiguous()
    if y.device.type == "cuda":
        return _cuda(
            native, y, weight, (stride, padding, groups, dilation, output_size), map_size, pool, switches,
            relu, origin, out,
        )  # fmt: skip
    lists = _lists_pay(y, weight, groups, pool, relu)
    windows = _windows(pool)
    if windows is not None and not (lists and _windows_apart(pool)):
        # overlapping windows add before the ReLU, and a product with zeros wants them written: unpool first
        first = None if origin is None else reference.filter_origin(origin, windows)
        y = unpool(y, switches, *windows, map_size, relu, origin, False)
        pool, windows, switches, relu, origin = None, None, None, False, first
    if not lists:
        return _dense(y, weight, stride, padding, groups, dilation, output_size, map_size, relu, origin)
    if out is None:
        out = arguments.empty(_output_shape(y, weight, stride, groups, dilation, output_size, pool, origin), y)
    window = (stride, padding, groups, dilation, output_size, map_size)
    valid = native.module.deconv2d(  # type: ignore[union-attr]
        y, weight, out, *window, pool, switches, relu, origin, native.context(y.device)
    )
    if not valid and windows is not None:
        unpool(y, switches, *windows, map_size, False, origin, True)  # raises, naming the switch
    return out


def _cuda(
    native: Native,
    y: Tensor,
    weight: Tensor,
    window: tuple[Any, ...],
    map_size: Any,
    pool: Any,
    switches: Tensor | None,
    relu: bool,
    origin: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Our unpool, then our kernel where few output channels fit it, else cuDNN."""
    windows = _windows(pool)
    if windows is not None:
        first = None if origin is None else reference.filter_origin(origin, windows)
        y = unpool(y, switches, *windows, map_size, relu, origin, False)
        relu, origin = False, first
    stride, _, groups, dilation, output_size = window
    if cuda_kernel_fits(y, weight, stride, groups, dilation):
        if out is None:
            out = arguments.empty(_output_shape(y, weight, stride, groups, dilation, output_size, None, origin), y)
        native.module.deconv2d(  # type: ignore[union-attr]
            y, weight, out, *window, map_size, None, None, relu, origin, native.context(y.device)
        )
        return out
    signal = reference.top_down_signal(y, map_size, None, None, relu, origin)
    with _deterministic_cudnn():
        return _in_layout_of(_cudnn(signal, weight, window, origin), y)


@contextlib.contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """Same input, same bits: some of cuDNN's transposed convolutions add in any order."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _cudnn(signal: Tensor, weight: Tensor, window: tuple[Any, ...], origin: Tensor | None) -> Tensor:
    stride, padding, groups, dilation, output_size = window
    if origin is None:
        whole = _natural_size(signal.shape[2:], weight.shape[2:], stride, dilation)
        extra = [output_size[axis] - whole[axis] + 2 * padding[axis] for axis in (0, 1)]
        if all(0 <= extra[axis] < stride[axis] for axis in (0, 1)):  # the size is one that cuDNN can make
            return F.conv_transpose2d(signal, weight, None, stride, padding, extra, groups, dilation)
    return reference.transposed_filter(signal, weight, stride, padding, groups, dilation, output_size, origin)


def _order(y: Tensor, *rest: Any) -> tuple[str, ...]:
    """On CUDA a checked-in table chooses between the Triton kernel and unpooling before cuDNN."""
    if len(rest) < 11:  # ops.backends is asked about the tensors alone
        return BACKENDS
    weight, stride, _, groups, dilation, output_size, _, pool, _, _, origin = rest
    problem = problem_of(y, weight, output_size[0] * output_size[1], groups, pool, origin is not None)
    if not cuda_kernel_fits(y, weight, stride, groups, dilation) and prefer_triton(problem):
        return ("triton", "compiled", "reference")
    return ("compiled", "triton", "reference")


def _lists_pay(y: Tensor, weight: Tensor, groups: int, pool: Any, relu: bool) -> bool:
    """The kernel that skips zeros beats oneDNN where zeros are likely or cells are few (README.md)."""
    if groups > 1 and y.shape[1] < 16 * groups:
        return False
    return relu or pool is not None or weight.shape[1] <= 4 or y.shape[0] * y.shape[2] * y.shape[3] < 64


def _windows_apart(pool: Sequence[int]) -> bool:
    """Pooling windows do not overlap, and switches are bytes: what the kernel unpools itself."""
    return pool[0] * pool[1] <= 256 and all(pool[i + 2] > pool[i + 6] * (pool[i] - 1) for i in (0, 1))


def _dense(
    y: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    groups: int,
    dilation: Any,
    output_size: Any,
    map_size: Any,
    relu: bool,
    origin: Tensor | None,
) -> Tensor:
    """torch's own transposed convolution (oneDNN); halves accumulate and are masked in float32."""
    wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    signal = reference.top_down_signal(wide, map_size, None, None, relu, origin)
    weight = weight.to(wide.dtype)
    out = reference.transposed_filter(signal, weight, stride, padding, groups, dilation, output_size, origin)
    return _in_layout_of(out.to(y.dtype), y)


_OPERATOR = Operator(
    "Tensor y, Tensor weight, int[2] stride, int[2] padding, int groups, int[2] dilation, "
    "SymInt[2] output_size, SymInt[2] map_size, int[]? pool, Tensor? switches, bool relu, Tensor? origin",
    ("out",),
    Implementations("deconv2d", compiled=_compiled, reference=_reference, order=_order),
    _fake,
)
transposed_filters = _OPERATOR  # for callers who know their arguments to fit, in the schema's form: the engine's small calls


# --- gradient: a convolution, in differentiable operations -----------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weight, *window, pool, switches, relu, origin = inputs
    ctx.save_for_backward(y, weight, switches, origin)
    ctx.window, ctx.pool, ctx.relu = window, _windows(pool), relu


def _signal(y: Tensor, map_size: Any, pool: Any, switches: Any, relu: bool, origin: Tensor | None) -> Tensor:
    """What the filter acts on, as the reference has it, but by the unpool operation."""
    if pool is not None:
        return unpool(y, switches, *pool, map_size, relu, origin, False)
    return reference.top_down_signal(y, map_size, None, None, relu, origin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, weight, switches, origin = ctx.saved_tensors
    stride, padding, groups, dilation, output_size, map_size = ctx.window
    signal = _signal(y, map_size, ctx.pool, switches, ctx.relu, origin)
    if origin is None:
        natural = _natural_size(signal.shape[2:], weight.shape[2:], stride, dilation)
        grad = reference.cells_from(grad, (-padding[0], -padding[1]), natural)
    else:
        first = reference.filter_origin(origin, ctx.pool)
        first = first * first.new_tensor(stride) - first.new_tensor(padding)
        grad = reference.mask_outside(grad, first, output_size)
    grad_y = grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = conv2d_weight(grad, weight.shape, signal, stride, 0, dilation, groups)
    if ctx.needs_input_grad[0]:
        grad_y = F.conv2d(grad, weight, None, stride, 0, dilation, groups)
        if ctx.relu:
            grad_y = grad_y.masked_fill(signal <= 0, 0)
        if ctx.pool is not None:
            unpool_backward = torch.ops.conelens.max_unpool2d_backward.default
            grad_y = unpool_backward(grad_y, switches, *ctx.pool, map_size, origin)
        elif origin is not None:
            grad_y = reference.mask_outside(grad_y, origin, map_size)
    return grad_y, grad_weight, *[None] * 10


_OPERATOR.register_autograd(_backward, _setup_context)
