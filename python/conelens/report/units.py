"""Winners of channels as panels: the image patch under each unit's receptive field beside its projection."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from conelens.figures import UnitPanel, cut
from conelens.network import Network
from conelens.peaks import Peak, PeakTable
from conelens.projection import Projection, project


class PictureDataset(Protocol):
    """A data set that can also show its items: `ImageFolder`, `TiledFolder`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...

    def frame(self, index: int) -> np.ndarray:
        """uint8 [H,W,3] as the network sees it."""

    def label(self, index: int) -> str:
        """A name for people."""

    def source(self, index: int) -> Hashable:
        """What the item was cut from: items of one source show the same things."""


@dataclass(frozen=True)
class Winners:
    """The strongest units of one channel, best first, with their projections."""

    layer: str
    channel: int
    peaks: list[Peak]
    labels: list[str]
    patches: list[np.ndarray]
    projections: np.ndarray

    @property
    def dead(self) -> bool:
        """No image made the channel fire."""
        return not self.peaks

    def panel(self, note: str = "") -> UnitPanel:
        """As a panel; the title holds layer, channel and the range of activity."""
        if self.dead:
            text = "dead: no positive activity in any image"
        elif len(self.peaks) == 1:
            text = f"{self.peaks[0].value:.4g}"
        else:
            text = f"{self.peaks[0].value:.4g} … {self.peaks[-1].value:.4g}"
        return UnitPanel(f"{self.layer} · channel {self.channel} · {text}", self.patches, self.projections, note)


def pick(table: PeakTable, dataset: PictureDataset, layer: str, channel: int, k: int, per_source: int | None) -> list[Peak]:
    """The k strongest peaks of a channel, at most `per_source` of them from one source."""
    chosen: list[Peak] = []
    used: dict[Hashable, int] = {}
    for peak in table.top(layer, channel):
        source = dataset.source(peak.image)
        used[source] = used.get(source, 0) + 1
        if per_source is None or used[source] <= per_source:
            chosen.append(peak)
        if len(chosen) == k:
            break
    return chosen


def winners(
    net: Network,
    dataset: PictureDataset,
    table: PeakTable,
    layer: str,
    channels: Sequence[int],
    k: int = 9,
    per_source: int | None = None,
) -> list[Winners]:
    """The k strongest units of each channel, projected in one call per layer.

    Args:
        net: from `conelens.trace`.
        dataset: the one `table` was made from.
        table: holds at least k peaks per channel, more where `per_source` will pass some over.
        layer, channels: what to show.
        per_source: at most so many winners from one source (tiles of one photograph share it); None: no
            limit.
    """
    picked = {channel: pick(table, dataset, layer, channel, k, per_source) for channel in channels}
    units = [(channel, peak) for channel in channels for peak in picked[channel]]
    used = sorted({peak.image for _, peak in units})
    result: Projection | None = None
    if units:
        rows = {image: row for row, image in enumerate(used)}
        result = project(
            net,
            torch.stack([dataset[i] for i in used]).to(net.device),
            layer,
            [channel for channel, _ in units],
            [(peak.y, peak.x) for _, peak in units],
            [rows[peak.image] for _, peak in units],
        )
    frames = {image: dataset.frame(image) for image in used}
    made, start = [], 0
    for channel in channels:
        peaks = picked[channel]
        part = slice(start, start + len(peaks))
        start += len(peaks)
        made.append(_winners(dataset, layer, channel, peaks, result, part, frames))
    return made


def _winners(
    dataset: PictureDataset,
    layer: str,
    channel: int,
    peaks: list[Peak],
    result: Projection | None,
    part: slice,
    frames: dict[int, np.ndarray],
) -> Winners:
    if result is None or not peaks:
        return Winners(layer, channel, [], [], [], np.zeros((0, 3, 1, 1), np.float32))
    crops = _rgb(result.crops[part])
    boxes = result.boxes[part].tolist()
    size = (crops.shape[2], crops.shape[3])
    patches = [cut(frames[peak.image], box, size) for peak, box in zip(peaks, boxes)]
    return Winners(layer, channel, peaks, [dataset.label(p.image) for p in peaks], patches, crops)


def _rgb(crops: Tensor) -> np.ndarray:
    values: Any = crops.float().cpu().numpy()
    return np.repeat(values, 3, 1) if values.shape[1] == 1 else values[:, :3]
