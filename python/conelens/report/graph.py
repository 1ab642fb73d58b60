"""The page of an explanatory graph: the graph drawn, what its nodes show, where they gather, how it was learned, its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from conelens.errors import ArgumentError
from conelens.explanatory.drawing import Drawing, draw_graph
from conelens.explanatory.pictures import SIDE, Node, Photographs, heat_sheet, patch_sheet, rank_nodes, top_patches
from conelens.figures import FAINT, INK, PAPER, write
from conelens.heatmaps import LABEL_COLOURS
from conelens.report.page import Figure, Page, Section, Table, safe_name

if TYPE_CHECKING:
    from conelens.explanatory.graph import ExplanatoryGraph
    from conelens.explanatory.layer import GraphLayer, Placement

TitledTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]

GUIDE = (
    "A node is one part pattern of one filter; it has a place of its own in each image. An edge says that a node moves from "
    "image to image as the node above it does. In all pictures the ring is the node's position."
)
_DRAWN = (
    "Layers are rows, the top layer on top. Each node shows the photograph around it in the four images where its score is "
    "highest. Edges take the colour of the upper node and are the wider the stronger they are, among those drawn between two "
    "layers; thin grey ones explain nothing of how the lower node moves. Further down a node has its strongest edge's colour."
)
_NODES = (
    "The nodes with the largest sum of their 50 best scores, one of a filter; best images first. Below each patch stands its "
    "image, and its score as a share of the node's best one. Outside the photograph it is grey. A filter has near-duplicates "
    "among its nodes where it has more nodes than parts: several then settle on the same part."
)
_HEAT = (
    "Per layer, top layer first: the sum of the scores of the stronger half of its nodes, each spread about its place in this "
    "image by its own sigma. White (yellow, over the photograph) is the largest value of that map."
)
_LEARNING = (
    "The log-likelihood is per unit of activity; higher is better. It may fall where parents are first chosen: from then on "
    "the densities carry a factor for how well the parents agree, and do not compare with those before."
)
_WIDE = 1280  # pixels of the page
_CURVE_WIDE, _CURVE_HIGH = 280, 170


def graph_page(
    title: str,
    graph: ExplanatoryGraph,
    placements: Mapping[str, Placement],
    dataset: Photographs,
    *,
    tables: Sequence[TitledTable] = (),
    images: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    nodes: int = 12,
    patches: int = 9,
    side: int = SIDE,
    root: Node | None = None,
) -> Page:
    """The page of a learned graph, for :func:`conelens.report.write_page`.

    Args:
        title: of the page.
        graph: learned.
        placements: of all its layers on the images of ``dataset``, from ``graph.infer``.
        dataset: shows these images.
        tables: (title, header, rows) of experiments, shown first.
        images: indices for the heat maps; None: six, spread over the data set.
        layers: whose nodes are shown; None: of all.
        nodes: strongest nodes shown per layer, one of a filter.
        patches: per node; ``side`` of each, in pixels of the network's input.
        root: a node that is drawn with what it is made of; None: the two top nodes with most of it.

    Raises:
        ArgumentError: placements that lack a layer, a data set that is too short.
    """
    shown = [name for name in reversed(graph.layers) if layers is None or name in layers]
    count = len(next(iter(placements.values())).scores) if placements else 0
    if images is None:
        images = sorted({number * count // 6 for number in range(6)}) if count else []
    page = Page(title, GUIDE)
    page.sections += [Section(name, tables=[Table(header, rows)]) for name, header, rows in tables]
    whole = draw_graph(graph, placements, dataset, side=side)
    drawings = [_figure("graph", whole, "The strongest nodes and edges.")]
    below_each = Counter(link.upper for link in whole.selection.links if link.upper in whole.selection.rows[0])
    for upper in [node for node, _ in below_each.most_common(2)] if root is None else [root]:
        below = draw_graph(graph, placements, dataset, root=upper, side=side)
        alone = len(below.selection.rows) == 1
        told = f"{upper}: no node below has it as a parent." if alone else f"What {upper} is made of."
        drawings.append(_figure(f"below_{'_'.join(map(str, upper))}", below, told))
    page.sections.append(Section("The graph", _DRAWN, drawings))
    for name in shown:
        best = rank_nodes(placements, name, nodes, per_filter=1)
        if best:
            sheet = patch_sheet(top_patches(dataset, placements, best, count=patches, side=side))
            page.sections.append(Section(f"Nodes of {name}", _NODES, [Figure(f"nodes_{safe_name(name)}", sheet)]))
    heat_side = min(168, _WIDE // (1 + 2 * len(graph.layers)) - 4)
    heat = heat_sheet(dataset, graph, placements, images, side=heat_side)
    page.sections.append(Section("Heat maps", _HEAT, [Figure("heat_maps", heat)]))
    page.sections.append(_learning(graph))
    return page


def _figure(name: str, drawing: Drawing, caption: str) -> Figure:
    return Figure(safe_name(name), drawing.image(), caption, drawing.svg(caption))


def _learning(graph: ExplanatoryGraph) -> Section:
    header = ("layer", "filters x nodes", "edges per node", "sigma, pixels", "iterations", "log-likelihood, first and last")
    rows = [_summary(layer) for layer in reversed(graph.layers.values())]
    history = {name: graph.layers[name].history for name in reversed(graph.layers) if graph.layers[name].history}
    figures = (
        [Figure("log_likelihood", curves(history), "Log-likelihood per unit of activity over iterations.")] if history else []
    )
    return Section("Learning", _LEARNING, figures, [Table(header, rows)])


def _summary(layer: GraphLayer) -> tuple[str, ...]:
    filters, nodes = layer.mean.shape[:2]
    edges = "top layer" if layer.edges is None else str(layer.edges.shape[2])
    sigma = f"{float(layer.sigma.min()):.1f} to {float(layer.sigma.max()):.1f}, median {float(layer.sigma.median()):.1f}"
    ends = f"{layer.history[0]:.4f}, {layer.history[-1]:.4f}" if layer.history else "none kept"
    return layer.name, f"{filters} x {nodes}", edges, sigma, str(len(layer.history)), ends


def curves(history: Mapping[str, Sequence[float]]) -> Image.Image:
    """One small chart per layer: the values of ``history`` over iterations from 1, each chart on its own scale."""
    if not history or not all(history.values()):
        raise ArgumentError("history: got no values, wanted at least one per layer")
    margin, left, foot, head = 10, 62, 20, 22
    wide = _CURVE_WIDE + left + margin
    sheet = Image.new("RGB", (wide * len(history) + margin, _CURVE_HIGH + head + foot + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    small = ImageFont.load_default(11)
    for number, (name, values) in enumerate(history.items()):
        x0, y0 = number * wide + left + margin, head
        x1, y1 = x0 + _CURVE_WIDE, y0 + _CURVE_HIGH
        write(pen, (x0, 3), name, 13, _CURVE_WIDE, INK)
        pen.rectangle((x0, y0, x1, y1), outline=(206, 210, 216))
        low, high = min(values), max(values)
        room = high - low or 1.0
        last = max(1, len(values) - 1)
        points = [
            (x0 + 8 + i / last * (_CURVE_WIDE - 16), y1 - 8 - (value - low) / room * (_CURVE_HIGH - 16))
            for i, value in enumerate(values)
        ]
        colour = LABEL_COLOURS[number % len(LABEL_COLOURS)]
        for ends in pairwise(points):
            pen.line(ends, colour, 2)
        for x, y in points:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        for value, y in ((high, y0 + 8), (low, y1 - 8)) if high > low else ((low, y1 - 8),):
            pen.text((x0 - 6, y), f"{value:.4g}", FAINT, small, anchor="rm")
        pen.text((x0 + 8, y1 + 3), "1", FAINT, small, anchor="ma")
        if len(values) > 1:
            pen.text((x1 - 8, y1 + 3), str(len(values)), FAINT, small, anchor="ma")
    return sheet
