"""Rules that only move data: views, permutations, slices, stacks. They rarely cost an operator of their own.

What such a call means is not guessed from the sizes baked into it: the same call is made on a tensor of cell
numbers, and the result says which cell of which sample went where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from conelens.errors import UnsupportedOperatorError
from conelens.graph import Node
from conelens.operators import Concat, Flatten, Operator, SelectChannels, Spatial
from conelens.tracing.recorder import Meaning, Recorder

Result = Node | Meaning | list[Any] | None


def identity(rec: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    return rec.meaning(x)


def move(rec: Recorder, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Any call that moves cells without changing them."""
    meaning = rec.meaning(x)
    assert meaning is not None
    if meaning.layout == "positive":
        raise UnsupportedOperatorError(f"{rec.here}: a mask x > 0 may only multiply x or choose in torch.where")
    node = rec.graph[meaning.node]
    cells = node.shape[0] * node.size[0] * node.size[1]
    numbers = rec.cells_of(meaning, tuple(x.shape[1:]))[None] + torch.arange(rec.batch).reshape(-1, *[1] * (x.ndim - 1)) * cells
    args, kwargs = rec.without_meaning((args, kwargs))
    function = torch.Tensor.reshape if rec.function is torch.Tensor.view else rec.function  # strides are not tracked
    moved = function(numbers, *args, **kwargs)
    if isinstance(out, Tensor):
        return _place(rec, node, moved, cells)
    return [_place(rec, node, part, cells) for part in moved]


def _place(rec: Recorder, node: Node, moved: Tensor, cells: int) -> Node | Meaning:
    """The meaning of a tensor that holds the cells ``moved`` [N, ...] of ``node``."""
    if moved.ndim == 0 or moved.shape[0] != rec.batch:
        raise UnsupportedOperatorError(f"{rec.here}: the result {tuple(moved.shape)} mixes or drops samples")
    index = moved[0]
    own = index[None] + torch.arange(rec.batch).reshape(-1, *[1] * index.ndim) * cells
    if not torch.equal(own, moved):
        raise UnsupportedOperatorError(f"{rec.here}: mixes the samples of a batch")
    return arrange(rec, node, index)


def arrange(rec: Recorder, node: Node, index: Tensor) -> Node | Meaning:
    """A tensor [N, *index.shape] of the cells ``index`` of ``node``: a map or vector of its own where it is
    one, else a view.
    """
    channels, height, width = node.shape
    if index.numel() == 0:
        raise UnsupportedOperatorError(f"{rec.here}: the result is empty")
    if index.ndim == 1:
        if (height, width) == (1, 1):
            picked = rec.select(node, index)
            return Meaning(picked.index, "vector")
        flat = rec.emit(Flatten(node.shape), (node,), (channels * height * width, 1, 1), vector=True)
        return rec.select(flat, index)
    if index.ndim == 3:
        channel, row, column = index // (height * width), index // width % height, index % width
        separable = (
            (channel == channel[:, :1, :1]).all() and (row == row[:1, :, :1]).all() and (column == column[:1, :1, :]).all()
        )
        if separable:
            picked = _cells(rec, rec.select(node, channel[:, 0, 0]), row[0, :, 0], column[0, 0, :])
            return Meaning(picked.index, "map")
    return Meaning(node.index, "view", index)


def _cells(rec: Recorder, node: Node, rows: Tensor, columns: Tensor) -> Node:
    """Picked rows and columns of a map (slices, flips, repetitions)."""
    height, width = node.size
    if torch.equal(rows, torch.arange(height)) and torch.equal(columns, torch.arange(width)):
        return node
    picked_rows, picked_columns = (
        torch.eye(size, dtype=torch.float64)[picked] for size, picked in ((height, rows), (width, columns))
    )
    op = Spatial(picked_rows, picked_columns, kind="slice")
    return rec.emit(op, (node,), (node.shape[0], len(rows), len(columns)))


def emit_like(rec: Recorder, out: Tensor, op: Operator, *inputs: Node) -> Node:
    """A node whose shape is read off the tensor that torch computed."""
    if out.ndim == 2:
        return rec.emit(op, inputs, (out.shape[1], 1, 1), vector=True)
    if out.ndim != 4:
        raise UnsupportedOperatorError(f"{rec.here}: gives shape {tuple(out.shape)}, wanted [N, C, H, W] or [N, F]")
    return rec.emit(op, inputs, (out.shape[1], out.shape[2], out.shape[3]))


