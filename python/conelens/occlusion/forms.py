"""The two exact forms of a step on changed regions.

``Gather``: patches hold values; a layer reads them within their clean surroundings. ``Delta``: patches hold changes; a linear
layer maps changes to changes and needs nothing else, zeros stay zeros bit for bit, and a non-linear one compares with the clean
map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from conelens.execution import Turn
from conelens.graph import Graph
from conelens.occlusion.regions import Batch, same_place
from conelens.operators import Conv2d, Flatten, Linear, MaxPool2d, Operator, Place, Rectify, Spatial, Step

# Positions from which on a fully connected layer is worth taking apart into the cells that it reads.
CELL_UNITS = 256

Patches = dict[int, Tensor]  # [U, C, h, w] on the region of each node


class Form(Protocol):
    """One way to do a step."""

    name: str

    def cached(self, graph: Graph, turns: Sequence[Turn]) -> set[int]:
        """Nodes of which the clean maps are needed."""

    def entry(self, image: Tensor, filled: Tensor) -> Tensor:
        """The patch of the input, from what is there and what the windows show, [U, C, h, w]."""

    def run(self, turn: Turn, patches: Patches, cache: Patches, batch: Batch) -> Tensor:
        """The patch of ``turn.node`` from those of its inputs; ``cache`` holds clean maps [B, C, H, W]."""

    def full(self, node: int, patch: Tensor, clean: Tensor, batch: Batch) -> Tensor:
        """Values on the whole map, [U, C, H, W]."""

    def seam(self, node: int, patch: Tensor, cache: Patches, batch: Batch) -> Tensor:
        """The patch widened to the whole map."""


class Gather:
    """Patches of values."""

    name = "gather"

    def __init__(self) -> None:
        self._filters: dict[int, Tensor] = {}

    def cached(self, graph: Graph, turns: Sequence[Turn]) -> set[int]:
        nodes: set[int] = set()
        for turn in turns:
            if not (turn.passed or (_cell_wise(turn.op) and len(turn.sources) == 1)):
                nodes.update(turn.sources)
        return nodes

    def entry(self, image: Tensor, filled: Tensor) -> Tensor:
        return filled

    def run(self, turn: Turn, patches: Patches, cache: Patches, batch: Batch) -> Tensor:
        op = turn.op
        if turn.passed or turn.in_place:  # such a ReLU changes the same cells as the convolution before it, which rectifies
            return patches[turn.sources[0]]
        whole = batch.runs_whole(turn)
        reads = [] if whole else [batch.read(turn.node, edge) for edge in range(len(turn.sources))]
        inputs = [patches[source] for source in turn.sources]
        if isinstance(op, Conv2d) and op.groups == 1 and not whole:
            return self._convolve(turn, op, inputs[0], reads[0], cache, batch)
        if not whole:
            inputs = [
                _around(x, cache.get(source), batch, batch.region(source), read, op.outside)
                for x, source, read in zip(inputs, turn.sources, reads, strict=True)
            ]
        step = None if whole else batch.step(turn.node, reads)
        out = _forward(turn, inputs, step)
        return torch.relu_(out) if turn.rectified else out

    def _convolve(self, turn: Turn, op: Conv2d, patch: Tensor, read: Place, cache: Patches, batch: Batch) -> Tensor:
        """One convolution of patches within their surroundings, and the ReLU behind it."""
        (source,) = turn.sources
        held, out = batch.region(source), batch.region(turn.node)
        if same_place(held, read):
            values = op.apply(patch, op.bias, (0, 0))
            return torch.relu_(values) if turn.rectified else values
        if turn.node not in self._filters:  # in the layout of the maps, or every call lays them out anew
            layout = torch.channels_last if patch.dtype != torch.float64 else torch.contiguous_format
            self._filters[turn.node] = op.weight.contiguous(memory_format=layout)
        return ops.conv2d_windows(
            cache[source],
            patch,
            batch.origin(held),
            batch.origin(read),
            self._filters[turn.node],
            op.bias,
            op.stride,
            op.dilation,
            out_size=out.size,
            rows=batch.image,
            relu=turn.rectified,
        )

    def full(self, node: int, patch: Tensor, clean: Tensor, batch: Batch) -> Tensor:
        return _around(patch, clean, batch, batch.region(node), _everywhere(batch, node), 0.0)

    def seam(self, node: int, patch: Tensor, cache: Patches, batch: Batch) -> Tensor:
        return self.full(node, patch, cache[node], batch)


class Delta:
    """Patches of changes. ``memory``: bytes that filters of fully connected layers may take in a second layout."""

    name = "delta"

    def __init__(self, memory: int = 0) -> None:
        self._memory = memory
        self._by_cell: dict[int, Tensor] = {}

    def cached(self, graph: Graph, turns: Sequence[Turn]) -> set[int]:
        nodes: set[int] = set()
        for turn in turns:
            if not (turn.passed or turn.op.linear or not turn.sources):
                nodes.update(turn.sources)
                if not isinstance(turn.op, Rectify):
                    nodes.add(turn.node)
        return nodes

    def entry(self, image: Tensor, filled: Tensor) -> Tensor:
        return filled - image

    def run(self, turn: Turn, patches: Patches, cache: Patches, batch: Batch) -> Tensor:
        op, node = turn.op, turn.node
        inputs = [patches[source] for source in turn.sources]
        if turn.passed:
            return inputs[0]
        if isinstance(op, Conv2d):
            return _convolve(op, node, inputs[0], batch)
        if isinstance(op, Linear):
            return self._connect(op, turn, inputs[0], batch)
        if op.linear:
            return self._linear(turn, inputs, batch)
        if isinstance(op, Rectify):
            return _rectify(turn, inputs[0], cache[turn.sources[0]], batch)
        return self._nonlinear(turn, inputs, cache, batch)

    def _linear(self, turn: Turn, inputs: list[Tensor], batch: Batch) -> Tensor:
        """Changes of the inputs, zero around them, through a linear operator."""
        op, node = turn.op, turn.node
        held = [batch.region(source) for source in turn.sources]
        if isinstance(op, Spatial):
            return op.change(inputs, batch.step(node, held))
        if isinstance(op, Flatten):
            reads = [_everywhere(batch, turn.sources[0])]
        else:
            reads = [batch.read(node, edge) for edge in range(len(turn.sources))]
        inputs = [_zeros_around(x, batch, place, read) for x, place, read in zip(inputs, held, reads, strict=True)]
        return op.change(inputs, batch.step(node, reads))

    def _connect(self, op: Linear, turn: Turn, change: Tensor, batch: Batch) -> Tensor:
        """A fully connected layer; on flattened maps cell by cell, where only units that change there take part."""
        flatten = batch.graph[turn.sources[0]].op
        if len(change) < CELL_UNITS or not isinstance(flatten, Flatten) or op.weight.nbytes > self._memory:
            return op.change([change], None)
        channels, height, width = flatten.shape
        if turn.node not in self._by_cell:
            self._by_cell[turn.node] = op.weight.reshape(-1, channels, height, width).permute(2, 3, 0, 1).contiguous()
            self._memory -= op.weight.nbytes
        weight = self._by_cell[turn.node]
        (map_,) = batch.graph[turn.sources[0]].inputs
        (top, bottom), (left, right) = (batch.changed(map_, axis) for axis in (0, 1))
        maps = change.reshape(-1, channels, height, width)
        out = change.new_zeros((len(change), len(op.weight)))
        for row in range(height):
            for column in range(width):
                mine = np.flatnonzero((top <= row) & (row < bottom) & (left <= column) & (column < right))
                index = torch.from_numpy(mine).to(change.device)
                out.index_add_(0, index, F.linear(maps[index, :, row, column], weight[row, column]))
        return out[:, :, None, None]

    def _nonlinear(self, turn: Turn, inputs: list[Tensor], cache: Patches, batch: Batch) -> Tensor:
        """Values through the operator, minus the clean ones."""
        node = turn.node
        whole = batch.runs_whole(turn)
        reads = [_everywhere(batch, source) if whole else batch.read(node, edge) for edge, source in enumerate(turn.sources)]
        values = [
            ops.gather_windows(
                cache[source], x, batch.origin(batch.region(source)), batch.origin(read), read.size,
                rows=batch.image, fill=turn.op.outside, add=True,
            )
            for x, source, read in zip(inputs, turn.sources, reads, strict=True)
        ]  # fmt: skip
        after = _forward(turn, values, None if whole else batch.step(node, reads))
        return after - _clean(cache[node], batch, batch.region(node))

    def full(self, node: int, patch: Tensor, clean: Tensor, batch: Batch) -> Tensor:
        everywhere = _everywhere(batch, node)
        origins = batch.origin(batch.region(node)), batch.origin(everywhere)
        return ops.gather_windows(clean, patch, *origins, everywhere.size, rows=batch.image, add=True)

    def seam(self, node: int, patch: Tensor, cache: Patches, batch: Batch) -> Tensor:
        return _zeros_around(patch, batch, batch.region(node), _everywhere(batch, node))


def form_for(form: str, device: str, dtype: torch.dtype, memory: int = 0) -> Form:
    """The form of this name, or for "auto" the one that runs faster; it may keep ``memory`` bytes to itself.

    Stock convolutions in float32 on CPUs (oneDNN) leave out the taps on padding, and there changes cost less than values.
    """
    if form not in ("auto", "delta", "gather"):
        raise ArgumentError(f"form: got {form!r}, wanted 'auto', 'delta' or 'gather'")
    return Delta(memory) if form == "delta" or (form == "auto" and device == "cpu" and dtype == torch.float32) else Gather()


def _cell_wise(op: Operator) -> bool:
    """Does every output cell read the one input cell at its place?"""
    return type(op).reach is Operator.reach


def _forward(turn: Turn, inputs: list[Tensor], step: Step | None) -> Tensor:
    op = turn.op
    if isinstance(op, MaxPool2d):
        return op.pool(inputs[0], step is None, relu=turn.rectifies)[0]
    return op.forward(inputs, step)


def _everywhere(batch: Batch, node: int) -> Place:
    size = batch.graph[node].size
    return Place(batch.region(node).low * 0, size)


def _around(patch: Tensor, clean: Tensor | None, batch: Batch, held: Place, read: Place, outside: float) -> Tensor:
    """Cells ``read``, out of the patch where it lies, else clean; ``outside`` beyond the map."""
    if same_place(held, read):
        return patch
    assert clean is not None
    origins = batch.origin(held), batch.origin(read)
    return ops.gather_windows(clean, patch, *origins, read.size, rows=batch.image, fill=outside)


def _zeros_around(patch: Tensor, batch: Batch, held: Place, read: Place) -> Tensor:
    """Cells ``read`` out of a patch of changes; nothing changes elsewhere."""
    if same_place(held, read):
        return patch
    return ops.gather_windows(patch, None, None, batch.origin(Place(read.low - held.low, read.size)), read.size)


def _clean(maps: Tensor, batch: Batch, place: Place) -> Tensor:
    return ops.gather_windows(maps, None, None, batch.origin(place), place.size, rows=batch.image)


def _rectify(turn: Turn, change: Tensor, clean: Tensor, batch: Batch) -> Tensor:
    """Changes through a ReLU. What nobody else reads is overwritten, unless it is a slice, which a convolution would copy."""
    mine = turn.in_place and (change.is_contiguous(memory_format=torch.channels_last) or change.is_contiguous())
    origin = batch.origin(batch.region(turn.node))
    return ops.relu_change(change, clean, origin, rows=batch.image, out=change if mine else None)


def _convolve(op: Conv2d, node: int, change: Tensor, batch: Batch) -> Tensor:
    """A convolution of changes, padded with zeros: oneDNN leaves out the taps that fall on them, so only changed inputs cost.

    Padding is the same before and after; where the region has fewer cells on one side, the outputs beyond it are cut off.
    Positions that differ in how far their region lies inside what is read are brought into line first.
    """
    held, out = batch.region(batch.graph[node].inputs[0]), batch.region(node)
    leads = [kind.leads(batch.graph, node) for kind in batch.classes]
    least = [int(lead.min()) for lead in leads]
    size = tuple(held.size[axis] + int(leads[axis].max()) - least[axis] for axis in (0, 1))
    if size != held.size:
        read = batch.read(node, 0)
        change = _zeros_around(change, batch, held, Place(read.low + least, (size[0], size[1])))
    rows, columns = (_fit(op, axis, least[axis], size[axis], out.size[axis]) for axis in (0, 1))
    if rows.start >= rows.stop or columns.start >= columns.stop:  # nothing of the region is read: a stride steps over it
        return change.new_zeros((len(change), op.weight.shape[0], *out.size))
    change = change[:, :, rows.start : rows.stop, columns.start : columns.stop]
    y = op.apply(change, None, (rows.padding, columns.padding))
    return y[:, :, rows.front : rows.front + out.size[0], columns.front : columns.front + out.size[1]]


class _Fit(NamedTuple):
    """Along one axis: the changed cells that count, the zeros before and after them, and the outputs to cut off in front."""

    start: int
    stop: int
    padding: int
    front: int


def _fit(op: Conv2d, axis: int, lead: int, held: int, out: int) -> _Fit:
    length = (out - 1) * op.stride[axis] + op.span(axis)
    start, stop = max(0, -lead), min(held, length - lead)
    before, after = max(0, lead), max(0, length - lead - held)
    front = -(-max(0, after - before) // op.stride[axis])
    return _Fit(start, stop, before + front * op.stride[axis], front)
