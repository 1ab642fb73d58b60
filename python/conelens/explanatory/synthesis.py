"""Pattern-based synthesis: what a picture painted from the best part patterns alone still shows.

Zhang et al. 2018 (figure of image synthesis): keep the tenth of a layer's nodes with the highest scores, zero every unit that
is not where one of them was found, and invert the map. They report that the background goes and the object stays. Beside it
stand two controls: as many active units drawn at random, and as many of the most active ones, for which no graph is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from conelens.errors import ArgumentError
from conelens.explanatory.decoder import Decoder
from conelens.explanatory.features import Features, Grid
from conelens.explanatory.layer import Placement
from conelens.explanatory.pictures import Photographs, placement_of
from conelens.figures import grid as grid_of_tiles

KINDS = ("whole", "kept", "random", "strongest")


@dataclass(frozen=True, eq=False)
class Synthesis:
    """Pictures [N, 3, h, w] float32 in 0..1 that a decoder painted of the same images.

    Attributes:
        images: [N] indices among the images that were placed.
        painted: by kind: from "whole" maps, from the units of "kept" nodes alone, from as many "random" active units, and from
            as many of the "strongest" units.
        blank: [3, h, w], from no unit at all: what vanished looks like.
        units: [N] units kept; ``active`` [N] units that were not zero.
        keep: share of the layer's nodes; ``image_size`` (height, width) of the network's input.
        where: [N, h, w] float32 in 0..1, activity of the kept units over all filters, as a share of the image's most.
    """

    images: list[int]
    painted: dict[str, Tensor]
    blank: Tensor
    units: Tensor
    active: Tensor
    keep: float
    image_size: tuple[int, int]
    where: Tensor


def kept_units(placement: Placement, grid: Grid, keep: float = 0.10) -> Tensor:
    """The units [N, D, H, W] bool at which the highest-scored share ``keep`` of all D * K nodes was found, in each image.

    Nodes with score 0 were not found and have no unit; of equal scores the first count; two nodes may share a unit.
    """
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ArgumentError(f"keep: got {keep!r}, wanted a share of the nodes, more than 0, at most 1")
    images, filters, nodes = placement.scores.shape
    if filters * nodes == 0:
        raise ArgumentError(f"placement: got {filters} filters of {nodes} nodes, wanted at least one node")
    if placement.positions.shape != (images, filters, nodes, 2):
        raise ArgumentError(f"placement: got positions {list(placement.positions.shape)}, wanted {[images, filters, nodes, 2]}")
    if not bool((placement.scores >= 0).all()) or not bool(placement.positions.isfinite().all()):
        raise ArgumentError("placement: got NaN, or scores below 0; infer the graph again")
    scores = placement.scores.flatten(1)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, : math.ceil(keep * filters * nodes)]
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True) & (scores > 0)
    image, node = taken.nonzero(as_tuple=True)
    cells = grid.cells(placement.positions).flatten(1)[image, node]
    units = torch.zeros(images, filters, grid.size[0] * grid.size[1], dtype=torch.bool)
    units[image, node // nodes, cells] = True
    return units.unflatten(2, grid.size)


def highest_units(values: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` [N] highest positive units of ``values`` [N, D, H, W], or as many as there are: bool of that shape."""
    flat = values.flatten(1)
    order = flat.sort(dim=1, descending=True, stable=True).indices
    among = torch.arange(flat.shape[1]) < counts[:, None]
    return (torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, among) & (flat > 0)).view(values.shape)


