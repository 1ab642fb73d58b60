"""The explanatory graph drawn: layers as rows, a patch on each node, the strongest edges; SVG and PNG from one layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from conelens.diagram import bezier
from conelens.errors import ArgumentError
from conelens.explanatory.pictures import (
    SIDE,
    Node,
    Photographs,
    check_node,
    marked,
    name_room,
    rank_nodes,
    rank_scores,
    top_patches,
)
from conelens.figures import FAINT, INK, PAPER, data_uri, write
from conelens.heatmaps import LABEL_COLOURS, Colour

if TYPE_CHECKING:
    from conelens.explanatory.graph import ExplanatoryGraph
    from conelens.explanatory.layer import GraphLayer, Placement

PATCH = 112  # pixels of a node's picture
_GAP_X, _GAP_Y, _MARGIN, _LABEL = 16, 96, 14, 30
_IDLE: Colour = (200, 204, 210)  # of edges that explain nothing, and of nodes without a picture
_COLOURS: list[Colour] = [*LABEL_COLOURS, (225, 124, 5), (111, 79, 176), (140, 90, 43)]  # one for each node of a row
_THIN, _LEAST, _THICK = 1.0, 2.0, 6.0  # of edges that explain nothing; of the weakest and the strongest that do
_SMOOTH = 3  # curves are drawn so many times larger, then averaged

Point = tuple[float, float]


# ------------------------------------------------------------------------------------------------- what is drawn
class Link(NamedTuple):
    """An edge between a node and one of the layer above; ``strength`` as in ``GraphLayer``: larger is stronger."""

    upper: Node
    lower: Node
    strength: float


@dataclass(frozen=True)
class Selection:
    """The part of a graph that is drawn: ``rows`` of nodes, top layer first, and the ``links`` between neighbouring rows."""

    rows: list[list[Node]]
    links: list[Link]


def select(
    graph: ExplanatoryGraph,
    placements: Mapping[str, Placement],
    *,
    nodes: int = 9,
    links: int = 3,
    root: Node | None = None,
) -> Selection:
    """The strongest nodes of each layer that hang together, and their strongest edges.

    Nodes are ranked by the sum of their best image scores (:func:`conelens.explanatory.pictures.rank_nodes`). No row holds
    two nodes of a filter, as these often lie close together. The top row holds the best ranked nodes, those with nodes below
    first; or ``root`` alone. Each further row is filled by the nodes above in turn, until ``nodes`` are there: each takes the
    node below with the largest product of rank score and strength, the strength of an edge being the share of the layer's
    edges that are no stronger; nodes with nodes below themselves come first. Of a node's edges to drawn nodes the ``links``
    strongest are drawn.

    Raises:
        ArgumentError: an unknown layer or node; placements that lack a layer.
    """
    if nodes < 1 or links < 1:
        raise ArgumentError(f"nodes and links: got {nodes} and {links}, wanted at least 1")
    names = list(reversed(graph.layers))
    if root is not None:
        if root.layer not in graph.layers:
            raise ArgumentError(f"root: got layer {root.layer!r}, wanted one of {', '.join(names)} (the layers of the graph)")
        check_node(root, graph.layers[root.layer].mean.shape[:2])
        names = names[names.index(root.layer) :]
    missing = [name for name in names if name not in placements]
    if missing:
        raise ArgumentError(f"placements: they lack {', '.join(missing)}; give all that graph.infer returns")
    top = [root] if root is not None else _top_row(graph, placements, names, nodes)
    if not top:
        raise ArgumentError(f"placements: no image shows any node of {names[0]}; place the graph on images of its own kind")
    rows, drawn = [top], []
    for lower in names[1:]:
        row = _row_below(graph, placements, names, lower, rows[-1], nodes)
        if not row:  # nothing below, as under a root that is no parent
            break
        drawn += [link for node in row for link in _links(graph, node, rows[-1])[:links]]
        rows.append(row)
    return Selection(rows, drawn)


def _with_nodes_below(graph: ExplanatoryGraph, names: Sequence[str], layer: str) -> Tensor:
    """Which nodes of a layer have nodes below them, bool [D, K]: all of them in the bottom layer, which needs none."""
    shape = graph.layers[layer].mean.shape[:2]
    if layer == names[-1]:
        return torch.ones(shape, dtype=torch.bool)
    found = torch.zeros(shape.numel(), dtype=torch.bool)
    found[_edges(graph.layers[names[names.index(layer) + 1]])[0].flatten()] = True
    return found.view(shape)


def _top_row(graph: ExplanatoryGraph, placements: Mapping[str, Placement], names: Sequence[str], count: int) -> list[Node]:
    linked = _with_nodes_below(graph, names, names[0])
    ranked = rank_nodes(placements, names[0], linked.numel())
    ranked.sort(key=lambda node: not linked[node.filter, node.node])
    best: dict[int, Node] = {}
    for node in ranked:
        best.setdefault(node.filter, node)
    return list(best.values())[:count]


def _row_below(
    graph: ExplanatoryGraph,
    placements: Mapping[str, Placement],
    names: Sequence[str],
    lower: str,
    above: Sequence[Node],
    count: int,
) -> list[Node]:
    """The nodes of layer ``lower`` that the nodes ``above`` pick in turn."""
    layer = graph.layers[lower]
    linked = _with_nodes_below(graph, names, lower).flatten()
    ranks = rank_scores(placements[lower]).flatten()
    edges, strength = _edges(layer)
    share = torch.searchsorted(strength.flatten().sort().values, strength, right=True) / strength.numel()
    queues = []
    for node in above:
        value = ranks * (share * (edges == _flat(graph, node))).amax(1)
        order = torch.argsort(value + linked * (value.max() + 1), descending=True, stable=True)
        queues.append(divmod(flat, layer.mean.shape[1]) for flat in order[value[order] > 0].tolist())
    chosen: dict[int, Node] = {}  # by filter
    while True:
        before = len(chosen)
        for queue in queues:
            free = next((pair for pair in queue if pair[0] not in chosen), None)
            if free is not None and len(chosen) < count:
                chosen[free[0]] = Node(lower, *free)
        if len(chosen) in (before, count):
            return list(chosen.values())


def _links(graph: ExplanatoryGraph, lower: Node, above: Sequence[Node]) -> list[Link]:
    """The edges of a node to the nodes ``above``, strongest first."""
    known = {_flat(graph, node): node for node in above}
    row = _flat(graph, lower)
    edges, strength = (values[row].tolist() for values in _edges(graph.layers[lower.layer]))
    pairs = zip(edges, strength, strict=True)
    found = [Link(known[parent], lower, value) for parent, value in pairs if parent in known]
    return sorted(found, key=lambda link: -link.strength)


def _edges(layer: GraphLayer) -> tuple[Tensor, Tensor]:
    """Parents [V, M] of a layer's nodes, as numbers among all nodes of the layer above, and how strong the edges are [V, M]."""
    if layer.edges is None or layer.strength is None:
        raise ArgumentError(
            f"graph: layer {layer.name} has no edges though it is not the top one; fit it, or draw another root"
        )
    return layer.edges.flatten(0, 1).cpu(), layer.strength.flatten(0, 1).double().cpu()


