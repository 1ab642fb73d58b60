"""The data of Zeiler & Fergus' occlusion figure (2014, Fig. 7), all five panels from one sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conelens.data import ImageDataset
from conelens.errors import ArgumentError
from conelens.network import Network, check_projectable
from conelens.occlusion.run import DEFAULT_MEMORY, occlude
from conelens.occlusion.sweep import Sweep, SweepInterrupted
from conelens.occlusion.windows import Windows, fill_images, occluded
from conelens.peaks import Peak, top_peaks
from conelens.projection import project

STRONGEST = {"sum": "strongest", "max": "strongest_max"}  # as `record` calls them


@dataclass(frozen=True)
class ZeilerFergus:
    """One row of the figure: what covering each part of one image does to a feature map and to the class.

    Attributes:
        image: [C, H, W], as the network takes it.
        sweep: that this was read off.
        occluded: [C, H, W], panel (a): the image under the window at ``place``, where the class (or, without a classifier, the
            map) is weakest.
        place: (row, column) of that window.
        layer, channel: the map that answers most to the image as it is.
        activity: [rows, cols], panel (b): max(0, x) of that map summed over its cells; ``clean_activity`` with nothing covered.
        projections: [1 + M, C, h, w], panel (c): deconvnet projection of the map's peak, in this image and then in others;
            ``patches`` [1 + M, C, h, w] what those images show there (0 beyond their border); ``others`` the M indices.
        label: the correct class, None without a classifier, as are the fields below.
        probability: [rows, cols], panel (d): of ``label``; ``clean_probability`` with nothing covered.
        labels: [rows, cols] int64, panel (e): the most probable class, -1 where the network gave NaN.
    """

    image: Tensor
    sweep: Sweep
    occluded: Tensor
    place: tuple[int, int]
    layer: str
    channel: int
    activity: Tensor
    clean_activity: float
    projections: Tensor
    patches: Tensor
    others: list[int]
    label: int | None = None
    probability: Tensor | None = None
    clean_probability: float | None = None
    labels: Tensor | None = None

    def box(self) -> tuple[int, int, int, int]:
        """Pixels of the window of panel (a): top, left, bottom, right (exclusive)."""
        return self.sweep.windows.box(*self.place)

    def smooth(self, values: Tensor) -> Tensor:
        """Panel (b) or (d) as a picture [H, W]: bilinear between the windows' centres, NaN where one of them is not finite."""
        lost = ~values.isfinite()
        picture = self.sweep.upsample(values.masked_fill(lost, 0.0)[None])[0]
        return picture.masked_fill(self.sweep.upsample(lost.to(values)[None])[0] > 0, float("nan"))

    def label_map(self) -> Tensor:
        """Panel (e) as a picture [H, W] int64: at each pixel the label of the window whose centre is nearest."""
        if self.labels is None:
            raise ArgumentError("label_map: this network is no classifier, so there are no labels; see activity")
        windows = self.sweep.windows
        rows = _nearest(windows.tops, windows.bottoms, windows.image_size[0])
        columns = _nearest(windows.lefts, windows.rights, windows.image_size[1])
        return self.labels[rows[:, None], columns]


