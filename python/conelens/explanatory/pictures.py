"""What the nodes of an explanatory graph show: the photograph at their best places, and where on a photograph they gather.

Zhang et al. 2018, figures of top-ranked patches and of heat maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.figures import FAINT, INK, PAPER, cut, enlarge, grid, write
from conelens.heatmaps import tell, viridis

if TYPE_CHECKING:
    from conelens.explanatory.graph import ExplanatoryGraph
    from conelens.explanatory.layer import Placement

RANKED_BY = 50  # images whose scores add up to the rank of a node: the authors' number
SIDE = 70  # pixels of the network input, the paper's patches; the authors' release cuts 60 and 80


class Node(NamedTuple):
    """One pattern: a layer, one of its filters, one of that filter's nodes; both numbers from 0."""

    layer: str
    filter: int
    node: int

    def __str__(self) -> str:
        return f"{self.layer} filter {self.filter} node {self.node}"


class Photographs(Protocol):
    """A data set that shows its items as the network sees them: `conelens.data.ImageFolder` is one."""

    def __len__(self) -> int: ...

    def frame(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3], of the size of the network's input."""


# -------------------------------------------------------------------------------------------------------- ranks
def rank_scores(placement: Placement, best: int = RANKED_BY) -> Tensor:
    """Sum of each node's ``best`` largest image scores, float64 [D, K]: what nodes are ranked by."""
    if best < 1:
        raise ArgumentError(f"best: got {best}, wanted at least 1 image")
    scores = placement.scores
    return scores.topk(min(best, len(scores)), dim=0).values.sum(0, dtype=torch.float64).cpu()


def rank_nodes(
    placements: Mapping[str, Placement], layer: str, count: int = 20, *, best: int = RANKED_BY, per_filter: int | None = None
) -> list[Node]:
    """The nodes of a layer with the largest sum of their ``best`` image scores, strongest first.

    Args:
        placements: of all layers, from ``graph.infer``.
        layer: its name.
        count: nodes at most; those that no image shows are left out. Equals in order of filter and node.
        best: images that count.
        per_filter: at most so many nodes of one filter; None: no limit, as in the paper.
    """
    if count < 1 or (per_filter is not None and per_filter < 1):
        raise ArgumentError(f"count and per_filter: got {count} and {per_filter}, wanted at least 1 node")
    ranks = rank_scores(placement_of(placements, layer), best)
    chosen: list[Node] = []
    used: dict[int, int] = {}
    for flat in ranks.flatten().sort(descending=True, stable=True).indices.tolist():
        node = Node(layer, *divmod(flat, ranks.shape[1]))
        if len(chosen) == count or not ranks[node.filter, node.node] > 0:
            break
        used[node.filter] = used.get(node.filter, 0) + 1
        if per_filter is None or used[node.filter] <= per_filter:
            chosen.append(node)
    return chosen


def placement_of(placements: Mapping[str, Placement], layer: str) -> Placement:
    """The placement of a layer, or an error that lists those there are."""
    if layer not in placements:
        raise ArgumentError(f"layer: got {layer!r}, wanted one of {', '.join(placements)} (the layers that were placed)")
    return placements[layer]


def check_node(node: Node, shape: Sequence[int]) -> None:
    """Refuse a node that a layer of ``shape`` (D filters, K nodes each) does not have."""
    filters, nodes = shape
    if not (0 <= node.filter < filters and 0 <= node.node < nodes):
        raise ArgumentError(
            f"node: got {node}, wanted filter 0..{filters - 1} and node 0..{nodes - 1} "
            f"({node.layer} has {filters} filters of {nodes} nodes)"
        )


# ------------------------------------------------------------------------------------------------------ patches
@dataclass(frozen=True)
class NodePatches:
    """A node's strongest images, best first.

    ``patches`` uint8 [n, side, side, 3] around ``positions`` float [n, 2] (y, x in pixels of the network input) of ``images``,
    with their ``scores``; ``seen`` is the number of images with a positive score. n is 0 where no image shows the node.
    """

    node: Node
    patches: np.ndarray
    images: list[int]
    positions: np.ndarray
    scores: list[float]
    seen: int