def _flat(graph: ExplanatoryGraph, node: Node) -> int:
    """A node's number among all of its layer."""
    return node.filter * graph.layers[node.layer].mean.shape[1] + node.node


# ------------------------------------------------------------------------------------------------------ drawing
@dataclass(frozen=True)
class _Curve:
    points: tuple[Point, Point, Point, Point]
    width: float
    colour: Colour
    note: str


@dataclass(frozen=True)
class _Words:
    at: Point
    text: str
    size: int
    room: float
    colour: Colour


@dataclass(frozen=True)
class _Tile:
    at: Point
    image: Image.Image
    frame: Colour


@dataclass(frozen=True)
class Drawing:
    """A laid-out graph: :meth:`svg` for pages, :meth:`image` for files of pixels. ``selection`` is what it shows."""

    selection: Selection
    width: int
    height: int
    curves: list[_Curve]
    tiles: list[_Tile]
    words: list[_Words]

    def svg(self, title: str = "explanatory graph") -> str:
        """SVG text with its pictures inside: needs no other file."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="system-ui, sans-serif">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{self.width}" height="{self.height}" fill="{_hex(PAPER)}"/>',
        ]
        for curve in self.curves:
            start, first, second, end = (f"{x:.1f},{y:.1f}" for x, y in curve.points)
            parts.append(
                f'<path d="M{start} C{first} {second} {end}" fill="none" stroke="{_hex(curve.colour)}" '
                f'stroke-width="{curve.width:.2f}"><title>{escape(curve.note)}</title></path>'
            )
        for tile in self.tiles:
            (x, y), image = tile.at, tile.image
            size = f'width="{image.width}" height="{image.height}"'
            parts += [
                f'<image x="{x:.1f}" y="{y:.1f}" {size} href="{data_uri(image)}"/>',
                f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="none" stroke="{_hex(tile.frame)}" stroke-width="2"/>',
            ]
        for words in self.words:
            (x, y), style = words.at, f'font-size="{words.size}" fill="{_hex(words.colour)}"'
            parts.append(f'<text x="{x:.1f}" y="{y + words.size:.1f}" {style}>{escape(words.text)}</text>')
        return "\n".join([*parts, "</svg>", ""])

    def image(self) -> Image.Image:
        """The same drawing as a picture."""
        large = Image.new("RGB", (self.width * _SMOOTH, self.height * _SMOOTH), PAPER)
        pen = ImageDraw.Draw(large)
        for curve in self.curves:
            points = [(x * _SMOOTH, y * _SMOOTH) for x, y in bezier(*curve.points)]
            pen.line(points, curve.colour, max(1, round(curve.width * _SMOOTH)), joint="curve")
        sheet = large.resize((self.width, self.height), Image.Resampling.BOX)
        pen = ImageDraw.Draw(sheet)
        for tile in self.tiles:
            x, y = round(tile.at[0]), round(tile.at[1])
            sheet.paste(tile.image, (x, y))
            pen.rectangle((x - 1, y - 1, x + tile.image.width, y + tile.image.height), outline=tile.frame, width=2)
        for words in self.words:
            write(pen, words.at, words.text, words.size, words.room, words.colour)
        return sheet


def draw_graph(
    graph: ExplanatoryGraph,
    placements: Mapping[str, Placement],
    dataset: Photographs,
    *,
    nodes: int = 9,
    links: int = 3,
    root: Node | None = None,
    image: int | None = None,
    patches: int = 4,
    side: int = SIDE,
) -> Drawing:
    """Draw what :func:`select` chooses, the top layer on top; a node is the photograph around it where it scores best.

    Edges are the wider the stronger, from the weakest to the strongest of those drawn between two layers. They have the colour
    of their upper node. Colours are given to the top row, or to the one below a root; each node further down has the colour of
    its strongest edge. Edges of strength 0 or less, which explain nothing, are thin and grey.

    Args:
        graph, placements, nodes, links, root: as for :func:`select`; with ``root`` a node and what it is made of.
        dataset: the images of ``placements``.
        image: show every node on this image alone.
        patches: images per node, in a square.
        side: of a patch, in pixels of the network input.
    """
    selection = select(graph, placements, nodes=nodes, links=links, root=root)
    pool = None if image is None else [image]
    drawn = [node for row in selection.rows for node in row]
    shown = top_patches(dataset, placements, drawn, images=pool, count=patches, side=side)
    return _lay_out(selection, {row.node: _mosaic(row.patches, 1 if image is not None else patches) for row in shown})


def _mosaic(patches: np.ndarray, room: int) -> Image.Image:
    """Patches, best first, in a square that holds ``room`` of them."""
    across = math.ceil(math.sqrt(room))
    side = (PATCH - across + 1) // across
    square = Image.new("RGB", (PATCH, PATCH), _IDLE)
    for number, patch in enumerate(patches):
        square.paste(marked(patch, side), (number % across * (side + 1), number // across * (side + 1)))
    return square


def _lay_out(selection: Selection, pictures: Mapping[Node, Image.Image]) -> Drawing:
    widest = max(len(row) for row in selection.rows)
    names = name_room([row[0].layer for row in selection.rows])
    inner = max(2, widest) * (PATCH + _GAP_X) - _GAP_X
    places: dict[Node, Point] = {}
    colours: dict[Node, Colour] = {}
    words: list[_Words] = []
    given = int(len(selection.rows[0]) == 1)
    for rank, row in enumerate(selection.rows):
        top = _MARGIN + rank * (PATCH + _LABEL + _GAP_Y)
        pitch = inner / max(1, len(row))
        for place, node in enumerate(_ordered(row, selection.links, places)):
            places[node] = (_MARGIN + names + (place + 0.5) * pitch - PATCH / 2, top)
            colours[node] = _COLOURS[place % len(_COLOURS)] if rank == given else _inherited(node, selection.links, colours)
            x = places[node][0]
            words.append(_Words((x, top + PATCH + 2), f"filter {node.filter}", 11, PATCH, INK))
            words.append(_Words((x, top + PATCH + 15), f"node {node.node}", 10, PATCH, FAINT))
        told = "1 node" if len(row) == 1 else f"{len(row)} nodes"
        words.append(_Words((_MARGIN, top + PATCH / 2 - 16), row[0].layer, 14, names, INK))
        words.append(_Words((_MARGIN, top + PATCH / 2 + 2), told, 10, names, FAINT))
    curves = []
    for link, width in zip(selection.links, _widths(selection.links), strict=True):
        (x0, y0), (x3, y3) = places[link.upper], places[link.lower]
        start, end = (x0 + PATCH / 2, y0 + PATCH + _LABEL), (x3 + PATCH / 2, y3)
        middle = (start[1] + end[1]) / 2
        colour = colours[link.upper] if link.strength > 0 else _IDLE
        note = f"{link.upper} to {link.lower}: strength {link.strength:.2g}"
        curves.append(_Curve((start, (start[0], middle), (end[0], middle), end), width, colour, note))
    curves.sort(key=lambda curve: curve.width)  # the strongest on top
    tiles = [_Tile(at, pictures[node], colours[node]) for node, at in places.items()]
    height = _MARGIN + len(selection.rows) * (PATCH + _LABEL + _GAP_Y) - _GAP_Y
    return Drawing(selection, 2 * _MARGIN + names + inner, height, curves, tiles, words)


def _ordered(row: Sequence[Node], links: Sequence[Link], places: Mapping[Node, Point]) -> list[Node]:
    """A row from left to right: each node below the middle of the nodes it is linked to, so that few edges cross."""

    def middle(node: Node) -> float:
        above = [places[link.upper][0] for link in links if link.lower == node]
        return sum(above) / len(above) if above else 0.0

    return sorted(row, key=middle)


def _inherited(node: Node, links: Sequence[Link], colours: Mapping[Node, Colour]) -> Colour:
    """The colour of a node's strongest edge; grey where none explains anything, and of a root."""
    best = max((link for link in links if link.lower == node), key=lambda link: link.strength, default=None)
    return FAINT if best is None or best.strength <= 0 else colours[best.upper]


def _widths(links: Sequence[Link]) -> list[float]:
    """Line widths by strength, from the weakest to the strongest edge that is drawn between two layers."""
    drawn: dict[str, list[float]] = {}
    for link in links:
        drawn.setdefault(link.lower.layer, []).append(link.strength)
    widths = []
    for link in links:
        explaining = [strength for strength in drawn[link.lower.layer] if strength > 0]
        if link.strength <= 0:
            widths.append(_THIN)
            continue
        low, high = min(explaining), max(explaining)
        share = (link.strength - low) / (high - low) if high > low else 1.0
        widths.append(_LEAST + (_THICK - _LEAST) * share)
    return widths


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
