"""Deconvnet projections (Zeiler & Fergus 2014): what in the image made this unit fire, computed on its cone alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from conelens import ops
from conelens.certify import TieProbe
from conelens.cone import plan_cone, unit_boxes
from conelens.cost import choose_route, units_per_chunk
from conelens.errors import ArgumentError, DeadUnitWarning
from conelens.execution import forward_cone, forward_whole, steps_from_whole, take, topdown
from conelens.graph import Node
from conelens.network import Network, check_projectable
from conelens.operators import Gate, MaxPool2d, Place, Step

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
        """Image patches [U, C', h, w] under the boxes, ``fill`` outside the image; ``images`` [N, C', H, W] of the same size."""
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


class _Batch(NamedTuple):
    """Results of one chunk of units, in the order they were given."""

    windows: Tensor  # [U, C, h, w]
    low: np.ndarray  # [U, 2] where the windows begin
    values: Tensor
    ties: Tensor | None
    effect: Tensor | None


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
    rows, channels, places = _units(net, node, images, channel, position, image)
    with torch.inference_mode():
        if len(rows) == 0:
            return _empty(net, node, images, certify)
        if places is None and route == "cone":
            places = _peaks(net, node, images, rows, channels)
        if (
            places is None
            or route == "full"
            or (route == "auto" and choose_route(net.graph, node.index, rows) == "full")
        ):
            batches, places = _full(net, node, images, rows, channels, places, certify)
        else:
            batches = _cones(net, node, images, rows, channels, places, certify)
        result = _assemble(net, node, batches, rows, places, images.device)
    _warn_dead(result, layer, channels)
    return result


# --- arguments -------------------------------------------------------------------------------------------------------


def _units(
    net: Network, node: Node, images: Tensor, channel: Any, position: Any, image: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(image [U], channel [U], position [U, 2] or None for peaks), checked against the layer."""
    given = {"image": _integers("image", image, 1), "channel": _integers("channel", channel, 1)}
    if given["channel"] is None:
        raise ArgumentError("channel: got None, wanted an int or [U] ints")
    where = None
    if not isinstance(position, str):
        where = given["position"] = _integers("position", position, 2)
        if where is not None and where.size == 0:
            where = given["position"] = where.reshape(-1, 2)
        if where is None or where.shape[-1:] != (2,):
            raise ArgumentError(f"position: got {position!r}, wanted 'peak', (y, x) or [U, 2]")
    elif position != "peak":
        raise ArgumentError(f"position: got {position!r}, wanted 'peak', (y, x) or [U, 2]")
    lengths = {
        name: len(v)
        for name, v in given.items()
        if v is not None and v.ndim == (2 if name == "position" else 1)
    }
    units = next(iter(lengths.values()), len(images) if image is None else 1)
    if set(lengths.values()) - {units} or (image is None and units != len(images) and len(images) != 1):
        told = ", ".join(f"{name} of {length}" for name, length in lengths.items())
        raise ArgumentError(
            f"units: got {told} for {len(images)} images; all lengths must agree, and image=[...] says which image each unit is in"
        )
    rows = given["image"]
    if rows is None:
        rows = np.arange(units) if units == len(images) else np.zeros(units, np.int64)
    rows = np.broadcast_to(rows, (units,)).copy()
    channels = np.broadcast_to(given["channel"], (units,)).copy()
    _check_range("image", rows, len(images), "the images given")
    _check_range("channel", channels, node.shape[0], f"layer {node.name}")
    if where is not None:
        where = np.broadcast_to(where, (units, 2))
        _check_range("position y", where[:, 0], node.shape[1], f"layer {node.name}")
        _check_range("position x", where[:, 1], node.shape[2], f"layer {node.name}")
    return rows, channels, where


def _integers(name: str, value: Any, most: int) -> np.ndarray | None:
    if value is None:
        return None
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim > most:
        raise ArgumentError(f"{name}: got {value!r}, wanted whole numbers with at most {most} dimension(s)")
    return array.astype(np.int64)


