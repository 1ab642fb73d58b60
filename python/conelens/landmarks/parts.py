"""Images whose parts people have marked: the pictures as network input, their parts in pixels of it.

Coordinates are (y, x) in pixels of the network input, 0-based, pixel i's centre at coordinate i: what lies at the fraction f
of a frame's height H stands at y = f * H - 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conelens.data import Preprocess, load_image
from conelens.errors import ArgumentError, DataError

Box = tuple[float, float, float, float]  # top, left, bottom, right
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Mark(NamedTuple):
    """One part that was marked: centre, height and width as fractions of the object's crop; a mere point has no size (NaN)."""

    part: str
    y: float
    x: float
    height: float = float("nan")
    width: float = float("nan")


@dataclass(frozen=True)
class PartImage:
    """An object in an image file and the parts marked on it.

    Args:
        path: the image file.
        annotations: what was marked, in fractions of the object's crop.
        region: the object's crop (top, left, bottom, right) in edges of the file's pixels; None: the whole image.
        size: (height, width) that the annotation was made for; an image of another size is refused.
        masks: reads the visible pixels of each part, bool [height, width] of the whole image.
        view: what of the crop is shown, as fractions of it.
    """

    path: Path
    annotations: tuple[Mark, ...] = ()
    region: Box | None = None
    size: tuple[int, int] | None = None
    masks: Callable[[], Mapping[str, np.ndarray]] | None = None
    view: Box = WHOLE

    def shown(self, height: int, width: int) -> Box:
        """(top, left, bottom, right) of what is shown, in edges of the pixels of the file's height x width."""
        return _within(self.view, self.region or (0.0, 0.0, float(height), float(width)))

    def visible(self) -> list[Mark]:
        """Annotations in fractions of what is shown; those whose centre a narrower view leaves out are gone."""
        top, left, bottom, right = self.view
        height, width = bottom - top, right - left
        moved = [
            Mark(a.part, (a.y - top) / height, (a.x - left) / width, a.height / height, a.width / width)
            for a in self.annotations
        ]
        return [a for a in moved if self.view == WHOLE or (0 <= a.y <= 1 and 0 <= a.x <= 1)]


def _within(inner: Box, outer: Box) -> Box:
    """A box given as fractions of another, in the units of that one."""
    top, left, bottom, right = outer
    height, width = bottom - top, right - left
    return (top + inner[0] * height, left + inner[1] * width, top + inner[2] * height, left + inner[3] * width)


