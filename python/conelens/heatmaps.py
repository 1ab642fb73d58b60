"""Pictures of values by place: colour maps with their bars, maps of labels, heat over a photograph, the occlusion figure.

Lightness rises with the value all along the colour map, so that order is seen, also in grey and by the colour-blind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conelens.errors import ArgumentError
from conelens.figures import FAINT, INK, PAPER, grid, signed, write

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]


def _rgb(code: str) -> Colour:
    return int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)


# Matplotlib's viridis (CC0) at ten equal steps, straight lines between
_VIRIDIS = [
    _rgb(c) for c in ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"]
]
# Paul Tol's "bright" colours, which the colour-blind tell apart; all further labels are grey
LABEL_COLOURS = [_rgb(c) for c in ["4477aa", "ee6677", "228833", "ccbb44", "66ccee", "aa3377"]]
_REST, _NOWHERE = (187, 187, 187), (226, 228, 232)
_LOSS, _GAIN = (214, 30, 30), (40, 90, 214)


# ------------------------------------------------------------------------------------------- values to colours
def viridis(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values [...] -> uint8 [..., 3]: ``low`` and less dark violet, ``high`` and more yellow, NaN pale grey."""
    if not low < high:
        raise ArgumentError(f"low and high are {low} and {high}, wanted low < high")
    known = np.isfinite(values)
    share = np.clip((np.where(known, values, low) - low) / (high - low), 0, 1) * (len(_VIRIDIS) - 1)
    anchors, steps = np.array(_VIRIDIS, np.float64), np.arange(len(_VIRIDIS))
    colours = np.stack([np.interp(share, steps, anchors[:, channel]) for channel in range(3)], -1)
    return np.where(known[..., None], np.rint(colours), _NOWHERE).astype(np.uint8)


