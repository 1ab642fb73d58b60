"""The graph of a network as a drawing: SVG by string, PNG by Pillow, from one layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from PIL import Image, ImageDraw, ImageFont

BOX_WIDTH, BOX_HEIGHT = 196, 34
_GAP_X, _GAP_Y, _MARGIN = 26, 24, 20
_COLOURS = {
    "input": "#e8eaee",
    "conv": "#cfe1f7",
    "linear": "#cfe1f7",
    "max_pool": "#f9dcc0",
    "avg_pool": "#f9dcc0",
    "concat": "#d8efd3",
    "add": "#d8efd3",
}
_OTHER, _INK, _FAINT, _LINE = "#f2f3f5", "#181c24", "#5c6370", "#8a919d"
_POINTWISE = ("relu", "activation", "affine", "dropout")


@dataclass(frozen=True)
class DiagramNode:
    """One layer: `inputs` are positions in the list of nodes, all of them earlier."""

    name: str
    kind: str
    shape: tuple[int, int, int]
    receptive_field: tuple[int, int]
    inputs: tuple[int, ...]


@dataclass
class _Box:
    title: str
    detail: str
    colour: str
    inputs: list[int]
    rank: int = 0
    x: float = 0.0
    members: list[int] = field(default_factory=list)

    @property
    def y(self) -> float:
        return _MARGIN + self.rank * (BOX_HEIGHT + _GAP_Y)


def draw_svg(nodes: Sequence[DiagramNode], title: str) -> str:
    """The network as SVG text; input on top, branches beside each other."""
    boxes, width, height = _layout(nodes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui, sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for box in boxes:
        for source in box.inputs:
            start, bend, end = _edge(boxes[source], box)
            (x0, y0), (x1, y1), (x2, y2), (x3, y3) = start, *bend, end
            path = f"M{x0:.1f},{y0:.1f} C{x1:.1f},{y1:.1f} {x2:.1f},{y2:.1f} {x3:.1f},{y3:.1f}"
            parts.append(f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="1.4"/>')
    for box in boxes:
        x, y = box.x, box.y
        parts += [
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
            f'fill="{box.colour}" stroke="{_LINE}" stroke-width="0.8"/>',
            f'<text x="{x + 8:.1f}" y="{y + 14:.1f}" font-size="11" font-weight="600" fill="{_INK}">{escape(box.title)}</text>',
            f'<text x="{x + 8:.1f}" y="{y + 27:.1f}" font-size="10" fill="{_FAINT}">{escape(box.detail)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def draw_image(nodes: Sequence[DiagramNode]) -> Image.Image:
    """The same drawing as a picture."""
    boxes, width, height = _layout(nodes)
    sheet = Image.new("RGB", (round(width), round(height)), "white")
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(11), ImageFont.load_default(10)
    for box in boxes:
        for source in box.inputs:
            start, bend, end = _edge(boxes[source], box)
            pen.line(bezier(start, *bend, end), _LINE, 1)
    for box in boxes:
        pen.rounded_rectangle((box.x, box.y, box.x + BOX_WIDTH, box.y + BOX_HEIGHT), 5, box.colour, _LINE)
        pen.text((box.x + 8, box.y + 4), box.title, _INK, large)
        pen.text((box.x + 8, box.y + 18), box.detail, _FAINT, small)
    return sheet


def _layout(nodes: Sequence[DiagramNode]) -> tuple[list[_Box], float, float]:
    boxes = _merge(nodes)
    for box in boxes:
        box.rank = max((boxes[s].rank + 1 for s in box.inputs), default=0)
    ranks: dict[int, list[_Box]] = {}
    for box in boxes:
        ranks.setdefault(box.rank, []).append(box)
    # a line that passes over a rank keeps to the side, where no box stands
    widest = max(len(row) for row in ranks.values())
    skips = any(boxes[s].rank + 1 < box.rank for box in boxes for s in box.inputs)
    width = 2 * _MARGIN + widest * (BOX_WIDTH + _GAP_X) - _GAP_X + (60 if skips else 0)
    for rank in sorted(ranks):
        row = ranks[rank]
        row.sort(key=lambda b: sum(boxes[s].x for s in b.inputs) / max(1, len(b.inputs)))
        taken = len(row) * (BOX_WIDTH + _GAP_X) - _GAP_X
        left = (width - (60 if skips else 0) - taken) / 2
        for place, box in enumerate(row):
            box.x = left + place * (BOX_WIDTH + _GAP_X)
    height = 2 * _MARGIN + len(ranks) * (BOX_HEIGHT + _GAP_Y) - _GAP_Y
    return boxes, width, height


def _merge(nodes: Sequence[DiagramNode]) -> list[_Box]:
    """One box per layer, except that a pointwise layer joins the box of the only layer it reads."""
    readers = [0] * len(nodes)
    for node in nodes:
        for source in node.inputs:
            readers[source] += 1
    boxes: list[_Box] = []
    place: dict[int, int] = {}
    for index, node in enumerate(nodes):
        only = node.inputs[0] if len(node.inputs) == 1 else None
        if node.kind in _POINTWISE and only is not None and readers[only] == 1:
            place[index] = place[only]
            box = boxes[place[only]]
            box.members.append(index)
            box.detail = box.detail.replace("  ", f" + {node.kind}  ", 1)
            continue
        height, width = node.receptive_field
        shape = "x".join(map(str, node.shape))
        place[index] = len(boxes)
        boxes.append(
            _Box(
                _short(node.name),
                f"{node.kind}  {shape}  sees {height}x{width}",
                _COLOURS.get(node.kind, _OTHER),
                [place[s] for s in node.inputs],
                members=[index],
            )
        )
    return boxes


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


Point = tuple[float, float]


def _edge(source: _Box, target: _Box) -> tuple[Point, tuple[Point, Point], Point]:
    """Ends and control points: straight down to the next rank, around the right side beyond it."""
    if target.rank == source.rank + 1:
        start = (source.x + BOX_WIDTH / 2, source.y + BOX_HEIGHT)
        end = (target.x + BOX_WIDTH / 2, target.y)
        middle = (start[1] + end[1]) / 2
        return start, ((start[0], middle), (end[0], middle)), end
    start = (source.x + BOX_WIDTH, source.y + BOX_HEIGHT / 2)
    end = (target.x + BOX_WIDTH, target.y + BOX_HEIGHT / 2)
    side = max(start[0], end[0]) + 58
    return start, ((side, start[1]), (side, end[1])), end


def bezier(a: Point, b: Point, c: Point, d: Point, steps: int = 24) -> list[Point]:
    """Points of the cubic Bézier curve from ``a`` to ``d`` with control points ``b`` and ``c``, both ends included."""
    points = []
    for i in range(steps + 1):
        t = i / steps
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        x, y = (sum(w * p[axis] for w, p in zip(weights, (a, b, c, d))) for axis in (0, 1))
        points.append((x, y))
    return points