def zeiler_fergus(
    net: Network,
    images: Tensor,
    layer: str,
    window: int | Sequence[int] = 48,
    stride: int | Sequence[int] = 8,
    fill: Any = 0.0,
    border: str = "flush",
    *,
    label: Any = None,
    strongest: str = "max",
    others: Tensor | ImageDataset | None = None,
    count: int = 8,
    form: str = "auto",
    memory: int = DEFAULT_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> list[ZeilerFergus]:
    """Zeiler & Fergus' occlusion figure for each image, from one sweep. :func:`conelens.report.occlusion.figure_row` and
    :func:`conelens.heatmaps.occlusion_figure` draw it.

    Args:
        net: from :func:`conelens.trace`.
        images: [N, C, H, W] in the network's input space.
        layer: whose strongest map is followed (the paper: layer 5); name or alias.
        window, stride, fill, border, form, memory, progress: as in :func:`conelens.occlude`. The paper does not give the
            size of its grey square, nor its stride.
        label: the correct class, for all images or [N]; None: each image's most probable class as it is.
        strongest: which map counts as strongest on the image as it is, which the paper leaves open: by the "max" of its
            activity, the peak that is projected, or by its "sum".
        others: images that the map is also projected from, where it answers most: [K, C, H, W] or a data set of such items;
            None: the other ``images``. An image among them that is the shown one is passed over.
        count: how many of them at most.

    Raises:
        SweepInterrupted: on Ctrl-C. ``occlude(..., record=record_strongest(layer, strongest), resume=its sweep)`` finishes that
            sweep, and :func:`panels_of` reads the figure off it.
        ArgumentError, LayerError, UnsupportedOperatorError: before the sweep begins. Whatever goes wrong later has what is
            done of the sweep as its attribute ``sweep``.
    """
    record = record_strongest(layer, strongest)
    check_figure(net, images, layer, label, others, count)
    sweep = occlude(net, images, window, stride, fill, border, record=record, form=form, memory=memory, progress=progress)
    try:
        return panels_of(net, images, sweep, layer, fill, label=label, strongest=strongest, others=others, count=count)
    except KeyboardInterrupt:
        raise SweepInterrupted(sweep) from None
    except Exception as error:
        error.sweep = sweep  # type: ignore[attr-defined]
        error.add_note("the sweep is finished: panels_of(net, images, error.sweep, ...) reads the figure off it")
        raise


def record_strongest(layer: str, strongest: str = "max") -> Mapping[str, str]:
    """What a sweep must ``record`` so that :func:`panels_of` finds each image's strongest map of ``layer`` in it."""
    if strongest not in STRONGEST:
        raise ArgumentError(f"strongest: got {strongest!r}, wanted one of {', '.join(STRONGEST)}")
    return {layer: STRONGEST[strongest]}


def check_figure(
    net: Network, images: Tensor, layer: str, label: Any = None, others: Tensor | ImageDataset | None = None, count: int = 8
) -> None:
    """Raise what :func:`panels_of` would raise of these arguments, so that no sweep is made in vain."""
    if not isinstance(net, Network):
        raise ArgumentError(f"net: got {type(net).__name__}, wanted a traced network; conelens.trace(module, example) makes it")
    net.check_images(images)
    check_projectable(net.graph, net.node(layer).index)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ArgumentError(f"count: got {count!r}, wanted how many other images to show, 0 or more")
    if label is not None:
        _check_label(label, net.graph.output_shapes[0], len(images))
    if isinstance(others, Tensor):
        net.check_images(others)
    elif others is not None and not (hasattr(others, "__len__") and hasattr(others, "__getitem__")):
        raise ArgumentError(f"others: got {type(others).__name__}, wanted images [K, C, H, W] or a data set of such items")


def _check_label(label: Any, output: tuple[int, ...], count: int) -> None:
    """ArgumentError unless ``label`` is a class, or one for each of ``count`` images, of outputs of shape ``output``."""
    if len(output) != 1 or output[0] < 2:
        raise ArgumentError(f"label: got {label!r}, but this network is no classifier; leave label out")
    try:
        chosen = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    if chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.ndim > 1 or chosen.numel() not in (1, count):
        raise ArgumentError(f"label: got {label!r}, wanted the number of a class, or one for each of the {count} images")
    if int(chosen.min()) < 0 or int(chosen.max()) >= output[0]:
        raise ArgumentError(f"label: got {label!r}, this network has classes 0 to {output[0] - 1}")


def panels_of(
    net: Network, images: Tensor, sweep: Sweep, layer: str, fill: Any, *, label: Any = None, strongest: str = "max",
    others: Tensor | ImageDataset | None = None, count: int = 8,
) -> list[ZeilerFergus]:  # fmt: skip
    """The figure's data from a finished sweep of ``images`` that recorded ``layer``; arguments as in :func:`zeiler_fergus`.

    ``fill`` is that of the sweep, to show the occluder. The strongest map is looked for among the recorded ones.
    """
    if not sweep.complete:
        done, total = int(sweep.done.sum()), sweep.done.numel()
        raise ArgumentError(f"sweep: only {done} of {total} positions are done; finish it with occlude(..., resume=sweep)")
    if len(sweep.clean) != len(images):
        raise ArgumentError(f"images: got {len(images)}, but the sweep is of {len(sweep.clean)}")
    check_figure(net, images, layer, label, others, count)
    active = sweep.recorded(layer)
    which = (active.clean_sums if strongest == "sum" else active.clean_maxima).argmax(1)
    each = torch.arange(len(images), device=which.device)
    channels = active.channels[each, which].tolist()
    activity = active.sums[each, :, :, which]
    classes = _class_panels(sweep, label)
    weakest = activity if not classes else torch.stack([panel["probability"] for panel in classes])
    places = [divmod(index, weakest.shape[2]) for index in weakest.flatten(1).argmin(1).tolist()]
    covered = _under(images, fill, sweep.windows, places)
    maps = _projections(net, images, layer, channels, others, count)
    return [
        ZeilerFergus(
            images[n], sweep, covered[n], places[n], layer, channels[n], activity[n],
            float(active.clean_sums[n, which[n]]), *maps[n], **classes[n] if classes else {},
        )
        for n in range(len(images))
    ]  # fmt: skip


def _class_panels(sweep: Sweep, label: Any) -> list[dict[str, Any]]:
    """What concerns classes, per image; empty without a classifier."""
    if sweep.classifier is None:
        return []
    probability = sweep.probability(label)
    clean = sweep.clean if sweep.classifier == "probabilities" else sweep.clean.softmax(-1)
    labels = sweep.clean_label if label is None else torch.as_tensor(label)
    chosen = labels.expand(len(clean)).tolist()
    found = sweep.label.masked_fill(sweep.outputs.isnan().any(-1), -1)
    return [
        {"label": k, "probability": probability[n], "clean_probability": float(clean[n, k]), "labels": found[n]}
        for n, k in enumerate(chosen)
    ]


def _under(images: Tensor, fill: Any, windows: Windows, places: list[tuple[int, int]]) -> Tensor:
    """Each image with its one window painted over."""
    units = np.array([(n, *place) for n, place in enumerate(places)])
    return occluded(images, fill_images(fill, images, windows.largest), windows, units)


def _projections(
    net: Network, images: Tensor, layer: str, channels: list[int], others: Tensor | ImageDataset | None, count: int
) -> list[tuple[Tensor, Tensor, list[int]]]:
    """Per image: projections and patches [1 + M, C, h, w] of its map, here and in the M other images where it is strongest."""
    pool: Tensor | ImageDataset = images if others is None else others
    peaks: list[list[Peak]] = [[] for _ in channels]
    if count and len(pool):
        table = top_peaks(net, pool, [layer], k=count + 1)  # one more: the image itself may be among them
        for n, channel in enumerate(channels):
            found = [peak for peak in table.top(layer, channel) if not torch.equal(pool[peak.image].to(images), images[n])]
            peaks[n] = found[:count]
    used = sorted({peak.image for found in peaks for peak in found})
    stack = torch.cat([images, *(pool[i][None].to(images) for i in used)])
    row_of = {image: len(images) + row for row, image in enumerate(used)}
    units = [(n, *(row_of[peak.image] for peak in found)) for n, found in enumerate(peaks)]
    channel_of = [channels[n] for n, rows in enumerate(units) for _ in rows]
    projected = project(net, stack, layer, channel_of, image=[row for rows in units for row in rows])
    patches = projected.patches(stack)
    sizes = [len(rows) for rows in units]
    parts = zip(projected.crops.split(sizes), patches.split(sizes), peaks, strict=True)
    return [(crops, shown, [peak.image for peak in found]) for crops, shown, found in parts]


def _nearest(starts: np.ndarray, ends: np.ndarray, cells: int) -> Tensor:
    """For each of ``cells`` pixels the window whose centre is nearest, the first of two equally near."""
    centres = (starts + ends - 1) / 2
    return torch.from_numpy(np.abs(np.arange(cells)[:, None] - centres).argmin(1))
