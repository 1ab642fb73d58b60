"""Rules that only move data: views, permutations, slices, concatenation. They rarely cost an operator of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conelens.errors import UnsupportedOperatorError
from conelens.graph import Node
from conelens.operators import Concat, Flatten, Spatial
from conelens.tracing.recorder import Meaning, Recorder

Result = Node | Meaning | list[Any] | None


def identity(rec: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    return rec.meaning(x)


def reshape(rec: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """view, reshape, flatten, squeeze, unsqueeze: read by what they mean, not by the sizes baked into them."""
    meaning = rec.meaning(x)
    assert meaning is not None
    if out.shape == x.shape:
        return meaning
    node = rec.graph[meaning.node]
    channels, height, width = node.shape
    shape = tuple(out.shape)
    if shape[0] == rec.batch and meaning.layout != "positive":
        index = np.arange(channels) if meaning.channels is None else meaning.channels
        if len(shape) >= 4 and shape[-2:] == (height, width) and np.prod(shape[1:-2]) == index.size:
            return rec.select(node, index.reshape(shape[1:-2]))
        if len(shape) == 3 and shape[1:] == (index.size, height * width) and (height, width) != (1, 1):
            picked = rec.select(node, index.reshape(-1))
            assert isinstance(picked, Node)
            return Meaning(picked.index, "cells")
        if len(shape) == 2 and shape[1] == index.size * height * width:
            picked = rec.select(node, index.reshape(-1))
            assert isinstance(picked, Node)
            if (height, width) == (1, 1):
                return Meaning(picked.index, "vector")
            return rec.emit(Flatten(picked.shape), (picked,), (shape[1], 1, 1), vector=True)
    raise UnsupportedOperatorError(f"{rec.here}: no meaning known for a view from {tuple(x.shape)} to {shape}")


def permute(rec: Recorder, out: Tensor, x: Tensor, *dims: Any, **kwargs: Any) -> Result:
    """Permutations among channel dimensions (channel shuffle)."""
    meaning = rec.meaning(x)
    if meaning is not None and meaning.layout == "split":
        if len(dims) == 1 and isinstance(dims[0], Sequence):
            dims = tuple(dims[0])
        if kwargs:
            dims = tuple(kwargs.get("dims", (kwargs.get("dim0"), kwargs.get("dim1"))))
        order = list(range(x.ndim))
        if len(dims) == 2:  # transpose
            a, b = (d % x.ndim for d in dims)
            order[a], order[b] = order[b], order[a]
        else:
            order = [d % x.ndim for d in dims]
        if order[0] == 0 and order[-2:] == [x.ndim - 2, x.ndim - 1]:
            assert meaning.channels is not None
            return rec.select(rec.graph[meaning.node], meaning.channels.transpose([d - 1 for d in order[1:-2]]))
    raise UnsupportedOperatorError(f"{rec.here}: only channels may be permuted (input {tuple(x.shape)}, dimensions {dims})")


def getitem(rec: Recorder, out: Tensor, x: Tensor, key: Any) -> Result:
    """Slices of channels (free) and of rows and columns (a linear map of space)."""
    node = rec.map_of(x)
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (x.ndim - len(keys) + 1)
    keys += [slice(None)] * (x.ndim - len(keys))
    if len(keys) != x.ndim or keys[0] != slice(None) or not all(isinstance(k, slice) for k in keys[2:]):
        raise UnsupportedOperatorError(f"{rec.here}: index {key!r} is no slice of channels, rows and columns")
    chosen = np.arange(node.shape[0])[np.asarray(keys[1].tolist()) if isinstance(keys[1], Tensor) else keys[1]]
    picked = rec.select(node, np.atleast_1d(chosen))
    assert isinstance(picked, Node)
    if chosen.ndim == 0:
        raise UnsupportedOperatorError(f"{rec.here}: index {key!r} drops the channel dimension")
    if all(k == slice(None) for k in keys[2:]):
        return picked
    matrices = [torch.eye(s, dtype=torch.float64)[k] for s, k in zip(picked.size, keys[2:], strict=True)]
    shape = (picked.shape[0], len(matrices[0]), len(matrices[1]))
    return rec.emit(Spatial(matrices[0], matrices[1], kind="slice"), (picked,), shape)


def split(rec: Recorder, out: Sequence[Tensor], x: Tensor, *args: Any, dim: int = 0, **kwargs: Any) -> Result:
    """chunk, split, tensor_split, unbind along channels."""
    axis = args[1] if len(args) > 1 else dim
    meaning = rec.meaning(x)
    assert meaning is not None
    node = rec.graph[meaning.node]
    index = np.arange(node.shape[0]) if meaning.channels is None else meaning.channels
    if axis % x.ndim != 1 or meaning.layout not in ("map", "vector", "split"):
        raise UnsupportedOperatorError(f"{rec.here}: only channels may be split (got dimension {axis})")
    pieces, start = [], 0
    for piece in out:
        if piece.ndim != x.ndim:
            raise UnsupportedOperatorError(f"{rec.here}: a piece drops the channel dimension")
        pieces.append(rec.select(node, index[start : start + piece.shape[1]]))
        start += piece.shape[1]
    return pieces


def unbind(rec: Recorder, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> Result:
    """The parts of a channel dimension that a view has split (x.view(n, 2, c, h, w).unbind(1))."""
    meaning = rec.meaning(x)
    if meaning is None or meaning.channels is None or dim % x.ndim != 1:
        raise UnsupportedOperatorError(f"{rec.here}: only a split channel dimension can be unbound")
    return [rec.select(rec.graph[meaning.node], part) for part in meaning.channels]


def narrow(rec: Recorder, out: Tensor, x: Tensor, dim: int, start: int, length: int) -> Result:
    keys: list[Any] = [slice(None)] * x.ndim
    keys[dim] = slice(start, start + length)
    return getitem(rec, out, x, tuple(keys))


def index_select(rec: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Result:
    if dim % x.ndim != 1:
        raise UnsupportedOperatorError(f"{rec.here}: only channels may be selected (got dimension {dim})")
    return rec.select(rec.map_of(x), np.asarray(index.tolist()))


def channel_shuffle(rec: Recorder, out: Tensor, x: Tensor, groups: int) -> Result:
    node = rec.map_of(x)
    return rec.select(node, np.arange(node.shape[0]).reshape(groups, -1).T.reshape(-1))


def concatenate(rec: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Result:
    if dim % out.ndim != 1:
        raise UnsupportedOperatorError(f"{rec.here}: only channels may be concatenated (got dimension {dim})")
    nodes = [rec.map_of(t, "a concatenated tensor") for t in tensors]
    channels = [n.shape[0] for n in nodes]
    return rec.emit(Concat(channels), nodes, (sum(channels), *nodes[0].size), nodes[0].vector)


def expand(rec: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Broadcasting of [N, C, 1, 1]; kept as the small map, since every reader broadcasts."""
    node = rec.map_of(x)
    if node.size != (1, 1):
        raise UnsupportedOperatorError(f"{rec.here}: only maps of one cell may be expanded")
    return rec.meaning(x)


RULES = {
    **dict.fromkeys(
        ("contiguous", "clone", "detach", "to", "float", "double", "half", "type_as", "requires_grad_", "data", "alias", "cpu", "cuda"),
        identity,
    ),
    **dict.fromkeys(("view", "reshape", "flatten", "squeeze", "unsqueeze", "reshape_as", "view_as", "unflatten"), reshape),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), permute),
    **dict.fromkeys(("chunk", "split", "tensor_split", "split_with_sizes"), split),
    **dict.fromkeys(("expand", "expand_as"), expand),
    "__getitem__": getitem,
    "unbind": unbind,
    "narrow": narrow,
    "index_select": index_select,
    "channel_shuffle": channel_shuffle,
    "cat": concatenate,
}
