"""What all operations share on the way in and out: pairs, checks with readable errors, layouts, other array libraries."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conelens import _native
from conelens.errors import ArgumentError

Pair = tuple[int, int]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST = 2**31 - 1  # of a window's sizes: products of two of them then stay within the kernels' int64
_HUGE = 4 << 20  # bytes from which a fresh CPU output asks for huge pages


def pair(value: int | Sequence[int], name: str, minimum: int) -> Pair:
    """An int or two of them -> (y, x); each at least `minimum`."""
    if type(value) is tuple and len(value) == 2:
        y, x = value
        if type(y) is int and type(x) is int and minimum <= y <= _MOST and minimum <= x <= _MOST:
            return value  # the engine's own calls, thousands a second
    integer = (int, torch.SymInt, np.integer)
    values = (value, value) if isinstance(value, integer) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != 2 or not all(isinstance(v, integer) for v in values):
        raise ArgumentError(f"{name} must be an int or two (y, x), got {value!r}")
    if any(v < minimum for v in values):
        raise ArgumentError(f"{name} must be at least {minimum}, got {value!r}")
    if any(v > _MOST for v in values):
        raise ArgumentError(f"{name} must be at most {_MOST}, got {value!r}")
    return values[0], values[1]


def window(value: int | Sequence[int], name: str) -> Pair:
    """The size of a pooling window, whose taps can be numbered in int32."""
    size = pair(value, name, 1)
    if size[0] * size[1] > _MOST:
        raise ArgumentError(f"{name} must have at most {_MOST} taps, got {value!r}")
    return size


def check_map(x: Any, name: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """x is a tensor [N,C,H,W] of one of the dtypes with cells to work on."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name} must be a tensor or a DLPack array, got {type(x).__name__}")
    if x.dim() != 4:
        raise ArgumentError(f"{name} must be [N,C,H,W], got shape {list(x.shape)}; add the missing axes with unsqueeze")
    if x.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ArgumentError(f"{name} must be {', '.join(names)} or {last}, got {x.dtype}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ArgumentError(f"{name} has no cells: shape {list(x.shape)}")
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ArgumentError(f"{name} must be on the CPU or a CUDA device, got {x.device}")


def check_like(tensor: Any, name: str, other: Tensor, other_name: str, *, shape: Sequence[int], dtype: torch.dtype) -> None:
    """tensor is one, has this shape and dtype and lies on other's device."""
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{name} must be a tensor or a DLPack array, got {type(tensor).__name__}")
    if list(tensor.shape) != list(shape):
        raise ArgumentError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ArgumentError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ArgumentError(f"{name} is on {tensor.device} but {other_name} is on {other.device}; move one of them")


def check_integers(tensor: Any, name: str, base: Tensor, *shape: int | None) -> int:
    """tensor is int32 or int64 of this shape (None: any number of units) on base's device; -> units."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != len(shape):
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArgumentError(f"{name} must be an int32 or int64 tensor {'[U,2]' if len(shape) == 2 else '[U]'}, got {got}")
    units = tensor.shape[0]
    wanted = [units if size is None else size for size in shape]
    check_like(tensor, name, base, "base", shape=wanted, dtype=tensor.dtype)
    return units


def refuse_missing_row(rows: Tensor, samples: int) -> None:
    """Name the first row that base does not have, if there is one."""
    wrong = ((rows < 0) | (rows >= samples)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ArgumentError(f"rows[{at}] is {int(rows[at])}, but base has {samples} samples")


def check_outs(outs: Sequence[tuple[str, Any, Sequence[int], torch.dtype]], like: Tensor, like_name: str) -> tuple[Tensor, ...]:
    """Each (name, tensor, shape, dtype) of an `out=` fits; -> the tensors."""
    for name, tensor, shape, dtype in outs:
        check_like(tensor, name, like, like_name, shape=shape, dtype=dtype)
        if not torch.compiler.is_compiling() and torch._debug_has_internal_overlap(tensor) == 1:
            raise ArgumentError(f"{name} has several cells in one place of memory; give one that is not expanded")
    return tuple(tensor for _, tensor, _, _ in outs)


class _Footprint:
    """Where the cells of a tensor lie in memory, on any device, for NumPy's arithmetic of addresses."""

    def __init__(self, x: Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(x.shape),
            "strides": tuple(stride * x.itemsize for stride in x.stride()),
            "typestr": f"|V{x.itemsize}",
            "data": (x.data_ptr(), False),
        }


def _end(x: Tensor) -> int:
    """The address behind the last cell."""
    return x.data_ptr() + (sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.itemsize


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Is a cell of one in the place of a cell of the other? Exact, but yes where that takes too long to find out."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    if _end(a) <= b.data_ptr() or _end(b) <= a.data_ptr():
        return False
    return bool(np.may_share_memory(np.asarray(_Footprint(a)), np.asarray(_Footprint(b)), max_work=10_000))


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Is each cell of one in the place of the same cell of the other?"""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


# --- layouts --------------------------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    """Neighbouring channels lie side by side; kernels then vectorise over channels."""
    return x.stride(1) == 1 and x.stride(3) != 1


def readable(x: Tensor) -> Tensor:
    """x itself when its columns or its channels lie side by side, else a contiguous copy."""
    return x if x.stride(3) == 1 or x.stride(1) == 1 else packed(x)


def in_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """x itself when its columns (or channels) lie side by side wherever like's do, else a copy that is laid out so."""
    if same_layout(x, like):
        return x
    return packed(x, torch.channels_last if is_channels_last(like) else torch.contiguous_format)


def packed(x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A copy of x; unlike ``contiguous()``, which keeps whatever stride an axis of one cell has."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout).copy_(x)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh map in like's layout; a large one on the CPU asks for huge pages, as page faults cost more than the kernel."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)
    size = out.numel()
    if isinstance(size, int) and size * out.itemsize >= _HUGE and out.device.type == "cpu":
        module = _native.cpu().module
        if module is not None:
            module.advise_huge_pages(out.data_ptr(), size * out.itemsize)
    return out


def same_layout(out: Tensor | None, like: Tensor) -> bool:
    """`out` can be written natively beside `like`: both vectorise along the same axis."""
    if out is None:
        return False
    return out.stride(1) == 1 if is_channels_last(like) else out.stride(3) == 1


# --- other array libraries ------------------------------------------------------------------------


def _from_array(array: Any, name: str) -> Any:
    if isinstance(array, np.ndarray):
        fits = array.flags.writeable and all(s >= 0 for s in array.strides)
        return _from_numpy(array if fits else array.copy(), name)
    return torch.from_dlpack(array) if hasattr(array, "__dlpack__") else array


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if not array.dtype.isnative:
        native = array.dtype.newbyteorder("=")
        raise ArgumentError(
            f"{name} is not in this machine's byte order ({array.dtype.str}); use {name}.astype({native.str!r})"
        )
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise ArgumentError(f"{name} is a NumPy array of {array.dtype}, which torch does not know") from None


def _to_array_like(example: Any) -> Callable[[Tensor], Any]:
    """How a result goes back to the library that `example` came from."""
    if isinstance(example, np.ndarray):
        return lambda tensor: tensor.numpy()
    if hasattr(example, "__array_namespace__"):
        return example.__array_namespace__().from_dlpack
    return importlib.import_module(type(example).__module__.partition(".")[0]).from_dlpack


def takes_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an operation take any DLPack array where it takes a tensor, and answer in the first argument's library."""
    signature = inspect.signature(function)
    first_name = next(iter(signature.parameters))

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get(first_name)
        if isinstance(first, Tensor) or not hasattr(first, "__dlpack__"):
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        out = given.pop("out", None)
        given = {name: _from_array(value, name) for name, value in given.items()}
        if out is not None:
            given["out"] = tuple(map(_writable, out)) if isinstance(out, tuple) else _writable(out)
        result = function(**given)
        if out is not None:
            return type(result)(*out) if isinstance(out, tuple) else out
        back = _to_array_like(first)
        if not isinstance(result, tuple):
            return back(result)
        again: Callable[..., Any] = type(result)
        return again(*[None if x is None else back(x) for x in result])

    return wrapper


def _writable(array: Any) -> Tensor:
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise ArgumentError("out is a read-only array; give one that can be written")
        return _from_numpy(array, "out")
    return torch.from_dlpack(array)