def emit_pointwise(rec: Recorder, out: Tensor, op: Operator, *inputs: Node) -> Node | Meaning:
    """The same for operators that act cell by cell, whose inputs may be views with split channels
    (``Recorder.flat_of``).
    """
    if out.ndim == 2:
        return emit_like(rec, out, op, *inputs)
    channels, height, width = (max(sizes) for sizes in zip(*(n.shape for n in inputs), strict=True))
    node = rec.emit(op, inputs, (channels, height, width))
    return arrange(rec, node, torch.arange(channels * height * width).reshape(out.shape[1:]))


def stack(rec: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Result:
    """Maps or vectors beside each other in a new dimension: a concatenation seen through a view."""
    axis = dim % out.ndim
    nodes = [rec.map_of(t, "a stacked tensor") for t in tensors]
    shapes = {tuple(t.shape[1:]) for t in tensors}
    if axis == 0 or len(shapes) != 1:
        raise UnsupportedOperatorError(f"{rec.here}: only maps of one shape may be stacked, and not along the samples")
    joined = _join(rec, nodes)
    parts = torch.arange(joined.shape[0] * joined.size[0] * joined.size[1]).reshape(len(nodes), *next(iter(shapes)))
    return arrange(rec, joined, parts.movedim(0, axis - 1))


def concatenate(rec: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Result:
    """Channels after one another; constant parts may be zeros."""
    if dim % out.ndim != 1 or out.ndim not in (2, 4):
        raise UnsupportedOperatorError(
            f"{rec.here}: only channels may be concatenated (got dimension {dim} of {tuple(out.shape)})"
        )
    zeros = [rec.meaning(t) is None and not t.any() for t in tensors]
    parts = [t for t, zero in zip(tensors, zeros, strict=True) if not zero]
    joined = _join(rec, [rec.map_of(t, "a concatenated tensor") for t in parts])
    if not any(zeros):
        return joined
    own = iter(range(joined.shape[0]))
    channels = [-1 if zero else next(own) for t, zero in zip(tensors, zeros, strict=True) for _ in range(t.shape[1])]
    return rec.select(joined, torch.tensor(channels))


def _join(rec: Recorder, nodes: Sequence[Node]) -> Node:
    channels = [n.shape[0] for n in nodes]
    return rec.emit(Concat(channels), nodes, (sum(channels), *nodes[0].size), nodes[0].vector)


def expand(rec: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Result:
    """Broadcasting. A map of one cell stays small, since whatever reads it broadcasts."""
    meaning = rec.meaning(x)
    assert meaning is not None
    if meaning.layout == "map" and rec.graph[meaning.node].size == (1, 1) and out.shape[1] == x.shape[1]:
        return meaning
    return move(rec, out, x, *args, **kwargs)


def broadcast(rec: Recorder, node: Node, shape: tuple[int, int, int]) -> Node:
    """``node`` repeated over channels, rows and columns where it has one and ``shape`` has more."""
    if any(had not in (1, wanted) for had, wanted in zip(node.shape, shape, strict=True)):
        raise UnsupportedOperatorError(f"{rec.here}: maps of different shapes {node.shape} and {shape}")
    if node.shape[0] != shape[0]:
        node = rec.emit(
            SelectChannels(torch.zeros(shape[0], dtype=torch.int64, device=rec.device), 1),
            (node,),
            (shape[0], *node.size),
        )
    if node.size != shape[1:]:
        rows, columns = (
            torch.ones(wanted, had, dtype=torch.float64) if had == 1 else torch.eye(had, dtype=torch.float64)
            for had, wanted in zip(node.size, shape[1:], strict=True)
        )
        node = rec.emit(Spatial(rows, columns, kind="expand"), (node,), shape)
    return node


def channel_shuffle(rec: Recorder, out: Tensor, x: Tensor, groups: int) -> Result:
    node = rec.map_of(x)
    return rec.select(node, torch.arange(node.shape[0]).reshape(groups, -1).T.reshape(-1))


_SAME = (
    "contiguous", "clone", "detach", "to", "float", "double", "half", "type_as", "requires_grad_", "data",
    "alias", "cpu", "cuda",
)  # fmt: skip
_MOVES = (
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "reshape_as", "view_as", "unflatten", "permute",
    "transpose", "swapaxes", "movedim", "moveaxis", "chunk", "split", "tensor_split", "split_with_sizes",
    "unbind", "narrow", "select", "index_select", "flip", "__getitem__", "pixel_unshuffle",
    "pixel_shuffle", "roll", "repeat", "repeat_interleave",
)  # fmt: skip

RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, identity),
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "cat": concatenate,
    "stack": stack,
}