def top_patches(
    dataset: Photographs,
    placements: Mapping[str, Placement],
    nodes: Sequence[Node],
    *,
    images: Sequence[int] | None = None,
    count: int = 9,
    side: int = SIDE,
) -> list[NodePatches]:
    """The photograph around each node in the images that show it best (Zhang et al. 2018, top-ranked patches).

    A patch has the node in its middle (to half a pixel) also at the border: what lies outside the photograph is mid-grey.

    Args:
        dataset: the images of ``placements``, in their order.
        placements: from ``graph.infer``.
        nodes: of any layers; :func:`rank_nodes` gives the strongest.
        images: indices to choose from; None: all.
        count: patches at most; images with score 0 do not show the node and are left out. Equals in order of images.
        side: of a patch, in pixels of the network input.

    Raises:
        ArgumentError: an unknown layer, a node or image that is not there, a data set with fewer images than ``placements``.
    """
    if count < 1 or side < 1:
        raise ArgumentError(f"count and side: got {count} and {side}, wanted at least 1")
    best = [_best_images(placements, node, images, count) for node in nodes]
    for node in nodes:
        check_length(dataset, placements[node.layer])
    made = [
        NodePatches(
            node,
            np.zeros((len(order), side, side, 3), np.uint8),
            order,
            placements[node.layer].positions[order, node.filter, node.node].double().cpu().numpy(),
            placements[node.layer].scores[order, node.filter, node.node].double().tolist(),
            seen,
        )
        for node, (order, seen) in zip(nodes, best, strict=True)
    ]
    wanted: dict[int, list[tuple[NodePatches, int]]] = {}
    for row in made:
        for number, image in enumerate(row.images):
            wanted.setdefault(image, []).append((row, number))
    for image in sorted(wanted):  # each photograph is read once
        frame = dataset.frame(image)
        for row, number in wanted[image]:
            row.patches[number] = cut(frame, patch_box(row.positions[number], side))
    return made


def patch_box(position: Sequence[float] | np.ndarray, side: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the square whose middle is nearest to ``position`` (y, x); halves go down and right."""
    top, left = (math.floor(centre - (side - 1) / 2 + 0.5) for centre in position)
    return top, left, top + side, left + side


def check_length(dataset: Photographs, placement: Placement) -> None:
    """Refuse a data set that cannot be the one that was placed."""
    if len(dataset) < len(placement.scores):
        raise ArgumentError(
            f"dataset: got {len(dataset)} images, but {len(placement.scores)} were placed; give the ones that infer was given"
        )


def _best_images(
    placements: Mapping[str, Placement], node: Node, images: Sequence[int] | None, count: int
) -> tuple[list[int], int]:
    """The images with the highest positive scores of a node, and how many have one."""
    placement = placement_of(placements, node.layer)
    check_node(node, placement.scores.shape[1:])
    scores = placement.scores[:, node.filter, node.node].double().cpu()
    pool = torch.arange(len(scores)) if images is None else torch.tensor(sorted(set(images)), dtype=torch.int64)
    if len(pool) and not 0 <= int(pool[0]) <= int(pool[-1]) < len(scores):
        raise ArgumentError(
            f"images: got {int(pool[0])}..{int(pool[-1])}, wanted 0..{len(scores) - 1} (the images that were placed)"
        )
    ranked = scores[pool].sort(descending=True, stable=True)
    seen = int((ranked.values > 0).sum())
    return pool[ranked.indices[: min(count, seen)]].tolist(), seen


def patch_sheet(rows: Sequence[NodePatches], side: int = 112) -> Image.Image:
    """One line per node: its name, rank and number of images, then its patches, best first; a ring marks the node's position.

    Each patch is shown ``side`` pixels wide, with its image below and its score there as a share of the best one.
    """
    if not rows:
        raise ArgumentError("rows: got none, wanted the patches of at least one node")
    columns = max(1, *(len(row.patches) for row in rows))
    strips = [
        grid(
            [np.asarray(marked(patch, side)) for patch in row.patches],
            columns,
            side,
            4,
            [f"image {i}: {tell(score / row.scores[0], True)}" for i, score in zip(row.images, row.scores, strict=True)],
        )
        for row in rows
    ]
    margin, high = 8, strips[0].height + 8
    left = max(116, name_room([row.node.layer for row in rows])) + margin
    sheet = Image.new("RGB", (left + strips[0].width + 2 * margin, high * len(rows) + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (row, strip) in enumerate(zip(rows, strips, strict=True)):
        top = margin + number * high
        write(pen, (margin, top), row.node.layer, 14, left - margin)
        write(pen, (margin, top + 19), f"filter {row.node.filter}", 13, left - margin)
        write(pen, (margin, top + 36), f"node {row.node.node}", 13, left - margin)
        write(pen, (margin, top + 56), f"seen in {row.seen} images", 11, left - margin, FAINT)
        sheet.paste(strip, (left + margin, top))
    return sheet


def name_room(names: Sequence[str], size: int = 14) -> int:
    """Pixels that a column of names needs, with room to what stands beside it."""
    font = ImageFont.load_default(size)
    return max(round(font.getlength(name)) for name in names) + 24


def marked(patch: np.ndarray, side: int) -> Image.Image:
    """A patch ``side`` pixels wide with a ring at its middle, where the node is."""
    picture = enlarge(patch, side)
    pen = ImageDraw.Draw(picture)
    middle = (side - 1) / 2
    radius = max(3, side // 18) + middle % 1  # so that the ring's edges are whole pixels
    for grow, colour in ((1, INK), (0, (255, 224, 0))):
        edges = (middle - radius - grow, middle - radius - grow, middle + radius + grow, middle + radius + grow)
        pen.ellipse(edges, outline=colour, width=1 + 2 * grow)
    return picture


# ---------------------------------------------------------------------------------------------------- heat maps
def heat_map(placement: Placement, sigma: Tensor, image: int, size: tuple[int, int], share: float = 0.5) -> np.ndarray:
    """Where the nodes of a layer gather on an image: sum of S N(.; p, sigma^2) over its strongest nodes.

    Args:
        placement: of the layer.
        sigma: [D, K] pixels, of the layer's nodes (``GraphLayer.sigma``).
        image: index in ``placement``.
        size: (height, width) of the network's input.
        share: of the layer's nodes that count, the strongest of this image (the paper's top 50 %); in (0, 1].

    Returns:
        float64 [height, width], density: scores per square pixel. Zero where no node is seen.
    """
    images, filters, nodes = placement.scores.shape
    if not 0 <= image < images:
        raise ArgumentError(f"image: got {image}, wanted 0..{images - 1} (the images that were placed)")
    if not 0 < share <= 1:
        raise ArgumentError(f"share: got {share}, wanted more than 0, at most 1")
    if sigma.shape != (filters, nodes):
        raise ArgumentError(f"sigma: got shape {tuple(sigma.shape)}, wanted {(filters, nodes)}, one per node of the placement")
    scores = placement.scores[image].flatten().double().cpu()
    kept = scores.sort(descending=True, stable=True).indices[: math.ceil(share * len(scores))]
    kept = kept[scores[kept] > 0]
    spread = sigma.flatten().double().cpu()[kept, None]
    at = placement.positions[image].flatten(0, 1).double().cpu()[kept]
    rows, columns = (
        torch.exp(-((torch.arange(cells, dtype=torch.float64) - at[:, axis, None]) ** 2) / (2 * spread**2))
        for axis, cells in enumerate(size)
    )
    height = (scores[kept, None] / (2 * math.pi * spread**2)) * rows  # the Gaussian is separable: one matrix product
    heat: np.ndarray = (height.T @ columns).numpy()
    return heat


def heat_grey(heat: np.ndarray) -> np.ndarray:
    """Heat [H, W] >= 0 -> uint8 [H, W]: black is zero, white the map's own largest value."""
    return np.rint(255 * heat / (heat.max(initial=0.0) or 1.0)).astype(np.uint8)


