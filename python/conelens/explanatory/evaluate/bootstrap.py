"""Bootstrap intervals of location instability, paired between detectors, and of any mean over images.

Images are drawn with replacement from the whole image set and every node selects anew among them (an image drawn twice takes
two ranks), so that an interval also holds what the choice of the top images adds. Draws depend on the seed and the number of
images alone: two detectors resampled with one seed saw the same images, and the difference of their values is a paired one.
Intervals are percentiles; they are a little narrow where few images can be selected from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.detectors import Detector
from conelens.explanatory.evaluate.instability import BLOCK, best_nodes, instability, ranked, settings
from conelens.landmarks import Landmarks

OVER = ("images", "nodes", "both")


class Interval(NamedTuple):
    """An estimate and the bounds between which ``level`` of its resamples lie."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def draws(count: int, resamples: int, seed: int = 0) -> Tensor:
    """How often each of ``count`` items is drawn in each resample: [resamples, count] float32, rows sum to ``count``."""
    if count < 1 or resamples < 1:
        raise ArgumentError(f"count and resamples: got {count} and {resamples}, wanted at least 1")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count))


def interval(estimate: float, values: Tensor, level: float = 0.95) -> Interval:
    """The percentile interval of resampled values [R]; resamples without a value (NaN) are left out."""
    if not 0 < level < 1:
        raise ArgumentError(f"level: got {level}, wanted a share between 0 and 1, such as 0.95")
    values = values.double()
    values = values[~values.isnan()]
    if not len(values):
        return Interval(estimate, torch.nan, torch.nan)
    low, high = torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high)


def mean_over_images(values: Tensor, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """Interval of the mean of one value per image [N], NaN where there is none; for a paired difference give differences."""
    known = ~values.isnan()
    weights = draws(len(values), resamples, seed).double() * known
    means = (weights @ values.double().nan_to_num(0.0)) / weights.sum(1)
    return interval(float(values.double().nanmean()), means, level)


def resampled_instability(
    detector: Detector, landmarks: Landmarks, *, resamples: int = 1000, over: str = "images", seed: int = 0,
    selection: str = "visible", top: int | None = None, nodes: int | None = None,
) -> Tensor:  # fmt: skip
    """Mean location instability of each resample, [resamples] float64; settings as in `instability`.

    ``over``: what is drawn: "images", "nodes" (the images stay) or "both". Nodes are drawn among those that the mean is over;
        which
    these are ("release") stays as it is on all images.

    Time and memory: resamples x nodes x images additions per part, in blocks of 16 MiB.
    """
    if over not in OVER:
        raise ArgumentError(f"over: got {over!r}, wanted one of {', '.join(OVER)}")
    top, nodes = settings(detector, landmarks, selection, top, nodes)
    detector = detector.nodes(best_nodes(detector, top, nodes))
    width, count = detector.scores.shape[1], len(landmarks)
    # nodes from a stream of their own, so that the images of a seed are the same whatever is drawn beside them
    shares = torch.ones(resamples, width) if over == "images" else draws(width, resamples, seed + 1)
    images = torch.ones(1, count) if over == "nodes" else draws(count, resamples, seed)
    total = torch.zeros(resamples, dtype=torch.float64)
    weight = torch.zeros(resamples, dtype=torch.float64)
    at_once = max(1, BLOCK // (len(images) * count))
    for part in ranked(detector, landmarks, selection):
        for start in range(0, len(part.images), at_once):
            rows = slice(start, start + at_once)
            block = part._replace(images=part.images[rows], distances=part.distances[rows], usable=part.usable[rows])
            deviation = block.deviation(block.weights(images, top))
            share = shares[:, part.rows][:, rows] * ~deviation.isnan()
            total += (share * deviation.nan_to_num(0.0)).double().sum(1)
            weight += share.double().sum(1)
    return total / weight


def paired_difference(
    first: Detector, second: Detector, landmarks: Landmarks, *, resamples: int = 1000, over: str = "images", seed: int = 0,
    selection: str = "visible", top: int | None = None, nodes: int | None = None, level: float = 0.95,
) -> Interval:  # fmt: skip
    """Location instability of ``first`` minus that of ``second`` on the same resampled images; negative: ``first`` is more
    stable.

    Nodes, where they are drawn, are drawn the same way for detectors with as many nodes.
    """
    means = [instability(d, landmarks, selection=selection, top=top, nodes=nodes).mean for d in (first, second)]
    values = [
        resampled_instability(
            d, landmarks, resamples=resamples, over=over, seed=seed, selection=selection, top=top, nodes=nodes
        )
        for d in (first, second)
    ]  # fmt: skip
    return interval(means[0] - means[1], values[0] - values[1], level)
