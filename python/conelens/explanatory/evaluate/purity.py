"""Part interpretability without people: how well the regions of a filter or node match one part of the object.

The automatic definition of Zhang et al., "Interpretable Convolutional Neural Networks" (2018), after Bau et al., "Network
Dissection" (2017): activity above a threshold T is drawn into the image, a disc per unit, their union is the region of the
filter on that image; the filter is associated with a part there when the intersection over union with the part is above 0.2;
P(f, part) is the share of the images with that part on which it is; the part interpretability of the filter is its best
part's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.detectors import Detector
from conelens.explanatory.features import Grid

Regions = Callable[[int], Tensor]

_BLOCK_BYTES = 64 << 20
_BITS = np.array([value.bit_count() for value in range(256)], np.uint8)


@dataclass(frozen=True)
class Purity:
    """Part interpretability.

    Args:
        name: the detector.
        association: [F, P] float32, P(f, part): the share of the images that show the part on which f is associated with it;
            NaN for a part that no image shows.
        shown: [F] float32, the share of all images in which f has a region.
        threshold: [F] float32, activity or score above which a detection counts.
    """

    name: str
    association: Tensor
    shown: Tensor
    threshold: Tensor

    @property
    def of_nodes(self) -> Tensor:
        """Each filter's or node's best part: [F] float32."""
        return self.association.nan_to_num(-1.0).amax(1)

    @property
    def best_part(self) -> Tensor:
        """Which part that is: [F] int64, the first of equals."""
        return self.association.nan_to_num(-1.0).max(1).indices

    @property
    def mean(self) -> float:
        return float(self.of_nodes.double().mean())


def purity_of_maps(
    features: Tensor, grid: Grid, regions: Regions, radius: float, *, share: float = 0.005, overlap: float = 0.2,
    name: str = "raw filters",
) -> Purity:  # fmt: skip
    """Part interpretability of filters from their maps.

    Args:
        features: [N, D, H, W], any float type; may be memory-mapped.
        grid: where the layer's units stand.
        regions: image -> bool [P, height, width], which pixels each part covers (`PartSet.regions`); nothing: not shown.
        radius: of the disc that stands for a unit, in pixels: half its receptive field (of which units mostly use the
            middle), or 35 as in the papers' patches of 70 x 70.
        share: T_f is such that at most this share of the filter's positive units over all places and images lies above it.
        overlap: intersection over union above which filter and part are associated.
    """
    _check(len(features), radius, share, overlap)
    if features.ndim != 4 or tuple(features.shape[2:]) != grid.size:
        raise ArgumentError(
            f"features: got shape {list(features.shape)}, wanted [N, D, {grid.size[0]}, {grid.size[1]}] (the grid's)"
        )
    filters = features.shape[1]
    at_once = max(1, _BLOCK_BYTES // max(1, 4 * features[:, :1].numel()))
    threshold = torch.cat([_threshold(features[:, f : f + at_once].transpose(0, 1), share) for f in range(0, filters, at_once)])
    places = grid.pixels(torch.arange(grid.size[0] * grid.size[1])).numpy()

    def detections(image: int) -> tuple[np.ndarray, np.ndarray]:
        who, cell = (features[image].flatten(1).float() > threshold[:, None]).nonzero().T
        return who.numpy(), places[cell.numpy()]

    return _purity(name, detections, len(features), filters, threshold, regions, radius, overlap)


def purity_of_nodes(detector: Detector, regions: Regions, radius: float, *, share: float, overlap: float = 0.2) -> Purity:
    """Part interpretability of nodes: the region of a node is the disc at its position, where its score is above its threshold.

    Args:
        detector: positions and scores on N images.
        share: T is such that at most this share of the images has a region of the node. For a fair comparison with filters
            give ``float(purity_of_maps(...).shown.mean())``: nodes and filters then speak up in as many images on average, and
            an image without a region can be associated with nothing.
        regions, radius, overlap: as in `purity_of_maps`.
    """
    _check(len(detector.scores), radius, share, overlap)
    threshold = _threshold(detector.scores.T, share)
    positions = detector.positions.float().numpy()

    def detections(image: int) -> tuple[np.ndarray, np.ndarray]:
        who = (detector.scores[image] > threshold).nonzero()[:, 0].numpy()
        return who, positions[image, who]

    return _purity(
        detector.name, detections, len(detector.scores), detector.scores.shape[1], threshold, regions, radius, overlap
    )


def _check(images: int, radius: float, share: float, overlap: float) -> None:
    if not images:
        raise ArgumentError("images: got none, wanted at least one")
    if not radius > 0:
        raise ArgumentError(f"radius: got {radius}, wanted pixels above 0")
    if not 0 < share <= 1 or not 0 <= overlap < 1:
        raise ArgumentError(f"share and overlap: got {share} and {overlap}, wanted 0 < share <= 1 and 0 <= overlap < 1")


def _threshold(values: Tensor, share: float) -> Tensor:
    """[F, ...] -> T [F] float32, at least 0, with at most ``share`` of a row's values above it."""
    rows = values.flatten(1).float()
    if not bool(torch.isfinite(rows).all()):
        raise ArgumentError("features: got NaN or infinity, wanted finite activity")
    above = int(share * rows.shape[1] + 1e-9)
    if above >= rows.shape[1]:
        return torch.zeros(len(rows))
    return rows.topk(above + 1, 1).values[:, above].clamp(min=0)


def _purity(
    name: str, detections: Callable[[int], tuple[np.ndarray, np.ndarray]], images: int, width: int, threshold: Tensor,
    regions: Regions, radius: float, overlap: float,
) -> Purity:  # fmt: skip
    """Association image by image; regions and parts are rows of bits, eight pixels to a byte."""
    hits: np.ndarray | None = None
    for image in range(images):
        parts = regions(image).numpy()
        if hits is None:
            hits, seen = np.zeros((width, len(parts)), np.int64), np.zeros(len(parts), np.int64)
            shown = np.zeros(width, np.int64)
        packed = np.packbits(parts.reshape(len(parts), -1), axis=1)
        areas = _count(packed)
        seen += areas > 0
        who, places = detections(image)
        if not len(who):
            continue
        # detections come by node: where each node's begin
        nodes, starts = np.unique(who, return_index=True)
        distinct, which = np.unique(places, axis=0, return_inverse=True)
        discs = _discs(distinct, radius, parts.shape[1:])
        region = np.bitwise_or.reduceat(discs[which.ravel()], starts, axis=0)
        own = _count(region)
        shown[nodes] += own > 0
        for part in np.flatnonzero(areas):
            common = _count(region & packed[part])
            hits[nodes, part] += common > overlap * (own + areas[part] - common)
    assert hits is not None
    association = np.full(hits.shape, np.nan, np.float32)
    np.divide(hits, seen, out=association, where=seen > 0, casting="unsafe")
    return Purity(name, torch.from_numpy(association), torch.from_numpy(shown / images).float(), threshold)


def _discs(centres: np.ndarray, radius: float, size: tuple[int, ...]) -> np.ndarray:
    """Pixels whose centre is at most ``radius`` from each of [n, 2] places, packed: uint8 [n, ceil(height * width / 8)]."""
    down, across = ((np.arange(side) - centres[:, axis, None]) ** 2 for axis, side in enumerate(size))
    inside = down[:, :, None] + across[:, None, :] <= radius**2
    return np.packbits(inside.reshape(len(centres), -1), axis=1)


def _count(packed: np.ndarray) -> np.ndarray:
    return _BITS[packed].sum(1, dtype=np.int64)