def synthesise(
    features: Features,
    placements: Mapping[str, Placement],
    decoder: Decoder,
    *,
    keep: float = 0.10,
    images: Sequence[int] | None = None,
    seed: int = 0,
) -> Synthesis:
    """Paint images from the units of the highest-scored nodes of ``decoder.layer``, and from the controls.

    Args:
        features: the normalised maps; ``placements`` of the same images, from ``graph.infer``.
        decoder: of the layer, trained on features of the same scale.
        keep: share of the layer's nodes, in each image; in (0, 1].
        images: indices; None: all.
        seed: of the random units.

    Raises:
        ArgumentError: shapes that do not fit each other, ``keep`` or ``images`` out of range, NaN. LayerError: another layer.
    """
    maps, placement = features[decoder.layer], placement_of(placements, decoder.layer)
    if placement.scores.shape[:2] != maps.shape[:2]:
        raise ArgumentError(
            f"placements: got {list(placement.scores.shape[:2])} images and filters of {decoder.layer}, wanted "
            f"{list(maps.shape[:2])} as in the features; infer the same images"
        )
    chosen = list(range(len(maps))) if images is None else [int(index) for index in images]
    if not chosen or not all(0 <= index < len(maps) for index in chosen):
        raise ArgumentError(f"images: got {chosen}, wanted at least one index in 0..{len(maps) - 1}")
    painted: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    units, active, where = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(chosen), 32):
        part = torch.tensor(chosen[start : start + 32])
        values = maps[part].float()
        kept = kept_units(Placement(*(tensor[part].cpu() for tensor in placement)), features.grids[decoder.layer], keep)
        kept &= values > 0
        counts = kept.flatten(1).sum(1)
        noise = torch.rand(values.shape, generator=generator) + 1e-6  # zero would not count as active
        random = highest_units(noise * (values > 0), counts)
        sparse = {"kept": kept, "random": random, "strongest": highest_units(values, counts)}
        painted["whole"].append(decoder(values))
        for kind, mask in sparse.items():
            painted[kind].append(decoder(values * mask))
        units.append(counts)
        where.append((values * kept).sum(1))
        active.append((values > 0).flatten(1).sum(1))
    blank = decoder(torch.zeros(1, *decoder.shape))[0]
    pictures = {kind: torch.cat(parts) for kind, parts in painted.items()}
    size = (blank.shape[1], blank.shape[2])
    spread = interpolate(torch.cat(where)[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    share = spread / spread.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return Synthesis(chosen, pictures, blank, torch.cat(units), torch.cat(active), keep, features.image_size, share)


# ------------------------------------------------------------------------------------------------------------------- what stays
class Survival(NamedTuple):
    """How much of the picture painted from all units is left, on average over images: 1 all of it, 0 nothing (it is blank).

    ``inside`` the annotated boxes and ``outside`` of them; ``difference`` inside - outside, with its standard ``error`` over
    the ``images`` that have a box.
    """

    inside: float
    outside: float
    difference: float
    error: float
    images: int

    def __str__(self) -> str:
        return f"inside {self.inside:.2f}, outside {self.outside:.2f}, difference {self.difference:+.3f} ± {self.error:.3f}"


def survival(synthesis: Synthesis, boxes: Tensor) -> dict[str, Survival]:
    """Does the background go and the object stay? By kind "kept", "random", "strongest".

    What survives in a region is the slope of (painted - blank) against (whole - blank) over its pixels: contrast of the same
    sign counts for, of the opposite sign against. An image's region is the union of its boxes.

    Args:
        synthesis: of some images.
        boxes: [M, P, 4] of all images that were placed: (top, left, bottom, right) in pixels of the network's input, NaN where
            there is none. Annotated parts are less than the object, so that "outside" holds some of it too.
    """
    if boxes.ndim != 3 or boxes.shape[2] != 4 or len(boxes) <= max(synthesis.images):
        raise ArgumentError(
            f"boxes: got shape {list(boxes.shape)}, wanted [M, P, 4] with M of at least {max(synthesis.images) + 1} images"
        )
    region = _inside(boxes[synthesis.images], synthesis.image_size, (synthesis.blank.shape[1], synthesis.blank.shape[2]))
    usable = region.flatten(1).any(1) & ~region.flatten(1).all(1)
    if not bool(usable.any()):
        raise ArgumentError("boxes: no image has a box that leaves some of it outside; annotate at least one part")
    region = region[usable][:, None]
    whole = (synthesis.painted["whole"] - synthesis.blank)[usable].double()
    found = {}
    for kind in KINDS[1:]:
        left = (synthesis.painted[kind] - synthesis.blank)[usable].double()
        inside, outside = (
            (left * whole * mask).flatten(1).sum(1) / (whole.square() * mask).flatten(1).sum(1).clamp_min(1e-12)
            for mask in (region, ~region)
        )
        apart = inside - outside
        error = float(apart.std()) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        found[kind] = Survival(float(inside.mean()), float(outside.mean()), float(apart.mean()), error, len(apart))
    return found


def _inside(boxes: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Boxes [N, P, 4] in pixels of ``image_size`` -> bool [N, *size]: pixels whose centre is in one of them."""
    rows, columns = (
        (torch.arange(cells, dtype=torch.float64) + 0.5) * (pixels / cells) - 0.5
        for cells, pixels in zip(size, image_size, strict=True)
    )
    top, left, bottom, right = (edge[..., None] for edge in boxes.double().unbind(2))
    in_rows, in_columns = (rows >= top) & (rows <= bottom), (columns >= left) & (columns <= right)  # NaN: nowhere
    return (in_rows[..., :, None] & in_columns[..., None, :]).any(1)


# -------------------------------------------------------------------------------------------------------------- the picture
def synthesis_sheet(dataset: Photographs, synthesis: Synthesis, side: int = 112) -> Image.Image:
    """A line per image: photograph; the photograph seen through the kept units, grey where none of them is active; painted from
    all units, from the kept ones, from as many random ones, from as many of the strongest.
    """
    if len(dataset) <= max(synthesis.images):
        raise ArgumentError(
            f"dataset: got {len(dataset)} images, wanted those that were placed, at least {max(synthesis.images) + 1}"
        )
    tiles: list[np.ndarray] = []
    labels: list[str] = []
    for number, image in enumerate(synthesis.images):
        pictures = [synthesis.painted[kind][number] for kind in KINDS]
        frame = dataset.frame(image)
        tiles += [
            frame,
            _through(frame, synthesis.where[number]),
            *((255 * p).round().byte().permute(1, 2, 0).numpy() for p in pictures),
        ]
        units = int(synthesis.units[number])
        best = f"best {synthesis.keep:.0%} of nodes: {units}"
        labels += [
            f"image {image}",
            "where the best are",
            f"all {int(synthesis.active[number])} units",
            best,
            f"{units} at random",
            f"{units} strongest",
        ]
    return grid_of_tiles(tiles, 2 + len(KINDS), side, 4, labels)


def _through(frame: np.ndarray, where: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] laid on mid-grey, as opaque as the square root of ``where`` [h, w]: a quarter of the most still shows."""
    opaque = (
        interpolate(where[None, None], frame.shape[:2], mode="bilinear", align_corners=False)[0, 0].sqrt()[..., None].numpy()
    )
    return np.rint(opaque * frame + (1 - opaque) * 128).astype(np.uint8)
