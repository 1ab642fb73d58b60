"""The strongest activations of every channel over a data set, as a small table that merges in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conelens import files, ops
from conelens.checked import CheckedImages, warn_skipped
from conelens.data import ImageDataset, iter_batches
from conelens.errors import ArgumentError
from conelens.execution import exact_dtype, forward_whole
from conelens.network import Network

DISTINCT = ("image", "none")
EMPTY = -1
_FORMAT = "conelens.PeakTable 1"
_FIELDS = ("value", "image", "y", "x")


class Peak(NamedTuple):
    """One activation: index of the image, activity, and place (y, x) on the layer's map."""

    image: int
    value: float
    y: int
    x: int


@dataclass
class LayerPeaks:
    """The k strongest peaks of every channel: value [C, k] float32, image [C, k] int64 (-1: none), y and x [C, k] int32."""

    value: np.ndarray
    image: np.ndarray
    y: np.ndarray
    x: np.ndarray

    @classmethod
    def empty(cls, channels: int, k: int) -> LayerPeaks:
        shape = (channels, k)
        return cls(
            np.zeros(shape, np.float32),
            np.full(shape, EMPTY, np.int64),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
        )

    def best(self, k: int, distinct: str) -> LayerPeaks:
        """The k strongest, ordered by (value descending, image, y, x); one per image when ``distinct`` is "image"."""
        missing = self.image == EMPTY
        order = np.lexsort((self.x, self.y, self.image, -self.value, missing), axis=-1)
        sorted_ = self._take(order)
        repeated = sorted_._repeated(distinct) | (sorted_.image == EMPTY)
        kept = np.argsort(repeated, axis=-1, kind="stable")[:, :k]
        result = sorted_._take(kept)
        result._clear(np.take_along_axis(repeated, kept, -1))
        return result

    def _repeated(self, distinct: str) -> np.ndarray:
        """Which peaks [C, M] come after another of the same image (or, when not distinct, the same place) in their row."""
        keys = (self.image,) if distinct == "image" else (self.x, self.y, self.image)
        order = np.lexsort(keys, axis=-1)  # stable: equals keep their order
        same = np.ones((order.shape[0], max(0, order.shape[1] - 1)), bool)
        for key in keys:
            grouped = np.take_along_axis(key, order, -1)
            same &= grouped[:, 1:] == grouped[:, :-1]
        repeated = np.zeros(order.shape, bool)
        np.put_along_axis(repeated, order[:, 1:], same, -1)
        return repeated

    def joined(self, other: LayerPeaks) -> LayerPeaks:
        return LayerPeaks(*(np.concatenate([getattr(self, f), getattr(other, f)], 1) for f in _FIELDS))

    def _take(self, order: np.ndarray) -> LayerPeaks:
        return LayerPeaks(*(np.take_along_axis(getattr(self, f), order, -1) for f in _FIELDS))

    def _clear(self, where: np.ndarray) -> None:
        for name, blank in zip(_FIELDS, (0, EMPTY, 0, 0), strict=True):
            getattr(self, name)[where] = blank


