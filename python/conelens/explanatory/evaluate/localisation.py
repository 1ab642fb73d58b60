"""Few-shot part localisation (experiment 3 of Zhang et al. 2018): three annotated images of a part, its centre in the others.

A method is anything that turns annotated images into positions (:class:`Method`); every method gets the same repeated draws of
annotated images, so that differences are paired. :class:`~conelens.explanatory.evaluate.vote.Vote` makes one of any
detector: graph nodes, patterns without a graph, raw filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.bootstrap import Interval, draws, interval
from conelens.landmarks import Landmarks


class Annotation(NamedTuple):
    """A part on its annotated images: ``images`` [T] int64; ``points`` [T,2] and ``boxes`` [T,4] (top, left, bottom, right) in
    pixels.
    """

    images: Tensor
    points: Tensor
    boxes: Tensor


class Method(Protocol):
    """What :func:`localise` compares."""

    @property
    def name(self) -> str: ...

    def locate(self, part: Annotation) -> Tensor:
        """Centre of the part in every image, [N,2] pixels."""


class Row(NamedTuple):
    """A method on a part ("mean": mean of the parts): normalised distance, and share of centres inside the part's box."""

    method: str
    part: str
    distance: Interval
    rate: Interval


@dataclass(frozen=True)
class Localisation:
    """Errors of M methods on P parts in R draws of annotated images and N images.

    ``distance`` [M,P,R,N] float64: distance to the nearest true centre / image diagonal; ``inside`` [M,P,R,N]: 1 where the
    predicted centre lies in a box of the part (NaN: no boxes). Both are NaN where an image was not tested: the part is absent,
    or the image is annotated in this draw. ``annotated`` [P,R,T] int64.
    """

    methods: tuple[str, ...]
    parts: tuple[str, ...]
    annotated: Tensor
    distance: Tensor
    inside: Tensor

    def table(self, *, samples: int = 2000, level: float = 0.95, seed: int = 0) -> list[Row]:
        """Each method on each part and their mean, with percentile bootstrap intervals over images and draws.

        A resample takes the images with replacement, the same ones for every part, and of each part the draws with replacement.
        """
        weights = self._resamples(samples, seed)
        return [
            Row(method, part, distance, rate)
            for m, method in enumerate(self.methods)
            for part, distance, rate in zip(
                (*self.parts, "mean"),
                _intervals(self.distance[m], *weights, level),
                _intervals(self.inside[m], *weights, level),
            )
        ]

    def against(self, method: str, *, samples: int = 2000, level: float = 0.95, seed: int = 0) -> list[Row]:
        """Paired differences: ``method`` minus each other one, on the same draws and images (distance < 0: it is nearer)."""
        if method not in self.methods:
            raise ArgumentError(f"method: got {method!r}, wanted one of {', '.join(self.methods)}")
        own = self.methods.index(method)
        paired = Localisation(
            tuple(other for other in self.methods if other != method),
            self.parts,
            self.annotated,
            torch.stack([self.distance[own] - d for m, d in enumerate(self.distance) if m != own]),
            torch.stack([self.inside[own] - d for m, d in enumerate(self.inside) if m != own]),
        )
        return paired.table(samples=samples, level=level, seed=seed)

    def _resamples(self, samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """How often a resample takes each draw [samples,P,R] and each image [samples,N]."""
        _, parts, count, images = self.distance.shape
        by_draw = draws(count, samples * parts, seed + 1).unflatten(0, (samples, parts))
        return by_draw.double(), draws(images, samples, seed).double()


def _intervals(values: Tensor, chosen: Tensor, images: Tensor, level: float) -> list[Interval]:
    """Interval of the mean of each part's values [P,R,N], NaN left out, and of the mean over parts."""
    tested = ~values.isnan()
    known = values.nan_to_num(0.0)

    def means(by_draw: Tensor, by_image: Tensor) -> Tensor:
        total, count = (torch.einsum("spr,prn,sn->sp", by_draw, v.double(), by_image) for v in (known, tested))
        parts = total / count  # 0 / 0 is NaN: a part that nothing tested, or a resample without any of its images
        return torch.cat((parts, parts.mean(1, keepdim=True)), 1)

    estimate = means(chosen.new_ones(1, *chosen.shape[1:]), images.new_ones(1, images.shape[1]))[0]
    return [interval(float(value), resampled, level) for value, resampled in zip(estimate, means(chosen, images).T)]


# ------------------------------------------------------------------------------------------------- the experiment
def localise(
    methods: Sequence[Method],
    points: Tensor,
    boxes: Tensor,
    parts: Sequence[str],
    size: tuple[int, int],
    *,
    shots: int = 3,
    repeats: int = 10,
    seed: int = 0,
    annotated: Tensor | None = None,
) -> Localisation:
    """Every method on every part, from the same ``shots`` annotated images, drawn ``repeats`` times.

    Tested are all other images that have the part. Of several instances in an annotated image the first is the annotation.
    :func:`instances` gives the points and boxes of a data set.

    Args:
        methods: their ``locate`` answers for the N images in the same order as ``points``.
        points: [N,P,2] or, with up to G instances, [N,P,G,2] centres (y, x) in pixels, NaN where absent.
        boxes: [N,P,4] or [N,P,G,4] top, left, bottom, right; all NaN where parts are points only.
        parts: P names.
        size: height and width of the images, pixels; its diagonal is the unit of distance.
        shots, repeats, seed: annotated images per part and draw, number of draws, seed of the choice.
        annotated: [P,R,T] int64, these images instead of drawn ones.

    Raises:
        ArgumentError: sizes differ, a part with fewer than ``shots`` + 1 images, an annotated image without the part, two
            methods of one name, a method that predicts NaN.
    """
    points, boxes = (t.double()[:, :, None] if t.ndim == 3 else t.double() for t in (points, boxes))
    _check(methods, points, boxes, parts, size)
    present = points.isfinite().all(-1)  # [N,P,G]
    if annotated is None:
        annotated = _draw(present.any(2), parts, shots, repeats, seed)
    _check_annotated(annotated, present.any(2), parts)
    shape = len(methods), len(parts), annotated.shape[1], len(points)
    distance, inside = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    diagonal = float(torch.tensor(size, dtype=torch.float64).norm())
    for p in range(len(parts)):
        for r, images in enumerate(annotated[p]):
            first = present[images, p].int().argmax(1)
            part = Annotation(images, points[images, p, first], boxes[images, p, first])
            tested = present[:, p].any(1)
            tested[images] = False
            truth, box = points[tested, p], boxes[tested, p]
            for m, method in enumerate(methods):
                predicted = method.locate(part)
                if predicted.shape != (len(points), 2) or not bool(predicted.isfinite().all()):
                    raise ArgumentError(
                        f"method {method.name!r}: got positions {tuple(predicted.shape)}, wanted [{len(points)}, 2] without NaN"
                    )
                found = predicted[tested].double()[:, None]
                away = (found - truth).norm(dim=2)
                distance[m, p, r, tested] = away.nan_to_num(torch.inf).amin(1) / diagonal
                within = ((found >= box[..., :2]) & (found <= box[..., 2:])).all(2).any(1)
                inside[m, p, r, tested] = torch.where(box.isfinite().all(2).any(1), within.double(), torch.nan)
    return Localisation(tuple(m.name for m in methods), tuple(parts), annotated, distance, inside)


def instances(landmarks: Landmarks) -> tuple[Tensor, Tensor]:
    """``points`` [N,P,G,2] and ``boxes`` [N,P,G,4] for :func:`localise`, with every instance of the parts that an image has."""
    most = max([1, *(len(boxes) for boxes in landmarks.several.values())])
    points, boxes = (t[:, :, None].repeat(1, 1, most, 1) for t in (landmarks.points, landmarks.boxes))
    points[:, :, 1:] = boxes[:, :, 1:] = torch.nan
    for (image, part), found in landmarks.several.items():
        boxes[image, part, : len(found)] = found
        points[image, part, : len(found)] = found.unflatten(1, (2, 2)).mean(1)
    return points, boxes


def _draw(present: Tensor, parts: Sequence[str], shots: int, repeats: int, seed: int) -> Tensor:
    """``repeats`` choices of ``shots`` different images that have the part: [P,R,T]."""
    if min(shots, repeats) < 1:
        raise ArgumentError(f"shots and repeats: got {shots} and {repeats}, wanted at least 1")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for p, part in enumerate(parts):
        images = present[:, p].nonzero()[:, 0]
        if len(images) <= shots:
            raise ArgumentError(
                f"part {part!r}: got {len(images)} images that have it, wanted {shots} to annotate and at least one to test; "
                "annotate more images or leave the part out"
            )
        chosen += [images[torch.randperm(len(images), generator=generator)[:shots]] for _ in range(repeats)]
    return torch.stack(chosen).unflatten(0, (len(parts), repeats))


def _check_annotated(annotated: Tensor, present: Tensor, parts: Sequence[str]) -> None:
    if annotated.ndim != 3 or len(annotated) != len(parts) or annotated.dtype != torch.int64 or not annotated.numel():
        raise ArgumentError(
            f"annotated: got {annotated.dtype} {tuple(annotated.shape)}, wanted int64 [{len(parts)}, draws, shots]"
        )
    for p, part in enumerate(parts):
        for images in annotated[p].tolist():
            wrong = [i for i in images if not 0 <= i < len(present) or not bool(present[i, p])]
            if wrong or len(set(images)) < len(images):
                raise ArgumentError(
                    f"annotated: got images {images} for part {part!r}, wanted different ones that have the part"
                    + (f"; it is absent from {wrong}" if wrong else "")
                )
        if int(present[:, p].sum()) <= annotated.shape[2]:
            raise ArgumentError(f"part {part!r}: every image that has it is annotated, wanted at least one to test")


def _check(methods: Sequence[Method], points: Tensor, boxes: Tensor, parts: Sequence[str], size: tuple[int, int]) -> None:
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"methods: got {', '.join(names) or 'none'}, wanted at least one, each with its own name")
    lead = points.shape[:-1]
    if points.ndim != 4 or lead[1] != len(parts) or points.shape[3] != 2 or boxes.shape != (*lead, 4):
        raise ArgumentError(
            f"points and boxes: got {tuple(points.shape)} and {tuple(boxes.shape)} for {len(parts)} parts, "
            "wanted [N,P,2] and [N,P,4] (or [N,P,G,2] and [N,P,G,4] for up to G instances)"
        )
    if min(size) <= 0:
        raise ArgumentError(f"size: got {size}, wanted (height, width) of the images in pixels")
