"""Correspondence analysis (Zeiler & Fergus 2014, §4.3): does covering a part change the features of many images alike?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conelens.changed import changed_spans
from conelens.errors import ArgumentError, LayerError
from conelens.execution import exact_dtype, forward_whole
from conelens.network import Network, trace
from conelens.occlusion.windows import fill_images, inside_boxes

SIGNS = ("three", "two")
PLACEMENTS = ("independent", "together")
BATCH = 32  # images in one forward pass


class Spread(NamedTuple):
    """A mean and the sample standard deviation around it (NaN of a single value)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        return cls(float(values.mean()), float(values.std()) if len(values) > 1 else math.nan)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class Correspondence:
    """Hamming distances between the sign changes of images; :func:`correspondence` states the conventions. Prints as a table.

    Attributes:
        layers: as asked for; ``lengths`` {layer: L}, entries of its feature vector.
        distances: {part: {layer: [1 + draws, N, N] int64}}, H: entries in which the signs of two images differ. First with the
            part covered, then with random boxes of its sizes.
        unions: as many, entries that changed in either image. On the diagonal: in that image.
    """

    layers: tuple[str, ...]
    lengths: dict[str, int]
    distances: dict[str, dict[str, Tensor]]
    unions: dict[str, dict[str, Tensor]]

    def delta(self, part: str, layer: str) -> Spread:
        """Δ, the mean over ordered pairs i ≠ j of H / L. The deviation: over N images, each with its mean over the others."""
        return Spread.of(_per_image(self._of(part, layer)[0][0] / self.lengths[layer]))

    def random_delta(self, part: str, layer: str) -> Spread:
        """Δ with random boxes of the part's sizes, the mean over the draws. The deviation is over the draws."""
        return Spread.of(_per_image(self._of(part, layer)[0][1:] / self.lengths[layer]).mean(1))

    def unlike(self, part: str, layer: str) -> Spread:
        """The mean of H over the entries that changed in either image, 0 to 1: Δ without the share that changes at all."""
        distances, unions = self._of(part, layer)
        return Spread.of(_per_image(distances[0] / unions[0].clamp_min(1)))

    def random_unlike(self, part: str, layer: str) -> Spread:
        """:meth:`unlike` with random boxes of the part's sizes; the deviation is over the draws."""
        distances, unions = self._of(part, layer)
        return Spread.of(_per_image(distances[1:] / unions[1:].clamp_min(1)).mean(1))

    def changed(self, part: str, layer: str) -> tuple[float, float]:
        """Share of a layer's entries that covering the part changed, and covering random boxes of its sizes did."""
        shares = self._of(part, layer)[1].diagonal(dim1=1, dim2=2).double().mean(1) / self.lengths[layer]
        return float(shares[0]), float(shares[1:].mean())

    def total(self, part: str, layer: str) -> int:
        """The formula as printed in the paper: the sum of H over ordered pairs, divided by nothing."""
        return int(self._of(part, layer)[0][0].sum())

    def _of(self, part: str, layer: str) -> tuple[Tensor, Tensor]:
        if part not in self.distances:
            raise ArgumentError(f"part: got {part!r}, wanted one of {', '.join(self.distances)}")
        if layer not in self.layers:
            raise LayerError(f"layer: got {layer!r}, which was not asked for (there are {', '.join(self.layers)})")
        return self.distances[part][layer], self.unions[part][layer]

    def __str__(self) -> str:
        rows = [["covered", *(cell for layer in self.layers for cell in (layer, "unlike", "changed"))]]
        for part, layers in self.distances.items():
            kinds = [(part, self.delta, self.unlike), (f"random, sizes of {part}", self.random_delta, self.random_unlike)]
            for which, (name, delta, unlike) in enumerate(kinds[: len(layers[self.layers[0]])]):
                rows.append([name])
                for layer in self.layers:
                    rows[-1] += [str(delta(part, layer)), str(unlike(part, layer)), f"{self.changed(part, layer)[which]:.1%}"]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    __repr__ = __str__


