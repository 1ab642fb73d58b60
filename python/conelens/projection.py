"""Deconvnet projections (Zeiler & Fergus 2014): what in the image made this unit fire, computed on its cone alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conelens import ops
from conelens.certify import TieProbe
from conelens.cone import ConePlan, plan_cone, unit_boxes
from conelens.cost import choose_route, chunks_of_units, images_per_pass
from conelens.errors import ArgumentError, DeadUnitWarning
from conelens.execution import exact_dtype, forward_cone, forward_whole, steps_from_whole, take, topdown
from conelens.graph import Graph, Node
from conelens.network import Network, check_projectable
from conelens.operators import MaxPool2d, Place, Step
from conelens.units import Units, read_units

ROUTES = ("auto", "cone", "full")


@dataclass
class Projection:
    """Projections of U units.

    Attributes:
        crops: [U, C, h, w] in the network's input space: each unit's receptive field, padded with zeros at the bottom and right
            to the largest of the call. Sign and scale are kept; zero means no contribution.
        boxes: [U, 4] int64 (top, left, bottom, right; exclusive; pixels), unclipped: they may leave the image.
        values: [U] the units' activity max(0, activation), which is also the seed.
        positions: [U, 2] int64 (y, x) on the layer's map.
        images: [U] int64, the image of each unit.
        near_ties: [U] int64 or None: switches in the cone decided within 8 units in the last place.
        tie_effect: [U] or None: relative 2-norm by which the projection changes when those switches flip.
    """

    crops: Tensor
    boxes: Tensor
    values: Tensor
    positions: Tensor
    images: Tensor
    image_size: tuple[int, int]
    near_ties: Tensor | None = None
    tie_effect: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def patches(self, images: Tensor, fill: float = 0.0) -> Tensor:
        """Image patches [U, C', h, w] under the boxes, ``fill`` outside the image; ``images`` [N, C', H, W]."""
        if images.ndim != 4 or tuple(images.shape[2:]) != self.image_size:
            raise ArgumentError(
                f"images: got shape {tuple(images.shape)}, wanted [N, C, {self.image_size[0]}, {self.image_size[1]}]"
            )
        size = (self.crops.shape[2], self.crops.shape[3])
        offset = self.boxes[:, :2].cpu().numpy()
        return take(images, offset, size, fill, self.images.to(images.device))

    @property
    def pixels(self) -> Tensor:
        """[U, C, H, W]: every projection on its whole image, zero outside the cone. Made on each access."""
        return (
            torch.cat(list(self.iter_pixels()))
            if len(self)
            else self.crops.new_zeros((0, self.crops.shape[1], *self.image_size))
        )

    def iter_pixels(self, chunk: int = 64) -> Iterator[Tensor]:
        """The same in chunks [<= chunk, C, H, W], for many units."""
        for start in range(0, len(self), chunk):
            part = slice(start, start + chunk)
            yield take(self.crops[part], -self.boxes[part, :2].cpu().numpy(), self.image_size)


def project(
    net: Network, images: Tensor, layer: str, channel: Any, position: Any = "peak", image: Any = None, *, route: str = "auto",
    certify: bool = False,
) -> Projection:  # fmt: skip
    """Project units of ``layer`` down to the pixels by the deconvnet of Zeiler & Fergus (2014).

    Args:
        net: from :func:`conelens.trace`.
        images: [N, C, H, W], dtype and device of the network, in its input space.
        layer: name or alias; the unit's activity is max(0, output of that module).
        channel: int for all units, or [U] ints.
        position: "peak" (first maximum of the channel's map), (y, x) for all units, or [U, 2] ints.
        image: [U] indices into ``images``; 0..N-1 by default. Images that several units share run once.
        route: "cone" computes the receptive-field cone alone, "full" the whole forward pass, "auto" the cheaper by the
            checked-in cost model. Both agree to rounding at equal switches.
        certify: also report switches that rounding could flip, and how much the projection would change.

    Returns:
        A :class:`Projection`; a unit without positive activity projects to zero and is named in a DeadUnitWarning.

    Raises:
        ArgumentError, LayerError, UnsupportedOperatorError.

    Conventions: switches recorded in the forward pass, adding where windows overlap; the signal is rectified at every ReLU of
    the network, in its own order; transposed filters without biases; batch norm by its scale; the seed is the activation.
    """
    net.check_images(images)
    node = net.node(layer)
    check_projectable(net.graph, node.index)
    if route not in ROUTES:
        raise ArgumentError(f"route: got {route!r}, wanted one of {', '.join(ROUTES)}")
    job = _Job(net.graph, node, images, read_units(node, images, channel, position, image), certify)
    with torch.inference_mode(), exact_dtype(net.device):  # a third less time per small operation than no_grad
        job.run(route)
    result = job.result()
    _warn_dead(result, layer, job.units.channels)
    return result


def _warn_dead(result: Projection, layer: str, channels: np.ndarray) -> None:
    if all(value > 0 for value in result.values.tolist()):
        return
    values = result.values.float().cpu().numpy()
    if np.isnan(values).any():
        raise ArgumentError(f"{layer} gives NaN for finite images; its weights or their dtype overflow")
    dead = np.flatnonzero(values <= 0).tolist()
    named = ", ".join(f"{layer}[{int(channels[u])}] at {tuple(result.positions[u].tolist())}" for u in dead[:3])
    more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
    warnings.warn(f"no positive activity, so the projection is zero: {named}{more}", DeadUnitWarning, stacklevel=3)


class _Job:
    """One call of :func:`project`, its results filled in chunk by chunk."""

    def __init__(self, graph: Graph, node: Node, images: Tensor, units: Units, certify: bool) -> None:
        self.graph, self.node, self.images, self.units, self.certify = graph, node, images, units, certify
        self.device = images.device
        count = len(units)
        self.places = np.zeros((count, 2), np.int64) if units.places is None else units.places
        self.values = images.new_empty(count)
        self.windows: list[tuple[np.ndarray, Tensor, np.ndarray]] = []  # (units, [U, C, h, w], where they begin)
        self.near_ties = torch.zeros(count, dtype=torch.int64, device=self.device) if certify else None
        self.tie_effect = images.new_zeros(count) if certify else None

    def run(self, route: str) -> None:
        if len(self.units):
            known = self.units.places is not None
            if route == "auto":
                route = choose_route(self.graph, self.node.index, self.units.rows) if known else "full"
            if route == "full":
                self._full(known)
            else:
                if not known:
                    self._find_peaks()
                self._cones()

    # --- the two routes ----------------------------------------------------------------------------------------------

    def _cones(self) -> None:
        """Forward and top-down on the cones of known positions."""
        rows = self.units.rows
        for chunk in chunks_of_units(self.graph, self.node.index, self.places, self.device.type):
            plan = plan_cone(self.graph, self.node.index, self.places[chunk])
            probe = TieProbe(self.graph, plan) if self.certify else None
            in_order = len(chunk) == len(self.images) and (rows[chunk] == np.arange(len(chunk))).all()
            picked = None if in_order else self._tensor(rows[chunk])
            channels = self._tensor(self.units.channels[chunk])
            observe = probe.observe if probe else None
            out, steps = forward_cone(self.graph, plan, self.images, picked, channels, observe=observe)
            self._finish(chunk, plan, steps, out, channels, probe)

    def _full(self, known: bool) -> None:
        """Whole forward pass once per image, then the top-down pass on the cones."""
        graph = self.graph
        remember = {i for i in graph.ancestors((self.node.index,)) if graph[i].op.remembers}
        for units, local, batch in self._passes():
            memory: dict[int, Tensor] = {}
            pooled: dict[int, Tensor] = {}
            switches: dict[int, Tensor] = {}

            def observe(index: int, x: Tensor, memory: dict[int, Tensor] = memory, pooled: dict[int, Tensor] = pooled) -> None:
                if index in remember:
                    memory[index] = x
                elif isinstance(graph[index].op, MaxPool2d):
                    pooled[index] = x

            watched = observe if remember or self.certify else None
            maps = forward_whole(graph, batch, (self.node.index,), switches=switches, observe=watched)[self.node.index]
            if not known:
                self._locate(maps, units, local)
            for part in chunks_of_units(graph, self.node.index, self.places[units], self.device.type):
                chunk = units[part]
                plan = plan_cone(graph, self.node.index, self.places[chunk])
                picked = self._tensor(local[part])
                steps = steps_from_whole(graph, plan, picked, switches, memory)
                y, x = (self._tensor(self.places[chunk, axis]) for axis in (0, 1))
                probe = TieProbe(graph, plan) if self.certify else None
                if probe is not None:
                    probe.observe_whole(pooled, picked)
                channels = self._tensor(self.units.channels[chunk])
                self._finish(chunk, plan, steps, maps[picked, channels, y, x], channels, probe)

    def _passes(self) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
        """(units, image of each within the batch, images): every image that is asked for once, as memory allows."""
        rows = self.units.rows
        wanted = np.unique(rows)
        size = images_per_pass(self.graph, self.node.index, self.device.type)
        for start in range(0, len(wanted), size):
            some = wanted[start : start + size]
            units = np.flatnonzero((rows >= some[0]) & (rows <= some[-1]))
            batch = self.images if len(some) == len(self.images) else self.images[self._tensor(some)]
            yield units, np.searchsorted(some, rows[units]), batch

    def _find_peaks(self) -> None:
        for units, local, batch in self._passes():
            self._locate(forward_whole(self.graph, batch, (self.node.index,))[self.node.index], units, local)

    def _locate(self, maps: Tensor, units: np.ndarray, local: np.ndarray) -> None:
        """Places of the channels' first maxima."""
        positions = ops.channel_peaks(maps).positions.cpu().numpy()[local, self.units.channels[units]].astype(np.int64)
        self.places[units] = np.stack(np.divmod(positions, self.node.shape[2]), 1)

    # --- results -----------------------------------------------------------------------------------------------------

    def _finish(
        self, chunk: np.ndarray, plan: ConePlan, steps: dict[int, Step], out: Tensor, channels: Tensor, probe: TieProbe | None
    ) -> None:
        """Seeds, top-down pass, and the results of one chunk of units."""
        values = out.clamp_min(0)
        windows = topdown(self.graph, plan, steps, values, channels)
        self.windows.append((chunk, windows, plan.places[0].low))
        if len(chunk) == len(self.units):
            self.values = values  # one chunk holds all units, in order
        else:
            self.values[self._tensor(chunk)] = values
        if probe is not None and self.near_ties is not None and self.tie_effect is not None:
            index = self._tensor(chunk)
            self.near_ties[index], self.tie_effect[index] = probe.report(steps, values, channels, windows)

    def result(self) -> Projection:
        """Windows of all chunks, moved into the units' unclipped boxes; ordinary tensors, as autograd takes them."""
        count = len(self.units)
        boxes = unit_boxes(self.graph, self.node.index, self.places if count else np.zeros((1, 2), np.int64))
        height, width = (boxes[:, 2:] - boxes[:, :2]).max(0).tolist()
        crops: Tensor | None = None
        for chunk, windows, low in self.windows:
            moved = take(windows, Place(boxes[chunk, :2] - low, (height, width)).origin, (height, width))
            if len(chunk) == count:
                crops = moved.clone()
            else:
                crops = self.images.new_empty((count, *moved.shape[1:])) if crops is None else crops
                crops[self._tensor(chunk)] = moved
        if crops is None:
            crops = self.images.new_empty((0, self.images.shape[1], height, width))
        return Projection(
            crops, self._tensor(boxes[:count]), self.values.clone(), self._tensor(self.places), self._tensor(self.units.rows),
            (self.images.shape[2], self.images.shape[3]), self.near_ties, self.tie_effect,
        )  # fmt: skip

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