def label_colours(labels: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Labels [...] -> uint8 [..., 3]: those of ``order`` in the colours of ``LABEL_COLOURS``, in that order; others grey."""
    colours = np.full((*labels.shape, 3), _REST, np.uint8)
    for label, colour in zip(order, LABEL_COLOURS, strict=False):
        colours[labels == label] = colour
    return colours


def tell(value: float, percent: bool = False) -> str:
    """A value as people read it, with two or three figures."""
    if math.isnan(value):
        return "not a number"
    if percent:
        return f"{value:.0%}" if value >= 0.01 or value == 0 else "<1%"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def overlay(frame: np.ndarray, drop: np.ndarray, title: str = "", percent: bool = False, side: int = 448) -> Image.Image:
    """A photograph in grey under what covering each place costs: red where ``drop`` is positive, blue where it is negative.

    Args:
        frame: uint8 [H, W, 3].
        drop: float [H, W]. Full colour is the largest magnitude, no colour is zero; NaN is pale grey.
        title: a line above.
        percent: tell drops as shares of one.
        side: pixels of the longer side of the picture.
    """
    if drop.shape != frame.shape[:2]:
        raise ArgumentError(f"drop has shape {drop.shape}, frame {frame.shape}; wanted [H, W] and [H, W, 3] of one size")
    limit = float(np.abs(drop[np.isfinite(drop)]).max(initial=0.0))
    grey = np.asarray(Image.fromarray(frame).convert("L"), np.float64)[..., None] * 0.75 + 45
    picture = _scaled(_tinted(grey, drop / (limit or 1.0)), side)
    margin, head, foot = 8, 28, 36
    sheet = Image.new("RGB", (picture.width + 2 * margin, picture.height + head + foot), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (margin, 6), title, 14, picture.width)
    sheet.paste(picture, (margin, head))
    steps = np.linspace(-1, 1, picture.width)[None].repeat(10, 0)
    below = head + picture.height + 5
    sheet.paste(Image.fromarray(_tinted(np.full((*steps.shape, 1), 215.0), steps)), (margin, below))
    ends = (margin, margin + picture.width)
    _centred(pen, ends[0], below + 12, f"gains {tell(limit, percent)}", ends)
    _centred(pen, sum(ends) / 2, below + 12, "no change", ends)
    _centred(pen, ends[1], below + 12, f"loses {tell(limit, percent)}", ends)
    return sheet


def _tinted(ground: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Grey [H, W, 1] under shares [H, W] in -1..1 of the two colours; NaN pale grey."""
    known = np.isfinite(share)[..., None]
    weight = 0.85 * np.abs(np.where(known, share[..., None], 0.0))
    target = np.where(share[..., None] > 0, np.array(_LOSS), np.array(_GAIN))
    return np.where(known, np.rint(ground + weight * (target - ground)), _NOWHERE).astype(np.uint8)


# ---------------------------------------------------------------------------------------- the figure of a sweep
@dataclass(frozen=True)
class Heat:
    """Values [H, W] by place, the ``lowest`` one, and the ``clean`` one with nothing covered; ``percent``: shares of one."""

    values: np.ndarray
    lowest: float
    clean: float
    caption: str
    percent: bool = False


@dataclass(frozen=True)
class Labels:
    """Labels [H, W] by place; ``legend`` (label, text) for those in colour, in the order of ``LABEL_COLOURS``; ``rest``
    tells what the grey ones are, "" for none."""

    values: np.ndarray
    legend: Sequence[tuple[int, str]]
    rest: str = ""


@dataclass(frozen=True)
class OcclusionRow:
    """One image of the figure: ``image`` uint8 [H, W, 3] with the window ``box`` (top, left, bottom, right) painted over.

    ``projections`` float [K, 3, h, w] and ``patches`` uint8 [K, h, w, 3]: this image first, then others. ``probability`` and
    ``labels`` are None without a classifier.
    """

    image: np.ndarray
    box: Box
    caption: Sequence[str]
    activity: Heat
    projections: np.ndarray
    patches: Sequence[np.ndarray]
    probability: Heat | None = None
    labels: Labels | None = None


_HEADINGS = (
    "(a) Input and its worst window",
    "(b) Activity of strongest map",
    "(c) That map, projected down",
    "Images under the projections",
    "(d) Probability of the class",
    "(e) Most probable class",
)
_HEAD, _FOOT, _GAP, _MARGIN, _LINE, _SMALL = 24, 112, 14, 10, 16, 12


def occlusion_figure(rows: Sequence[OcclusionRow], side: int = 208) -> Image.Image:
    """Zeiler & Fergus' occlusion figure: a row per image, ``side`` pixels for the longer side of each panel."""
    if not rows:
        raise ArgumentError("rows: got none, wanted at least one image")
    columns = 6 if any(row.probability is not None for row in rows) else 4
    width = columns * (side + _GAP) - _GAP + 2 * _MARGIN
    sheet = Image.new("RGB", (width, _HEAD + (side + _FOOT) * len(rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(_HEADINGS[:columns]):
        write(pen, (_MARGIN + column * (side + _GAP), 4), heading, 14, side)
    for number, row in enumerate(rows):
        panels = _Panels(sheet, pen, row, side, _HEAD + (side + _FOOT) * number)
        panels.draw()
    return sheet


@dataclass(frozen=True)
class _Panels:
    """Draws one row from ``top`` on."""

    sheet: Image.Image
    pen: ImageDraw.ImageDraw
    row: OcclusionRow
    side: int
    top: int

    def draw(self) -> None:
        row = self.row
        self._map(0, row.image, (255, 64, 32))
        self._lines(0, row.caption)
        self._heat(1, row.activity)
        shown = signed(_shrunk(row.projections, self.side // 3), "percentile")
        self._tiles(2, [np.moveaxis(tile, 0, -1) for tile in shown])
        self._tiles(3, list(row.patches))
        others = len(row.patches) - 1
        told = [f"others: the {others} where it is strongest"] if others else []
        self._lines(2, ["framed: this image", *told, "grey is zero"])
        if row.probability is not None:
            self._heat(4, row.probability)
        if row.labels is not None:
            self._map(5, label_colours(row.labels.values, [label for label, _ in row.labels.legend]))
            self._legend(row.labels)

    def _left(self, column: int) -> int:
        return _MARGIN + column * (self.side + _GAP)

    @property
    def _below(self) -> int:
        return self.top + self.side + 6

    def _map(self, column: int, pixels: np.ndarray, outline: Colour = PAPER) -> None:
        """A picture of the image's size, with the window of panel (a) as an outline."""
        picture = _scaled(pixels, self.side)
        scale = self.side / max(pixels.shape[:2])
        top, left, bottom, right = (round(edge * scale) for edge in self.row.box)
        edges = (left, top, right - 1, bottom - 1)
        pen = ImageDraw.Draw(picture)
        pen.rectangle(edges, outline=outline, width=2 if column == 0 else 1)
        self.sheet.paste(picture, (self._left(column), self.top))

    def _heat(self, column: int, heat: Heat) -> None:
        """Values over their colour bar, which begins at zero and marks the lowest one and the clean one."""
        told = [value for value in (heat.lowest, heat.clean) if math.isfinite(value)]
        highest = float(heat.values.max(initial=-np.inf, where=np.isfinite(heat.values)))
        low, high = min([0.0, *told]), max([highest, *told])
        high = high if high > low else low + 1.0
        self._map(column, viridis(heat.values, low, high))
        left, y = self._left(column), self._below
        bar = viridis(np.linspace(low, high, self.side)[None].repeat(10, 0), low, high)
        self.sheet.paste(Image.fromarray(bar), (left, y))
        ends = (left, left + self.side)
        marks = (("lowest", heat.lowest, y + 14 + _LINE), ("clean", heat.clean, y + 14))
        for name, value, foot in marks:  # the longer line first, so that no line crosses a word
            x = float(left)
            if math.isfinite(value):
                x += (value - low) / (high - low) * (self.side - 1)
                self.pen.line((x, y, x, foot), INK, 1)
            _centred(self.pen, x, foot, f"{name} {tell(value, heat.percent)}", ends)
        self._lines(column, [heat.caption], y + 52)

    def _tiles(self, column: int, tiles: Sequence[np.ndarray]) -> None:
        """Up to nine tiles in a square, the first one framed."""
        across = 1 if len(tiles) == 1 else 2 if len(tiles) <= 4 else 3
        gap = 4
        side = (self.side - gap * (across - 1)) // across
        picture = grid(tiles[: across * across], across, side, gap)
        self.sheet.paste(picture, (self._left(column), self.top))
        left, top = self._left(column), self.top
        self.pen.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline=(0, 0, 0), width=3)

    def _legend(self, labels: Labels) -> None:
        left = self._left(5)
        entries = [(LABEL_COLOURS[i], text) for i, (_, text) in enumerate(labels.legend)]
        entries += [(_REST, labels.rest)] if labels.rest else []
        for line, (colour, text) in enumerate(entries):
            y = self._below + line * (_LINE - 1)
            self.pen.rectangle((left, y + 2, left + 10, y + 12), fill=colour)
            write(self.pen, (left + 16, y), text, _SMALL, self.side - 16)

    def _lines(self, column: int, lines: Sequence[str], top: int | None = None) -> None:
        for line, text in enumerate(lines):
            at = (self._left(column), (self._below if top is None else top) + line * _LINE)
            write(self.pen, at, text, _SMALL, self.side, INK if line == 0 else FAINT)


def _scaled(pixels: np.ndarray, side: int) -> Image.Image:
    """uint8 [H, W, 3] with ``side`` pixels on its longer side."""
    ratio = side / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * ratio)), max(1, round(pixels.shape[0] * ratio))
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if ratio > 3 else Image.Resampling.BILINEAR)


def _shrunk(tiles: np.ndarray, side: int) -> np.ndarray:
    """Float [K, C, h, w] averaged over blocks of whole pixels to about ``side``: signs cancel before the contrast is set."""
    block = max(1, max(tiles.shape[2:]) // side)
    high, wide = (cells // block * block for cells in tiles.shape[2:])
    blocks = tiles[:, :, :high, :wide].reshape(*tiles.shape[:2], high // block, block, wide // block, block)
    averaged: np.ndarray = blocks.mean((3, 5))
    return averaged


def _centred(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, ends: tuple[float, float]) -> None:
    """Text under a place, kept between ``ends``."""
    wide = pen.textlength(text, ImageFont.load_default(_SMALL))
    left = min(max(x - wide / 2, ends[0]), ends[1] - wide)
    pen.rectangle((left - 1, y + 1, left + wide + 1, y + _LINE - 2), fill=PAPER)
    write(pen, (left, y), text, _SMALL, ends[1] - ends[0], FAINT)
