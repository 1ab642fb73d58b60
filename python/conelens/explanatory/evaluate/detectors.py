"""What the metrics compare: detectors, which put each of their nodes (or filters) somewhere in every image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from conelens.explanatory.features import Grid

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Detector:
    """Where each of F nodes stands in each of N images, and how strongly it is seen there.

    Args:
        name: for tables.
        positions: [N, F, 2] float32, (y, x) in pixels of the network input.
        scores: [N, F] float32, at least 0; 0: the node is not seen in the image.

    Raises:
        ArgumentError: shapes that do not fit, a NaN, or a negative score.
    """

    name: str
    positions: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.positions.shape != (*self.scores.shape, 2):
            raise ArgumentError(
                f"detector {self.name!r}: got positions {list(self.positions.shape)} and scores {list(self.scores.shape)}, "
                "wanted [N, F, 2] and [N, F]"
            )
        if not bool(torch.isfinite(self.positions).all()):
            raise ArgumentError(f"detector {self.name!r}: got positions that are NaN or infinite; a score of 0 says not seen")
        if not bool((torch.isfinite(self.scores) & (self.scores >= 0)).all()):
            raise ArgumentError(f"detector {self.name!r}: got scores that are NaN, infinite or negative; 0 says not seen")

    def nodes(self, index: Tensor) -> Detector:
        """Some of the nodes, in the given order."""
        return Detector(self.name, self.positions[:, index], self.scores[:, index])

    def images(self, index: Tensor) -> Detector:
        """On some of the images, in the given order."""
        return Detector(self.name, self.positions[index], self.scores[index])


def raw_filters(features: Tensor, grid: Grid, name: str = "raw filters") -> Detector:
    """Each filter at its strongest unit (the first of equals, in rows), scored by that unit's activity.

    Args:
        features: [N, D, H, W], any float type, may be memory-mapped; negative activity counts as none.
        grid: where the layer's units stand.
    """
    if features.ndim != 4 or tuple(features.shape[2:]) != grid.size:
        raise ArgumentError(
            f"features: got shape {list(features.shape)}, wanted [N, D, {grid.size[0]}, {grid.size[1]}] (the grid's)"
        )
    at_once = max(1, _BLOCK_BYTES // max(1, 4 * features[:1].numel()))
    peaks = [ops.channel_peaks(block) for block in features.split(at_once)]
    scores = torch.cat([p.values for p in peaks]).float().clamp(min=0)
    return Detector(name, grid.pixels(torch.cat([p.positions for p in peaks]).long()), scores)


def constant_position(detector: Detector, position: tuple[float, float] | None = None) -> Detector:
    """A control that looks at no image: the detector's scores, so that the same images count, but every node stands still.

    ``position``: (y, x) in pixels; default: each node's own mean position over the images where it is seen.
    """
    if position is None:
        seen = (detector.scores > 0).unsqueeze(-1)
        total = (detector.positions.double() * seen).sum(0, keepdim=True)
        still = (total / seen.sum(0, keepdim=True).clamp(min=1)).float()
    else:
        still = torch.tensor(position, dtype=torch.float32)
    return Detector(f"{detector.name}, constant position", still.expand_as(detector.positions), detector.scores)


def without_evidence(detector: Detector, seed: int = 0) -> Detector:
    """A control that keeps the prior and takes the evidence away: in each image the nodes stand where another image put them.

    Scores stay, so that the same images count; positions are those of a random derangement of the images (a single cycle,
    Sattolo's shuffle): what is left of a detector's stability is what it knows without looking.
    """
    count = len(detector.scores)
    if count < 2:
        raise ArgumentError(f"detector {detector.name!r}: got {count} images, wanted at least 2 to exchange positions between")
    return Detector(f"{detector.name}, another image's evidence", detector.positions[derangement(count, seed)], detector.scores)


def derangement(count: int, seed: int = 0) -> Tensor:
    """A random permutation [count] int64 in which no element stays in its place, one cycle through all of them."""
    generator = torch.Generator().manual_seed(seed)
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (), generator=generator))
        order[last], order[other] = order[other], order[last]
    return torch.tensor(order)
