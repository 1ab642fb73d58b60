"""Location instability: how much the distance between a node and a part of the object varies from image to image.

Zhang et al., "Interpreting CNN Knowledge via an Explanatory Graph" (2018), and "Interpretable Convolutional Neural Networks"
(2018). On image I, d_I = |p_part - p_node| / diagonal of the network input; D is the standard deviation of d_I (n - 1 in the
denominator) over the images that are selected for the node. 0: the node keeps its distance to the part; two independent
uniform points: 0.175.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.detectors import Detector
from conelens.landmarks import Landmarks

TOP = {"visible": 100, "release": 20}
RELEASE_NODES = 167
BLOCK = 1 << 22  # scores sorted at a time


@dataclass(frozen=True)
class Instability:
    """Location instability of a detector.

    Args:
        name: the detector.
        deviation: [F, P] float32, D of every node and part; NaN where fewer than two images could be used.
        nodes: [n] int64, the nodes that ``mean`` is over.
        images: [F, P, top] int32, the images that were used, best score first; -1 where there are fewer.
        distances: [F, P, top] float32, d_I of these images; NaN where there are fewer.
    """

    name: str
    deviation: Tensor
    nodes: Tensor
    images: Tensor
    distances: Tensor

    @property
    def mean(self) -> float:
        """Mean D over nodes and parts, those without two images left out; NaN when nothing is left."""
        return float(self.deviation[self.nodes].double().nanmean())

    @property
    def by_part(self) -> Tensor:
        """Mean D over nodes for each part: [P] float32."""
        return self.deviation[self.nodes].double().nanmean(0).float()

    @property
    def skipped(self) -> int:
        """How many pairs of node and part, of those that the mean is over, had fewer than two images."""
        return int(self.deviation[self.nodes].isnan().sum())


def instability(
    detector: Detector, landmarks: Landmarks, *, selection: str = "visible", top: int | None = None, nodes: int | None = None
) -> Instability:
    """Location instability of every node (or filter) with every part.

    Args:
        detector: positions and scores on the images of ``landmarks``.
        landmarks: an image whose part is NaN (not annotated, not visible, or annotated several times) is not used for that
            part.
        selection: which images count for a node, and which nodes for the mean. "visible" (the interpretable CNNs' code): the
            ``top`` images with the highest scores among those where the part is visible; all nodes. "release" (the
            explanatory graph's code): the ``top`` images with the highest scores, of which those are then dropped where the
            part is not visible; the ``nodes`` nodes with the highest mean score over their ``top`` images, per layer: give
            each layer as a detector of its own.
        top: images per node (default: 100 for "visible", 20 for "release").
        nodes: nodes in the mean (default: all for "visible", 167 for "release").

    Only images where the node's score is above 0 are selected; of equal scores, the image (or node) that comes first.

    Raises:
        ArgumentError: unknown selection, numbers below 1, or another number of images.
    """
    top, nodes = settings(detector, landmarks, selection, top, nodes)
    count, width, parts = len(landmarks), detector.scores.shape[1], len(landmarks.names)
    top = min(top, count)
    images = torch.full((width, parts, top), -1, dtype=torch.int32)
    distances = torch.full((width, parts, top), torch.nan)
    deviation = torch.full((width, parts), torch.nan)
    for part in ranked(detector, landmarks, selection, ranks=top):
        kept, order = part.usable.sort(dim=1, descending=True, stable=True)  # those that count first, still by rank
        place = (part.rows, part.part, slice(order.shape[1]))
        images[place] = part.images.gather(1, order).int().masked_fill(~kept, -1)
        distances[place] = part.distances.gather(1, order).float().masked_fill(~kept, torch.nan)
        deviation[part.rows, part.part] = part.deviation(part.usable[None].double())[0].float()
    return Instability(detector.name, deviation, best_nodes(detector, top, nodes), images, distances)


def settings(
    detector: Detector, landmarks: Landmarks, selection: str, top: int | None, nodes: int | None
) -> tuple[int, int | None]:
    """The numbers of images and of nodes that count, checked; None: all nodes."""
    if selection not in TOP:
        raise ArgumentError(f"selection: got {selection!r}, wanted one of {', '.join(TOP)}")
    if len(detector.scores) != len(landmarks):
        raise ArgumentError(
            f"detector {detector.name!r} has {len(detector.scores)} images, but there are landmarks of {len(landmarks)}; "
            "infer on the images that the landmarks belong to"
        )
    top = TOP[selection] if top is None else top
    nodes = RELEASE_NODES if nodes is None and selection == "release" else nodes
    if top < 1 or (nodes is not None and nodes < 1):
        raise ArgumentError(f"top and nodes: got {top} and {nodes}, wanted at least 1")
    return top, nodes


def best_nodes(detector: Detector, top: int, nodes: int | None) -> Tensor:
    """The nodes [n] int64 with the highest mean score over their ``top`` best images (ascending), or all."""
    width = detector.scores.shape[1]
    if nodes is None or nodes >= width:
        return torch.arange(width)
    mean = detector.scores.topk(min(top, len(detector.scores)), 0).values.double().sum(0)
    return mean.sort(descending=True, stable=True).indices[:nodes].sort().values


class Ranked(NamedTuple):
    """The images that can be selected for one part, for some nodes, each node's by falling score.

    part: its number. rows: which nodes. images: [f, n] int64. distances: [f, n] float64, meaningless where not usable.
    usable: [f, n], which count once they are selected: the node is seen (where it is not comes last), the part is visible.
    """

    part: int
    rows: slice
    images: Tensor
    distances: Tensor
    usable: Tensor

    def weights(self, multiplicity: Tensor, top: int) -> Tensor:
        """How often each ranked image counts [R, f, n], if image i is there multiplicity[r, i] times and ``top`` are taken."""
        weight = multiplicity[:, self.images]
        before = weight.cumsum(2).sub_(weight)
        return torch.minimum(weight, before.neg_().add_(top).clamp_(min=0)).mul_(self.usable)

    def deviation(self, weights: Tensor) -> Tensor:
        """Weighted sample standard deviations [R, f] of the distances; NaN where fewer than two images count."""
        total = weights.sum(2)
        # around each node's mean over all its usable images: sums of squares then lose no digits
        usable = self.usable.double()
        centred = (
            self.distances - (self.distances * usable).sum(1, keepdim=True) / usable.sum(1, keepdim=True).clamp(min=1)
        ) * usable
        columns = torch.stack((centred, centred.square()), 2).to(weights.dtype)
        first, second = torch.einsum("rfn,fnc->crf", weights, columns)
        variance = (second - first.square() / total).clamp_(min=0) / (total - 1)
        return variance.sqrt_().masked_fill_(total < 2, torch.nan)


def ranked(detector: Detector, landmarks: Landmarks, selection: str, ranks: int | None = None) -> Iterator[Ranked]:
    """The images of each part in the order in which they are selected (the first ``ranks``), a block of nodes at a time."""
    visible = ~landmarks.points.isnan().any(2)
    width = detector.scores.shape[1]
    at_once = max(1, BLOCK // max(1, len(landmarks)))
    for start in range(0, width, at_once):
        rows = slice(start, min(start + at_once, width))
        nodes = torch.arange(rows.start, rows.stop).unsqueeze(1)
        for part in range(len(landmarks.names)):
            seen = visible[:, part]
            pool = seen.nonzero()[:, 0] if selection == "visible" else torch.arange(len(seen))
            ordered = detector.scores[pool, rows].T.sort(dim=1, descending=True, stable=True)
            images = pool[ordered.indices[:, :ranks]]
            offset = detector.positions[images, nodes].double() - landmarks.points[images, part].nan_to_num(0.0)
            distances = offset.square().sum(2).sqrt() / landmarks.diagonal
            yield Ranked(part, rows, images, distances, (ordered.values[:, :ranks] > 0) & seen[images])