def heat_overlay(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Heat over the photograph in grey, uint8 [H, W, 3]: the hotter, the more colour, from violet to yellow."""
    if heat.shape != frame.shape[:2]:
        raise ArgumentError(f"heat has shape {heat.shape}, frame {frame.shape}; wanted [H, W] and [H, W, 3] of one size")
    share = heat / (heat.max(initial=0.0) or 1.0)
    grey = np.asarray(Image.fromarray(frame).convert("L"), np.float64)[..., None]
    cover = 0.75 * np.sqrt(share)[..., None]
    return np.rint(grey + cover * (viridis(share, 0.0, 1.0) - grey)).astype(np.uint8)


def heat_sheet(
    dataset: Photographs,
    graph: ExplanatoryGraph,
    placements: Mapping[str, Placement],
    images: Sequence[int],
    *,
    share: float = 0.5,
    side: int = 168,
) -> Image.Image:
    """A line per image: the photograph, then per layer, top layer first, its heat map in grey and over the photograph.

    Each map has its own scale: white and yellow are its own largest value.
    """
    if not images:
        raise ArgumentError("images: got none, wanted the index of at least one image")
    layers = [name for name in reversed(graph.layers) if name in placements]
    tiles: list[np.ndarray] = []
    labels: list[str] = []
    for name in layers:
        check_length(dataset, placements[name])
    for image in images:
        frame = dataset.frame(image)
        tiles.append(frame)
        labels.append(f"image {image}")
        for name in layers:
            heat = heat_map(placements[name], graph.layers[name].sigma, image, frame.shape[:2], share)
            tiles += [heat_grey(heat), heat_overlay(frame, heat)]
            labels += [f"{name}: heat", f"{name}: over the image"]
    return grid(tiles, 1 + 2 * len(layers), side, 4, labels)