def correspondence(
    net: Network | nn.Module,
    images: Tensor,
    boxes: Mapping[str, Any],
    layers: str | Sequence[str],
    *,
    fill: Any = 0.0,
    random: int = 10,
    placement: str = "independent",
    seed: int = 0,
    sign: str = "three",
    raw: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Correspondence:
    """Cover the same part in each image and ask whether a layer's features change in the same directions.

    With x_i the feature vector of image i at a layer and x̃_i that of the image with the part covered, ε_i = x_i - x̃_i and

        Δ = mean over ordered pairs i ≠ j of H(sign ε_i, sign ε_j) / L

    for the Hamming distance H and vectors of length L. The lower, the more the network treats the part as one thing. The paper
    prints a plain sum, but its numbers are far below 1, so that they must have been divided; ``total`` is the sum.

    What the paper leaves open, and what is done here: sign(0) = 0, so that an entry that changes in one image alone counts as
    different ("three"; ``sign="two"`` compares ε > 0 instead). An entry that no path leads to from the box is exactly zero:
    clean and covered images run in batches of one shape, and outside the layer's changed region nothing is left to rounding.

    Most entries change in neither image, so Δ grows with the share that changes: a box near the border changes less than one in
    the middle. Read beside it the columns "changed" and "unlike" (H over the entries that changed in either image). And boxes
    at one place in all images change the same cells, whatever they cover. Where parts are nearly aligned, as in portraits, only
    ``placement="together"`` is a fair comparison: the boxes of a draw lie to each other as the part's do.

    Args:
        net: from :func:`conelens.trace`, or a module in evaluation mode.
        images: [N, C, H, W], N ≥ 2, in the network's input space.
        boxes: {part: [N, 4]}, whole pixels (top, left, bottom, right) of that part in each image, bottom and right exclusive.
        layers: names of one or more layers.
        fill: what a covered part shows, as in :func:`conelens.occlude` ("blur": by half the largest box of the part).
        random: how many times boxes of each part's sizes are placed at random, uniformly.
        placement: of those boxes: "independent" in each image, or "together": the part's boxes all moved by one offset.
        seed: of those places; the same seed, the same result.
        sign: "three" or "two".
        raw: compare the layers' raw outputs instead of their activity max(0, x).
        progress: called with (coverings done, in all).

    Raises:
        ArgumentError, LayerError: boxes outside the images, fewer than two images, unknown layers.
    """
    if sign not in SIGNS:
        raise ArgumentError(f"sign: got {sign!r}, wanted 'three' (-1, 0, 1) or 'two' (> 0 or not)")
    if placement not in PLACEMENTS:
        raise ArgumentError(f"placement: got {placement!r}, wanted one of {', '.join(PLACEMENTS)}")
    if not isinstance(random, int) or isinstance(random, bool) or random < 0:
        raise ArgumentError(f"random: got {random!r}, wanted how many times to place random boxes, 0 or more")
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ArgumentError(f"images: got {getattr(images, 'shape', type(images).__name__)}, wanted a tensor [N, C, H, W]")
    if len(images) < 2:
        raise ArgumentError(f"images: got {len(images)}, wanted at least 2 to compare")
    if not bool(torch.isfinite(images).all()):
        raise ArgumentError("images: hold NaN or infinity; clean the data first")
    if not isinstance(net, Network):
        net = trace(net, images[:1], policy="gradient")
    net.check_images(images)
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    nodes = [net.node(name).index for name in names]
    if not isinstance(boxes, Mapping):
        raise ArgumentError(f"boxes: got {type(boxes).__name__}, wanted the boxes of each part by its name: {{'eyes': [N, 4]}}")
    parts = {part: _boxes(part, value, images) for part, value in boxes.items()}
    if not parts or not names:
        raise ArgumentError(f"{'layers' if parts else 'boxes'}: got none, wanted at least one")
    generator = np.random.default_rng(seed)
    changes = _Changes(net, images, nodes, raw)
    distances: dict[str, dict[str, Tensor]] = {}
    unions: dict[str, dict[str, Tensor]] = {}
    with torch.inference_mode():
        for number, (part, places) in enumerate(parts.items()):
            height, width = (places[:, 2:] - places[:, :2]).max(0).tolist()
            filled = fill_images(fill, images, (height, width))
            found: list[list[tuple[Tensor, Tensor]]] = []
            for where in (places, *(_anywhere(places, images, placement, generator) for _ in range(random))):
                found.append([_compare(signs, sign) for signs in changes(filled, where)])
                if progress is not None:
                    progress(number * (1 + random) + len(found), len(parts) * (1 + random))
            distances[part] = {name: torch.stack([one[i][0] for one in found]) for i, name in enumerate(names)}
            unions[part] = {name: torch.stack([one[i][1] for one in found]) for i, name in enumerate(names)}
    lengths = {name: math.prod(net.graph[node].shape) for name, node in zip(names, nodes)}
    return Correspondence(names, lengths, distances, unions)


class _Changes:
    """The signs of the changes that boxes bring to some layers. The clean images run once."""

    def __init__(self, net: Network, images: Tensor, nodes: list[int], raw: bool) -> None:
        self.graph, self.images, self.nodes, self.raw = net.graph, images, nodes, raw
        self.order = net.graph.ancestors(tuple(nodes))
        self.batches = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]
        with torch.inference_mode():
            self.clean = [self._forward(images[rows]) for rows in self.batches]

    def __call__(self, filled: Tensor, places: np.ndarray) -> list[Tensor]:
        """int8 [N, L] per layer, for one box of ``places`` [N, 4] in each image."""
        here = inside_boxes(places, self.images.shape[2:], self.images.device)
        covered = torch.where(here, filled, self.images)
        signs: list[list[Tensor]] = [[] for _ in self.nodes]
        for rows, before in zip(self.batches, self.clean):
            for kept, x, y in zip(signs, before, self._forward(covered[rows])):  # batches of one shape: equal cells, equal bits
                kept.append((x > y).to(torch.int8) - (x < y).to(torch.int8))
        return [(torch.cat(s) * region).flatten(1) for s, region in zip(signs, self._regions(places))]

    def _forward(self, images: Tensor) -> list[Tensor]:
        with exact_dtype(images.device):
            maps = forward_whole(self.graph, images, tuple(sorted(set(self.nodes))))
        return [maps[node] if self.raw else maps[node].clamp_min(0) for node in self.nodes]

    def _regions(self, places: np.ndarray) -> list[Tensor]:
        """Bool [N, 1, h, w] per layer: the cells that the boxes can change. Some GPU kernels mix in neighbours, and round."""
        y, x = (changed_spans(self.graph, self.order, a, places[:, a], places[:, 2 + a]).spans for a in (0, 1))
        boxes = [np.stack([y[node][0], x[node][0], y[node][1], x[node][1]], 1) for node in self.nodes]
        return [inside_boxes(box, self.graph[node].size, self.images.device) for node, box in zip(self.nodes, boxes)]