class PeakTable:
    """The k strongest peaks per channel of some layers over some images.

    ``a + b`` merges tables of disjoint images; it is associative and does not depend on order, so a data set may be cut in any
    way. Ties are ordered by image, then y, then x. Only positive activity counts: a channel that never fires has no peaks.
    ``seen`` images went in; ``source`` is a fingerprint of what they and the network are ("": none was given).
    """

    def __init__(self, layers: dict[str, LayerPeaks], k: int, distinct: str, seen: int = 0, source: str = "") -> None:
        self.layers = layers
        self.k = k
        self.distinct = distinct
        self.seen = seen
        self.source = source

    def __repr__(self) -> str:
        return f"PeakTable({', '.join(self.layers)}; k={self.k}, distinct={self.distinct!r}, {self.seen} images seen)"

    def top(self, layer: str, channel: int, k: int | None = None) -> list[Peak]:
        """The strongest peaks of a channel, best first; fewer than k where it fired in fewer images."""
        if layer not in self.layers:
            raise ArgumentError(f"layer: got {layer!r}, wanted one of {', '.join(self.layers)} (the layers of this table)")
        peaks = self.layers[layer]
        if not 0 <= channel < len(peaks.value):
            raise ArgumentError(f"channel: got {channel}, wanted 0..{len(peaks.value) - 1} ({layer} has {len(peaks.value)})")
        if k is not None and not 1 <= k <= self.k:
            raise ArgumentError(f"k: got {k}, wanted 1..{self.k} (what this table holds)")
        columns = zip(*(getattr(peaks, f)[channel, : k or self.k].tolist() for f in _FIELDS), strict=True)
        return [Peak(image, value, y, x) for value, image, y, x in columns if image != EMPTY]

    def __add__(self, other: PeakTable) -> PeakTable:
        if not isinstance(other, PeakTable):
            return NotImplemented
        mine, theirs = ((t.k, t.distinct, {n: len(p.value) for n, p in t.layers.items()}) for t in (self, other))
        if mine != theirs:
            raise ArgumentError(f"tables differ in k, distinct or layers: {mine} and {theirs}; merge tables of one kind")
        if self.source != other.source:
            raise ArgumentError(
                f"tables differ in source: {self.source!r} and {other.source!r}; merge tables of one network and data set"
            )
        layers = {name: peaks.joined(other.layers[name]).best(self.k, self.distinct) for name, peaks in self.layers.items()}
        return PeakTable(layers, self.k, self.distinct, self.seen + other.seen, self.source)

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors; the old file stays whole until the new one is complete. OSError says why not."""
        arrays = {f"{name}\n{f}": getattr(p, f) for name, p in self.layers.items() for f in _FIELDS}
        tensors = {key: torch.tensor(np.ascontiguousarray(array)) for key, array in arrays.items()}
        about = {
            "format": _FORMAT,
            "k": str(self.k),
            "distinct": self.distinct,
            "seen": str(self.seen),
            "source": self.source,
        }
        files.write_tensors(Path(path), tensors, {"conelens": about, "layers": list(self.layers)})

    @classmethod
    def load(cls, path: str | Path) -> PeakTable:
        """Read a table that :meth:`save` wrote; CheckpointError when it is none."""
        with files.reading(path, "peak table"):
            tensors, (about, names) = files.read_tensors(path, _FORMAT, "conelens", "layers")
            # copied, so that whoever overwrites the file does not change the table
            layers = {name: LayerPeaks(*(tensors[f"{name}\n{f}"].numpy().copy() for f in _FIELDS)) for name in names}
            if about["distinct"] not in DISTINCT:
                raise ValueError(f"distinct is {about['distinct']!r}")
            return cls(layers, int(about["k"]), about["distinct"], int(about["seen"]), about.get("source", ""))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a long job; ``table`` holds what is done and can be passed as ``resume``."""

    def __init__(self, table: PeakTable) -> None:
        super().__init__(f"interrupted after {table.seen} images")
        self.table = table


