"""Exact changed-region inference: each position of a sweep costs what its window can change, and nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conelens import ops
from conelens.changed import AxisClass
from conelens.errors import ArgumentError
from conelens.execution import Turn, exact_dtype, forward_whole
from conelens.network import Network
from conelens.occlusion.engine import Visited
from conelens.occlusion.forms import Patches, form_for
from conelens.occlusion.records import Record, activity, run_clean
from conelens.occlusion.regions import Batch, SweepRegions, peak_cells, sweep_regions
from conelens.occlusion.windows import Windows, inside_boxes

# Bytes of live patches beyond which more positions at once do not run faster (benchmarks/NOTES.md).
HEAD_BYTES = {"cpu": 3 * 2**26, "cuda": 2**33}
# Positions whose whole maps the tail takes at once: fully connected layers read their weights once for all of them.
# No more than that, so that progress is told, and Ctrl-C loses nothing, every few seconds.
TAIL_UNITS = 512
# Changes are not added to maps whose largest cell is this many times the usual one (photographs: up to about 200).
UNEVEN = 500.0


class Incremental:
    """Runs the positions of a sweep on changed regions, group of images by group of images."""

    def __init__(
        self, net: Network, images: Tensor, filled: Tensor, windows: Windows, records: list[Record], form: str, memory: int
    ) -> None:
        self.net, self.images, self.filled, self.windows, self.records, self.memory = (
            net, images, filled, windows, records, memory,
        )  # fmt: skip
        self.graph = net.graph
        self.output = net.graph.outputs[0]
        self.targets = tuple(sorted({self.output, *(record.node for record in records)}))
        self._plan(form)

    def _plan(self, form: str) -> None:
        """Regions, and how many images and positions run together, for a form."""
        self._free = form == "auto"
        self._held: tuple[int, Patches] | None = None
        self.steps = form_for(form, self.images.device.type, self.images.dtype, self.memory // 4)
        self.form = self.steps.name
        self.regions = sweep_regions(self.graph, self.targets, self.windows, self.images.device.type, self.form == "delta")
        turns = [*self.regions.head, *self.regions.tail]
        self.cached = frozenset(self.steps.cached(self.graph, turns).union(self.targets, self.regions.seam))
        cells = sum(math.prod(self.graph[index].shape) for index in self.cached)
        self.group = self._share_of_memory(cells, len(self.images))
        self.tail_units = self._share_of_memory(self._tail_cells(), TAIL_UNITS)

    def clean(self) -> tuple[Tensor, list[Record]]:
        outputs, self.records = run_clean(self.records, self._clean_parts())
        return outputs, self.records

    def _clean_parts(self) -> Iterator[tuple[Tensor, Patches]]:
        """Outputs and maps, group after group; from a map on which changes are not to be added, in the other form."""
        start = 0
        while start < len(self.images):
            cache, end = self._cache(start), start + self.group
            if self.form == "delta" and any(map(_uneven, [self.part(self.images, start), *cache.values()])):
                if self._free:
                    self._plan("gather")
                elif not all(bool(torch.isfinite(maps).all()) for maps in cache.values()):
                    raise ArgumentError("form: 'delta' needs finite activations, but a layer overflows; use form='gather'")
            yield self.net.as_returned(cache[self.output]), cache
            start = end

    def visit(self, units: np.ndarray) -> Iterator[Visited]:
        for start in range(0, len(self.images), self.group):
            some = units[(units[:, 0] >= start) & (units[:, 0] < start + self.group)]
            if len(some):
                yield from _Pass(self, start, self._cache(start)).run(some)

    def _cache(self, start: int) -> Patches:
        """Clean maps of one group of images; those of the last group are kept, so that a single group runs once."""
        if self._held is None or self._held[0] != start:
            self._held = None
            with exact_dtype(self.images.device):
                maps = forward_whole(self.graph, self.part(self.images, start), self.targets, keep=self.cached)
            self._held = start, maps
        return self._held[1]

    def part(self, images: Tensor, start: int) -> Tensor:
        """One group of ``images``, in the layout that runs fastest on patches."""
        images = images[start : start + self.group]
        return images if images.dtype == torch.float64 else images.contiguous(memory_format=torch.channels_last)

    def head_units(self, classes: tuple[AxisClass, AxisClass]) -> int:
        """How many positions of a pair of classes run together."""
        cells = peak_cells(self.graph, self.regions.head, classes, {*self.regions.seam, *self.targets})
        cells += 2 * max(math.prod(self.graph[node].shape) for node in self.targets)
        largest = HEAD_BYTES.get(self.images.device.type, HEAD_BYTES["cpu"]) // (cells * self.images.element_size())
        return self._share_of_memory(cells, max(1, largest))

    def _tail_cells(self) -> int:
        """Cells per position that wait for the tail, and that it then has alive."""
        regions = self.regions
        early = {self.output} & {turn.node for turn in regions.head}
        waiting = 2 * sum(math.prod(self.graph[node].shape) for node in early.union(regions.seam))
        return waiting + peak_cells(self.graph, regions.tail, regions.whole(), set(self.targets))

    def _share_of_memory(self, cells: int, most: int) -> int:
        """Positions of ``cells`` each that fit a quarter of the memory: cache, head, tail and the form take one each."""
        return max(1, min(most, self.memory // (4 * max(1, cells) * self.images.element_size())))


def _uneven(maps: Tensor) -> bool:
    """Are some cells of maps [B, C, H, W] so much larger than most that changes of them would drown the rest in rounding?

    A result is clean value plus change; where a window covers nearly all there is, both are large and their sum is small.
    """
    cells = maps.float().square().mean(1).sqrt().flatten(1)
    if not bool(torch.isfinite(cells).all()):
        return True
    usual = torch.stack([one[one > 0].median() if bool((one > 0).any()) else one.new_zeros(()) for one in cells])
    return bool((cells.amax(1) > UNEVEN * usual).any())


class _Pass:
    """The positions of one group of images."""

    def __init__(self, engine: Incremental, start: int, cache: Patches) -> None:
        self.engine, self.start, self.cache = engine, start, cache
        self.images, self.filled = engine.part(engine.images, start), engine.part(engine.filled, start)
        self.regions: SweepRegions = engine.regions
        self.graph, self.form = engine.graph, engine.steps
        self.device = engine.images.device
        self.pending: list[_Pending] = []

    def run(self, units: np.ndarray) -> Iterator[Visited]:
        """``units`` [U, 3], class by class; results come when enough of them are together, or on Ctrl-C."""
        try:
            yield from self._portions(units)
        except KeyboardInterrupt:
            if self.pending:
                yield self._finish()
            raise

    def _portions(self, units: np.ndarray) -> Iterator[Visited]:
        for classes in itertools.product(self.regions.row_classes, self.regions.column_classes):
            row, column = (_index_in(kind.members, units[:, 1 + axis]) for axis, kind in enumerate(classes))
            mine = np.flatnonzero((row >= 0) & (column >= 0))
            size = min(self.engine.head_units(classes), self.engine.tail_units)
            for begin in range(0, len(mine), size):
                some = mine[begin : begin + size]
                if sum(len(one.units) for one in self.pending) + len(some) > self.engine.tail_units:
                    yield self._finish()
                batch = Batch(self.regions, classes, row[some], column[some], self._images_of(units[some]))
                self.pending.append(self._head(batch, units[some]))
        if self.pending:
            yield self._finish()

    def _images_of(self, units: np.ndarray) -> Tensor:
        """The images of ``units`` within the group, [U]."""
        return torch.from_numpy(units[:, 0] - self.start).to(self.device, non_blocking=True)

    def _head(self, batch: Batch, units: np.ndarray) -> _Pending:
        """Changed regions up to the seam; what the tail and the results need of them."""
        with exact_dtype(self.device):
            patches = self._walk(self.regions.head, {0: self._entry(batch, units)}, batch)
            found = self._results(self.regions.head, patches, batch)
            seam = {node: self.form.seam(node, patches[node], self.cache, batch) for node in self.regions.seam}
        return _Pending(units, seam, found)

    def _entry(self, batch: Batch, units: np.ndarray) -> Tensor:
        place = batch.region(0)
        origin = batch.origin(place)
        image, filled = (
            ops.gather_windows(x, None, None, origin, place.size, rows=batch.image) for x in (self.images, self.filled)
        )
        boxes = self.engine.windows.boxes(units) - np.tile(place.low, 2)
        if (boxes[:, 2:] - boxes[:, :2] != place.size).any():  # among whole windows, one that the border cuts off
            filled = torch.where(inside_boxes(boxes, place.size, self.device), filled, image)
        return self.form.entry(image, filled)

    def _walk(self, turns: list[Turn], patches: Patches, batch: Batch) -> Patches:
        keep = {*self.regions.seam, *self.engine.targets}
        for turn in turns:
            if turn.sources:
                patches[turn.node] = self.form.run(turn, patches, self.cache, batch)
            for source in turn.last_reads:
                if source not in keep:
                    patches.pop(source, None)
        return patches

    def _results(self, turns: list[Turn], patches: Patches, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """What is asked of the nodes of ``turns``: the output under "", and recorded activities by their layers."""
        mine = {turn.node for turn in turns}
        engine = self.engine
        found: dict[str, tuple[Tensor, ...]] = {}
        if engine.output in mine:
            full = self.form.full(engine.output, patches[engine.output], self.cache[engine.output], batch)
            found[""] = (engine.net.as_returned(full),)
        for record in engine.records:
            if record.node in mine:
                picked = record.pick(patches[record.node], batch.image + self.start)
                everyone = torch.arange(len(self.cache[record.node]), device=self.device) + self.start
                clean = record.pick(self.cache[record.node], everyone)
                found[record.name] = activity(self.form.full(record.node, picked, clean, batch))
        return found

    def _finish(self) -> Visited:
        """The tail, for all positions that wait for it."""
        pending, self.pending = self.pending, []
        units = np.concatenate([one.units for one in pending])
        patches = {node: torch.cat([one.seam[node] for one in pending]) for node in self.regions.seam}
        zero = np.zeros(len(units), np.int64)
        batch = Batch(self.regions, self.regions.whole(), zero, zero, self._images_of(units), units)
        with exact_dtype(self.device):
            found = self._results(self.regions.tail, self._walk(self.regions.tail, patches, batch), batch)
        for name in pending[0].found:
            parts = zip(*(one.found[name] for one in pending), strict=True)
            found[name] = tuple(torch.cat(part) for part in parts)
        (outputs,) = found.pop("")
        return Visited(units, outputs, {name: (sums, maxima) for name, (sums, maxima) in found.items()})


class _Pending(NamedTuple):
    """Positions between head and tail: ``seam`` on whole maps, ``found`` what the head already gave."""

    units: np.ndarray
    seam: Patches
    found: dict[str, tuple[Tensor, ...]]


def _index_in(members: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of each value among ``members``, or -1."""
    place = np.clip(np.searchsorted(members, values), 0, len(members) - 1)
    return np.where(members[place] == values, place, -1)