def _check_range(name: str, values: np.ndarray, size: int, of: str) -> None:
    wrong = values[(values < 0) | (values >= size)]
    if len(wrong):
        raise ArgumentError(f"{name}: got {int(wrong[0])}, wanted 0..{size - 1} ({of} has {size})")


def _warn_dead(result: Projection, layer: str, channels: np.ndarray) -> None:
    dead = (result.values <= 0).nonzero().flatten().tolist()
    if dead:
        named = ", ".join(
            f"{layer}[{int(channels[u])}] at {tuple(result.positions[u].tolist())}" for u in dead[:3]
        )
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        warnings.warn(
            f"no positive activity, so the projection is zero: {named}{more}", DeadUnitWarning, stacklevel=3
        )


# --- the two routes --------------------------------------------------------------------------------------------------


def _cones(
    net: Network,
    node: Node,
    images: Tensor,
    rows: np.ndarray,
    channels: np.ndarray,
    places: np.ndarray,
    certify: bool,
) -> list[_Batch]:
    """Forward and top-down on the cones of known positions."""
    batches = []
    for start, stop in units_per_chunk(net.graph, node.index, len(places), images.device.type):
        plan = plan_cone(net.graph, node.index, places[start:stop])
        probe = TieProbe(net.graph, plan) if certify else None
        picked = _picked(rows[start:stop], images)
        out, steps = forward_cone(net.graph, plan, images, picked, observe=probe.observe if probe else None)
        batches.append(_finish(net, plan, steps, out, channels[start:stop], probe))
    return batches


