"""Part localisation without patterns: what three annotations give from fixed positions, whole-image and single-unit features.

Each class is a :class:`~conelens.explanatory.evaluate.localisation.Method`. ``features`` [N,D,H,W] (not negative, any float
type, may be memory-mapped) and ``grid`` are those of one layer; they are read in blocks. Raw filters and patterns without a
graph are detectors: give them to :class:`~conelens.explanatory.evaluate.vote.Vote`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.localisation import Annotation
from conelens.explanatory.evaluate.units import check_features, unit_blocks

if TYPE_CHECKING:
    from conelens.explanatory.features import Grid


class ImageCentre:
    """The middle of every image: what no annotation gives."""

    name = "image centre"

    def __init__(self, images: int, size: tuple[int, int]) -> None:
        self.images, self.size = images, size

    def locate(self, part: Annotation) -> Tensor:
        middle = (torch.tensor(self.size, dtype=torch.float32) - 1) / 2
        return middle.expand(self.images, 2)


class MeanPosition:
    """The mean of the annotated centres, in every image."""

    name = "mean annotated position"

    def __init__(self, images: int) -> None:
        self.images = images

    def locate(self, part: Annotation) -> Tensor:
        return part.points.float().mean(0).expand(self.images, 2)


class NearestNeighbour:
    """The annotated centre of the most similar annotated image.

    Similarity is the cosine of the images' features: of the whole maps (``pooled=False``: the same things at the same places),
    or of their means over the cells (``pooled=True``: the same things anywhere).
    """

    def __init__(self, features: Tensor, pooled: bool = False) -> None:
        check_features(features)
        self.name = f"nearest neighbour ({'pooled' if pooled else 'whole map'})"
        self.features = _pooled(features)[..., None, None] if pooled else features

    def locate(self, part: Annotation) -> Tensor:
        # lengths of the others do not change which annotated image is nearest
        annotated = normalize(_of(self.features, part.images).flatten(1), dim=1)
        nearest = [(block.flatten(1) @ annotated.T).argmax(1) for block in unit_blocks(self.features)]
        return part.points.float()[torch.cat(nearest)]


class GlobalRidge:
    """Ridge regression of the centre on the image's mean feature vector, brought to length 1.

    Closed form in the dual, with as many unknowns as annotated images: on centred features and points,
    y = k(x) (K + penalty mean(diag K) I)^-1 Y. Answers beyond the image are brought to its border.
    """

    name = "global feature + ridge"

    def __init__(self, features: Tensor, size: tuple[int, int], penalty: float = 0.1) -> None:
        _check_penalty(penalty)
        self.pooled = normalize(_pooled(features), dim=1).double()
        self.size, self.penalty = size, penalty

    def locate(self, part: Annotation) -> Tensor:
        annotated, points = self.pooled[part.images], part.points.double()
        centre, middle = annotated.mean(0), points.mean(0)
        kernel = (annotated - centre) @ (annotated - centre).T
        answer = torch.linalg.solve(_ridged(kernel, self.penalty), points - middle)
        found = (self.pooled - centre) @ (annotated - centre).T @ answer + middle
        return found.clamp_min(0).minimum(torch.tensor(self.size, dtype=torch.float64) - 1).float()


class LinearProbe:
    """A linear part detector on single units: ridge on part (1) against not part (-1), then the unit that answers most.

    Examples are all units of the annotated images, their feature vectors brought to length 1; a unit is of the part when its
    centre lies in the annotated box (where no centre does, the unit nearest to the part's centre). Both classes weigh the same.
    Boxes that cover every unit leave nothing to tell apart: then the mean annotated centre.
    Closed form with an intercept; the penalty is relative to the mean eigenvalue of the weighted covariance.
    """

    name = "linear probe"

    def __init__(self, features: Tensor, grid: Grid, penalty: float = 1.0) -> None:
        _check_penalty(penalty)
        self.features, self.grid, self.penalty = features, grid, penalty
        self.places = _places(features, grid)

    def locate(self, part: Annotation) -> Tensor:
        if not bool(part.boxes.isfinite().all()):
            raise ArgumentError(
                "linear probe: got a part without boxes, wanted one with the extent of the part; leave the method out"
            )
        direction = self._fit(part)
        if direction is None:
            return part.points.float().mean(0).expand(len(self.features), 2)
        # the intercept is the same for all units
        return self.places[_strongest(self.features, direction[None])[0]]

    def _fit(self, part: Annotation) -> Tensor | None:
        units = normalize(_of(self.features, part.images), dim=1).transpose(1, 2).double()  # [T,cells,D]
        boxes = part.boxes[:, None]
        of_part = ((self.places >= boxes[..., :2]) & (self.places <= boxes[..., 2:])).all(2)
        nearest = self.grid.cells(part.points)
        missed = ~of_part.any(1)
        of_part[missed, nearest[missed]] = True
        of_part = of_part.flatten()
        if bool(of_part.all()):
            return None
        examples, label = units.flatten(0, 1), torch.where(of_part, 1.0, -1.0).double()
        weight = torch.where(of_part, 0.5 / of_part.sum(), 0.5 / (~of_part).sum()).double()
        centred = examples - weight @ examples
        covariance = centred.T @ (weight[:, None] * centred)
        return torch.linalg.solve(_ridged(covariance, self.penalty), centred.T @ (weight * label)).float()


class LocalTemplate:
    """The unit whose feature vector is most similar (cosine) to that of the unit nearest to an annotated centre.

    All annotated images compete. The prediction carries the offset from the annotated unit's centre to the annotated point.
    """

    name = "local feature template"

    def __init__(self, features: Tensor, grid: Grid) -> None:
        self.features, self.grid = features, grid
        self.places = _places(features, grid)

    def locate(self, part: Annotation) -> Tensor:
        cells = self.grid.cells(part.points)
        annotated = _of(self.features, part.images)
        templates = normalize(annotated[torch.arange(len(cells)), :, cells], dim=1)  # [T,D]
        offsets = part.points.float() - self.places[cells]
        cell, template = _strongest(self.features, templates)
        return self.places[cell] + offsets[template]


def _strongest(features: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Per image the unit [N] and the direction [N] (of [T,D]) with the largest product, unit vectors brought to length 1."""
    best = [
        ((directions @ block) / block.norm(dim=1, keepdim=True).clamp_min(1e-12)).flatten(1).argmax(1)
        for block in unit_blocks(features)
    ]
    cells = features.shape[2] * features.shape[3]
    return torch.cat(best) % cells, torch.cat(best) // cells


def _places(features: Tensor, grid: Grid) -> Tensor:
    check_features(features)
    if grid.size != tuple(features.shape[2:]):
        raise ArgumentError(f"grid: got one of {grid.size} cells, wanted {tuple(features.shape[2:])}, the layer's")
    return grid.pixels(torch.arange(features.shape[2] * features.shape[3]))


def _pooled(features: Tensor) -> Tensor:
    """Mean feature vector of each image [N,D]."""
    return torch.cat([block.mean(2) for block in unit_blocks(features)])


def _ridged(matrix: Tensor, penalty: float) -> Tensor:
    """A symmetric matrix with ``penalty`` times the mean of its diagonal added to it (and a hair, should it be zero)."""
    return matrix + (penalty * matrix.diagonal().mean() + 1e-12) * torch.eye(len(matrix), dtype=matrix.dtype)


def _check_penalty(penalty: float) -> None:
    if not penalty > 0:
        raise ArgumentError(f"penalty: got {penalty}, wanted a positive number")


def _of(features: Tensor, images: Tensor) -> Tensor:
    """Feature vectors [T,D,cells] of the annotated images."""
    return torch.cat(list(unit_blocks(features, images)))