def _compare(signs: Tensor, sign: str) -> tuple[Tensor, Tensor]:
    """Entries [N, N] whose signs differ, and entries that changed in either image, from signs [N, L]."""
    changed = signs != 0
    compared = signs > 0 if sign == "two" else signs
    distances = torch.stack([(compared != one).sum(1) for one in compared])
    return distances.cpu(), torch.stack([(changed | one).sum(1) for one in changed]).cpu()


def _per_image(values: Tensor) -> Tensor:
    """Each image's mean over the others, [..., N], from values of pairs [..., N, N] with zeros on the diagonal."""
    return values.double().sum(-1) / (values.shape[-1] - 1)


def _boxes(part: str, value: Any, images: Tensor) -> np.ndarray:
    given = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    height, width = images.shape[2:]
    if given.shape != (len(images), 4):
        raise ArgumentError(f"boxes: {part!r} has shape {given.shape}, wanted ({len(images)}, 4): a box for each image")
    boxes = given.astype(np.int64)
    if not np.array_equal(boxes, given):
        raise ArgumentError(f"boxes: {part!r} has fractions of pixels, wanted whole numbers (top, left, bottom, right)")
    for number, (top, left, bottom, right) in enumerate(boxes.tolist()):
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ArgumentError(
                f"boxes: {part!r} of image {number} is {(top, left, bottom, right)}, wanted top < bottom and left < right "
                f"inside {height}x{width}"
            )
    return boxes


def _anywhere(places: np.ndarray, images: Tensor, placement: str, generator: np.random.Generator) -> np.ndarray:
    """Boxes of the sizes of ``places`` [N, 4], at random inside the images."""
    limit = np.array(images.shape[2:])
    if placement == "together":
        move = generator.integers(-places[:, :2].min(0), limit - places[:, 2:].max(0) + 1)
        return places + np.concatenate([move, move])
    size = places[:, 2:] - places[:, :2]
    corner = generator.integers(0, limit - size + 1)
    return np.concatenate([corner, corner + size], 1)