def _full(
    net: Network,
    node: Node,
    images: Tensor,
    rows: np.ndarray,
    channels: np.ndarray,
    places: np.ndarray | None,
    certify: bool,
) -> tuple[list[_Batch], np.ndarray]:
    """Whole forward pass once per image, then the top-down pass on the cones."""
    graph = net.graph
    remember = [
        i for i in graph.ancestors((node.index,))
        if isinstance(graph[i].op, Gate) or getattr(graph[i].op, "jacobian", False) or getattr(graph[i].op, "rule", None) == "gradient"
    ]  # fmt: skip
    found = np.zeros((len(rows), 2), np.int64) if places is None else places
    order = np.argsort(rows, kind="stable")
    batches: list[_Batch] = []
    per_pass = max(
        1, int(2**28 // max(1, sum(int(np.prod(graph[i].shape)) for i in graph.ancestors((node.index,)))))
    )
    unique, first = np.unique(rows[order], return_index=True)
    bounds = [*first.tolist(), len(rows)]
    for at in range(0, len(unique), per_pass):
        some = unique[at : at + per_pass]
        units = order[bounds[at] : bounds[min(at + per_pass, len(unique))]]
        memory: dict[int, Tensor] = {}
        switches: dict[int, Tensor] = {}
        pooled: dict[int, Tensor] = {}

        def observe(index: int, x: Tensor) -> None:
            if index in remember:
                memory[index] = x
            elif isinstance(graph[index].op, MaxPool2d):
                pooled[index] = x

        batch = images if len(some) == len(images) else images[torch.from_numpy(some).to(images.device)]
        maps = forward_whole(
            graph, batch, (node.index,), switches=switches, observe=observe if remember or certify else None
        )[node.index]
        local = np.searchsorted(some, rows[units])
        if places is None:
            positions = (
                ops.channel_peaks(maps).positions.cpu().numpy()[local, channels[units]].astype(np.int64)
            )
            found[units] = np.stack([positions // node.shape[2], positions % node.shape[2]], 1)
        for start, stop in units_per_chunk(graph, node.index, len(units), images.device.type):
            chunk = units[start:stop]
            plan = plan_cone(graph, node.index, found[chunk])
            picked = torch.from_numpy(local[start:stop]).to(images.device)
            steps = steps_from_whole(graph, plan, picked, switches, memory)
            y, x = (torch.from_numpy(found[chunk, axis]).to(images.device) for axis in (0, 1))
            out = maps[picked, :, y, x][:, :, None, None]
            probe = TieProbe(graph, plan) if certify else None
            if probe is not None:
                probe.observe_whole(pooled, picked)
            batches.append(_finish(net, plan, steps, out, channels[chunk], probe))
    return _unsort(batches, order), found


def _unsort(batches: list[_Batch], order: np.ndarray) -> list[_Batch]:
    """Batches of units sorted by image, as single units in the caller's order where the order differs."""
    if (order == np.arange(len(order))).all():
        return batches
    singles: list[_Batch] = []
    for batch in batches:
        for u in range(len(batch.values)):
            part = slice(u, u + 1)
            singles.append(_Batch(
                batch.windows[part], batch.low[part], batch.values[part],
                None if batch.ties is None else batch.ties[part], None if batch.effect is None else batch.effect[part],
            ))  # fmt: skip
    return [singles[i] for i in np.argsort(order)]


def _finish(
    net: Network, plan: Any, steps: dict[int, Step], out: Tensor, channels: np.ndarray, probe: TieProbe | None
) -> _Batch:
    """Seeds and the top-down pass of one chunk."""
    picked = torch.from_numpy(np.array(channels)).to(out.device)
    values = out.gather(1, picked[:, None, None, None])[:, 0, 0, 0].clamp_min(0)
    windows = topdown(net.graph, plan, steps, values, picked)
    ties = effect = None
    if probe is not None:
        ties, effect = probe.report(steps, values, picked, windows)
    return _Batch(
        windows,
        plan.places[0].low if 0 in plan.places else np.zeros((len(values), 2), np.int64),
        values,
        ties,
        effect,
    )


def _peaks(net: Network, node: Node, images: Tensor, rows: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Positions of the channels' first maxima, for the cone route."""
    maps = forward_whole(net.graph, images, (node.index,))[node.index]
    positions = ops.channel_peaks(maps).positions.cpu().numpy()[rows, channels].astype(np.int64)
    return np.stack([positions // node.shape[2], positions % node.shape[2]], 1)


def _picked(rows: np.ndarray, images: Tensor) -> Tensor | None:
    """Row index per unit, or None when sample u is unit u."""
    if len(rows) == len(images) and (rows == np.arange(len(rows))).all():
        return None
    return torch.from_numpy(rows).to(images.device)


# --- results ---------------------------------------------------------------------------------------------------------


def _assemble(
    net: Network,
    node: Node,
    batches: Sequence[_Batch],
    rows: np.ndarray,
    places: np.ndarray,
    device: torch.device,
) -> Projection:
    """Windows of all chunks, moved into the units' unclipped boxes."""
    boxes = unit_boxes(net.graph, node.index, places)
    height, width = (boxes[:, 2:] - boxes[:, :2]).max(0).tolist()
    crops, start = [], 0
    for batch in batches:
        part = boxes[start : start + len(batch.values), :2]
        crops.append(take(batch.windows, Place(part - batch.low, (height, width)).origin, (height, width)))
        start += len(batch.values)
    ties = [b.ties for b in batches if b.ties is not None]
    effect = [b.effect for b in batches if b.effect is not None]
    return Projection(
        crops[0] if len(crops) == 1 else torch.cat(crops),
        torch.from_numpy(boxes).to(device),
        torch.cat([b.values for b in batches]),
        torch.from_numpy(np.array(places, dtype=np.int64)).to(device),
        torch.from_numpy(rows).to(device),
        (net.input_shape[1], net.input_shape[2]),
        torch.cat(ties) if ties else None,
        torch.cat(effect) if effect else None,
    )


def _empty(net: Network, node: Node, images: Tensor, certify: bool) -> Projection:
    box = unit_boxes(net.graph, node.index, np.zeros((1, 2), np.int64))[0]
    nothing = images.new_zeros(0)
    return Projection(
        images.new_zeros((0, images.shape[1], int(box[2] - box[0]), int(box[3] - box[1]))),
        torch.zeros((0, 4), dtype=torch.int64, device=images.device), nothing,
        torch.zeros((0, 2), dtype=torch.int64, device=images.device),
        torch.zeros(0, dtype=torch.int64, device=images.device), (images.shape[2], images.shape[3]),
        torch.zeros(0, dtype=torch.int64, device=images.device) if certify else None, nothing if certify else None,
    )  # fmt: skip