def top_peaks(
    net: Network, dataset: Tensor | ImageDataset, layers: Sequence[str], k: int = 9, distinct: str = "image", *,
    batch_size: int = 16, progress: Callable[[int, int], None] | None = None, resume: PeakTable | None = None,
    source: str = "",
) -> PeakTable:  # fmt: skip
    """One pass over a data set: the k strongest activations of every channel of ``layers``.

    Args:
        net: from :func:`conelens.trace`.
        dataset: tensor [N, C, H, W], or anything with ``len`` and items [C, H, W] in the network's space. An item that raises
            DataError or holds NaN is named in a warning and skipped; its index stays unused.
        layers: names or aliases.
        k: peaks kept per channel.
        distinct: "image": one peak per image and channel (the maximum); "none": the k strongest places whatever their image.
        batch_size: images per forward pass.
        progress: called with (images done, images in all) after each batch.
        resume: a table of the leading ``resume.seen`` images, to go on from.
        source: a fingerprint of network and data set, kept in the table; ``resume`` must carry the same one.

    Raises:
        Interrupted: on Ctrl-C, with the table of what is done.
        ArgumentError, LayerError.
    """
    if distinct not in DISTINCT:
        raise ArgumentError(f"distinct: got {distinct!r}, wanted one of {', '.join(DISTINCT)}")
    if k < 1 or batch_size < 1:
        raise ArgumentError(f"k and batch_size: got {k} and {batch_size}, wanted at least 1")
    nodes = {name: net.node(name) for name in layers}
    if not nodes:
        raise ArgumentError("layers: got none, wanted at least one name (net.layers() lists them)")
    table = resume or PeakTable({n: LayerPeaks.empty(v.shape[0], k) for n, v in nodes.items()}, k, distinct, source=source)
    theirs, ours = ((*a, sorted(b)) for *a, b in ((table.k, table.distinct, table.layers), (k, distinct, nodes)))
    if theirs != ours:
        raise ArgumentError(f"resume: that table has k, distinct, layers {theirs}, wanted {ours}; use the same ones")
    if table.source != source:
        raise ArgumentError(
            f"resume: that table is of other data, its source is {table.source!r}, wanted {source!r}; "
            "go on with the network and images that it was made from, or start anew without resume"
        )
    if table.seen > len(dataset):
        raise ArgumentError(f"resume: that table has seen {table.seen} images, but the data set holds {len(dataset)}")
    targets = tuple(sorted({node.index for node in nodes.values()}))
    rest = CheckedImages(net, dataset, table.seen)
    try:
        for batch in iter_batches(rest, batch_size, on_problem=warn_skipped):
            with torch.inference_mode(), exact_dtype(net.device):
                maps = forward_whole(net.graph, batch.images, targets)
                indices = np.array(batch.indices) + rest.start
                found = {name: _peaks_of(maps[node.index], indices, k, distinct) for name, node in nodes.items()}
            merged = {name: peaks.joined(found[name]).best(k, distinct) for name, peaks in table.layers.items()}
            table = PeakTable(merged, k, distinct, int(indices[-1]) + 1, source)
            if progress is not None:
                progress(table.seen, len(dataset))
    except KeyboardInterrupt:
        raise Interrupted(table) from None
    return PeakTable(table.layers, k, distinct, len(dataset), source)


def _peaks_of(maps: Tensor, indices: np.ndarray, k: int, distinct: str) -> LayerPeaks:
    """Peaks of one batch of maps [N, C, H, W]: per channel N of them, or N * min(k, H * W) when not distinct."""
    width = maps.shape[3]
    peaks = ops.channel_peaks(maps)
    if bool(torch.isnan(peaks.values).any()):
        raise ArgumentError("the network gives NaN for finite images; its weights or their dtype overflow")
    if distinct == "image":
        values, positions = peaks.values[..., None].float(), peaks.positions[..., None].long()
    else:
        values, positions = _strongest(maps.flatten(2).float(), min(k, maps.shape[2] * width))
    value, position = (t.permute(1, 0, 2).flatten(1).cpu().numpy() for t in (values, positions))
    image = np.broadcast_to(np.repeat(indices, values.shape[2]), value.shape).copy()
    result = LayerPeaks(
        value.astype(np.float32),
        image,
        (position // width).astype(np.int32),
        (position % width).astype(np.int32),
    )
    result._clear(result.value <= 0)
    return result


def _strongest(cells: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of [N, C, M] with their places; among equals the first places, which torch.topk does not promise."""
    least = cells.topk(k, dim=2).values[..., -1:]
    above, equal = cells > least, cells == least
    room = k - above.sum(2, keepdim=True)
    chosen = above | (equal & (equal.cumsum(2) <= room))
    positions = chosen.nonzero()[:, 2].reshape(*cells.shape[:2], k)
    return cells.gather(2, positions), positions