@dataclass(frozen=True)
class Landmarks:
    """Where the parts of N images are.

    Args:
        names: the P parts.
        points: [N, P, 2] float32, centres (y, x) in pixels; NaN where a part is not annotated or more than once.
        boxes: [N, P, 4] float32, (top, left, bottom, right) in pixels; NaN where there is none.
        size: (height, width) of the network input.
        several: (image, part) -> boxes [k, 4] of the parts that are annotated k > 1 times.

    One position per part and image is what a metric needs. As in the papers' code, location instability passes over images with
    several instances of the part, and localisation takes the nearest (:meth:`nearest`).
    """

    names: tuple[str, ...]
    points: Tensor
    boxes: Tensor
    size: tuple[int, int] = (224, 224)
    several: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = len(self.names)
        if self.points.ndim != 3 or self.points.shape[1:] != (parts, 2):
            raise ArgumentError(f"points: got shape {list(self.points.shape)}, wanted [images, {parts}, 2] for {self.names}")
        if self.boxes.shape != (len(self.points), parts, 4):
            raise ArgumentError(f"boxes: got shape {list(self.boxes.shape)}, wanted {[len(self.points), parts, 4]}")

    def __len__(self) -> int:
        return len(self.points)

    @property
    def diagonal(self) -> float:
        """Length of the network input's diagonal in pixels (316.78 at 224 x 224)."""
        return float(np.hypot(*self.size))

    def nearest(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Points [N, P, 2] and boxes [N, P, 4], of several instances the one nearest to ``predicted`` [N, P, 2]."""
        points, boxes = self.points.clone(), self.boxes.clone()
        for (image, part), candidates in self.several.items():
            centres = candidates.unflatten(1, (2, 2)).mean(1)
            best = (centres - predicted[image, part]).square().sum(1).argmin()
            points[image, part], boxes[image, part] = centres[best], candidates[best]
        return points, boxes

    def take(self, images: Sequence[int]) -> Landmarks:
        """The landmarks of some images, in the given order."""
        index = torch.as_tensor(images, dtype=torch.int64)
        several = {(n, p): b for n, i in enumerate(images) for (j, p), b in self.several.items() if i == j}
        return replace(self, points=self.points[index], boxes=self.boxes[index], several=several)


class PartSet:
    """Objects cut out of images and stretched to network input, with their :class:`Landmarks`; an ImageDataset.

    Args:
        images: one entry per object.
        names: the parts that are landmarks.
        preprocess: input recipe; its fit is replaced by "stretch", as the papers do.
    """

    def __init__(self, images: Iterable[PartImage], names: Sequence[str], preprocess: Preprocess) -> None:
        self.images = list(images)
        self.names = tuple(names)
        self.preprocess = replace(preprocess, fit="stretch")
        self.landmarks = self._landmarks()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """float32 [3, H, W]; DataError where the file does not decode."""
        return self.preprocess.tensor(self.frame(index))

    def frame(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]: the object as the network sees it, before normalisation."""
        item = self.images[index]
        image = load_image(item.path)
        if item.size is not None and (image.height, image.width) != item.size:
            raise DataError(
                f"{item.path}: the image is {image.height}x{image.width}, "
                f"but its parts were marked on {item.size[0]}x{item.size[1]} pixels; wanted the original file"
            )
        top, left, bottom, right = item.shown(image.height, image.width)
        height, width = self.preprocess.size
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))

    def label(self, index: int) -> str:
        """The file name, and the object's place where it is not the whole image."""
        item = self.images[index]
        if item.region is None:
            return item.path.name
        return f"{item.path.name} [{', '.join(f'{edge:.0f}' for edge in item.region)}]"

    def source(self, index: int) -> Path:
        """The file of an item."""
        return self.images[index].path

    def take(self, images: Sequence[int]) -> PartSet:
        """Some of the images, in the given order."""
        return PartSet((self.images[i] for i in images), self.names, self.preprocess)

    def regions(self, index: int, groups: Mapping[str, Sequence[str]] | None = None) -> Tensor:
        """Which pixels belong to which part: bool [G, H, W], from masks where the data set has them, else filled boxes.

        ``groups`` joins parts: name -> parts; default: each landmark by itself. A part that is not annotated has no pixels, one
        that is annotated several times has all of theirs. ArgumentError where parts are mere points.
        """
        item = self.images[index]
        joined = list((groups or {name: (name,) for name in self.names}).values())
        masks = self._masks(item) if item.masks is not None else None
        out = np.zeros((len(joined), *self.preprocess.size), bool)
        for region, parts in zip(out, joined, strict=True):
            if masks is not None:
                for part in parts:
                    region |= masks.get(part, False)
            else:
                for annotation in item.visible():
                    if annotation.part in parts:
                        self._fill(region, annotation, item)
        return torch.from_numpy(out)

    def _fill(self, region: np.ndarray, annotation: Mark, item: PartImage) -> None:
        if np.isnan(annotation.height):
            raise ArgumentError(f"{item.path}: the part {annotation.part!r} is a point; regions need boxes or masks")
        top, left, bottom, right = (
            round(fraction * side) for fraction, side in zip(_edges(annotation), self.preprocess.size * 2, strict=True)
        )
        region[max(top, 0) : bottom, max(left, 0) : right] = True

    def _masks(self, item: PartImage) -> dict[str, np.ndarray]:
        """Each part's mask at network size: every pixel takes the file's pixel under its centre."""
        assert item.masks is not None
        result = {}
        for part, mask in item.masks().items():
            top, left, bottom, right = item.shown(*mask.shape)
            height, width = self.preprocess.size
            ys = top + (np.arange(height) + 0.5) * (bottom - top) / height
            xs = left + (np.arange(width) + 0.5) * (right - left) / width
            result[part] = mask[np.ix_(ys.astype(int), xs.astype(int))]
        return result

    def _landmarks(self) -> Landmarks:
        count, parts = len(self.images), len(self.names)
        points = torch.full((count, parts, 2), torch.nan)
        boxes = torch.full((count, parts, 4), torch.nan)
        several = {}
        scale = torch.tensor(self.preprocess.size * 2, dtype=torch.float64)
        for i, item in enumerate(self.images):
            visible = item.visible()
            for p, name in enumerate(self.names):
                found = [a for a in visible if a.part == name]
                edges = torch.tensor([_edges(a) for a in found], dtype=torch.float64).view(-1, 4) * scale - 0.5
                if len(found) == 1:
                    centre = torch.tensor(found[0][1:3], dtype=torch.float64) * scale[:2] - 0.5
                    points[i, p], boxes[i, p] = centre.float(), edges[0].float()
                elif found:
                    several[i, p] = edges.float()
        return Landmarks(self.names, points, boxes, self.preprocess.size, several)


def _edges(annotation: Mark) -> Box:
    _, y, x, height, width = annotation
    return (y - height / 2, x - width / 2, y + height / 2, x + width / 2)


def jittered(part_set: PartSet, seed: int = 0, smallest: float = 0.8) -> PartSet:
    """Every object seen through a random part of its crop: a fair test, since a fixed position no longer matches a part.

    The view keeps the crop's aspect, its side is uniform in [smallest, 1] of the crop, its place is uniform. Landmarks move
    along; those that the view leaves out are NaN. The view of image i depends on (seed, i) alone.
    """
    if not 0 < smallest <= 1:
        raise ArgumentError(f"smallest: got {smallest}, wanted a fraction of the crop in (0, 1]")
    return PartSet(
        (replace(item, view=_random_view(item.view, seed, i, smallest)) for i, item in enumerate(part_set.images)),
        part_set.names,
        part_set.preprocess,
    )


def _random_view(view: Box, seed: int, index: int, smallest: float) -> Box:
    side, y, x = np.random.default_rng((seed, index)).random(3).tolist()
    side = smallest + (1 - smallest) * side
    top, left = (1 - side) * y, (1 - side) * x
    return _within((top, left, top + side, left + side), view)
