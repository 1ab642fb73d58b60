"""Pictures of units, maps and projections with Pillow and NumPy alone.

Signed arrays are shown as `0.5 + x / (2 * limit)`: zero is always mid-grey, so that colour means sign and
contrast means size. Min-max stretching, which gives zero an arbitrary colour, is not offered.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conelens.errors import ArgumentError

GREY = 128
PAPER, INK, FAINT = (255, 255, 255), (24, 28, 36), (104, 110, 122)


# ------------------------------------------------------------------------------------------ arrays to pixels
def signed(x: np.ndarray, scale: str = "tile", limit: float | None = None, percentile: float = 99.3) -> np.ndarray:
    """Signed values -> uint8 with zero at mid-grey (128).

    Args:
        x: float [..., C, h, w] or [..., h, w]; the leading axes index tiles. Channels are not reordered.
        scale: "tile" divides each tile by its own largest magnitude; "percentile" by that percentile of its
            magnitudes, clipping
            the rest; "shared" divides all tiles by the largest of all, so that they can be compared.
        limit: use this magnitude for every tile instead.
        percentile: for scale "percentile".

    Returns:
        uint8 of x's shape. A tile of zeros is uniformly mid-grey; NaN and infinity are shown as mid-grey and
        full contrast.
    """
    values = np.nan_to_num(np.asarray(x, np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if values.ndim < 2:
        raise ArgumentError(f"x has shape {values.shape}, wanted [..., h, w]")
    inner = tuple(range(-min(3, values.ndim), 0))
    finite = np.where(np.isfinite(values), np.abs(values), 0.0)
    if limit is not None:
        if not limit > 0:
            raise ArgumentError(f"limit is {limit}, wanted a positive number")
        bound: np.ndarray = np.asarray(float(limit))
    elif scale == "tile":
        bound = finite.max(axis=inner, keepdims=True, initial=0.0)
    elif scale == "percentile":
        bound = np.percentile(finite, percentile, axis=inner, keepdims=True)
        # a sparse tile may have its percentile at zero
        bound = np.where(bound > 0, bound, finite.max(axis=inner, keepdims=True, initial=0.0))
    elif scale == "shared":
        bound = np.asarray(finite.max(initial=0.0))
    else:
        raise ArgumentError(f"scale is {scale!r}, wanted tile, percentile or shared")
    share = np.clip(values / np.where(bound > 0, bound, 1.0), -1.0, 1.0)
    return np.rint(GREY + share * np.where(share > 0, 127.0, 128.0)).astype(np.uint8)


def cut(image: np.ndarray, box: Sequence[int], size: tuple[int, int] | None = None) -> np.ndarray:
    """The box (top, left, bottom, right; may leave the image) of uint8 [H,W,3], mid-grey outside.

    `size` (h, w), when given, is the size of the result; the box sits at its top left, as projections of
    several sizes do.
    """
    top, left, bottom, right = (int(v) for v in box)
    height, width = size or (bottom - top, right - left)
    out = np.full((height, width, 3), GREY, np.uint8)
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(image.shape[0], bottom, top + height), min(image.shape[1], right, left + width)
    if y1 > y0 and x1 > x0:
        out[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return out


# ---------------------------------------------------------------------------------------------------- grids
def enlarge(tile: np.ndarray, side: int) -> Image.Image:
    """uint8 [h,w,3] or [h,w] as a side x side picture: aspect kept on mid-grey, pixels stay visible."""
    image = Image.fromarray(tile).convert("RGB")
    ratio = side / max(image.size)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.NEAREST if ratio > 1.5 else Image.Resampling.LANCZOS)
    if size == (side, side):
        return image
    canvas = Image.new("RGB", (side, side), (GREY, GREY, GREY))
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas


def grid(
    tiles: Sequence[np.ndarray],
    columns: int = 3,
    side: int = 96,
    gap: int = 2,
    labels: Sequence[str] | None = None,
    cells: int | None = None,
) -> Image.Image:
    """uint8 tiles [h,w,3] or [h,w] in rows of `columns`, each side x side; `cells` reserves room for more."""
    total = max(cells or 0, len(tiles), 1)
    rows = -(-total // columns)
    below = 13 if labels else 0
    sheet = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + below + gap) - gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number in range(total):
        x, y = number % columns * (side + gap), number // columns * (side + below + gap)
        if number < len(tiles):
            sheet.paste(enlarge(np.asarray(tiles[number]), side), (x, y))
            if labels:
                write(pen, (x + 1, y + side), labels[number], 10, side, FAINT)
        else:
            pen.rectangle((x, y, x + side - 1, y + side - 1), outline=(222, 224, 228))
    return sheet


def write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    room: float,
    colour: tuple[int, int, int] = INK,
) -> None:
    """One line of text from its top left corner on, cut short with an ellipsis where it needs more than ``room`` pixels."""
    font = ImageFont.load_default(size)
    while text and pen.textlength(text, font) > room:
        text = text[:-2] + "…" if len(text) > 2 else ""
    pen.text(at, text, colour, font)


@dataclass(frozen=True)
class UnitPanel:
    """One channel's winners: what the images show and what the projections keep, in the same order.

    `patches` uint8 [K,h,w,3], `projections` float [K,3,h,w]; `note` is a line in small print.
    """

    title: str
    patches: Sequence[np.ndarray]
    projections: np.ndarray
    note: str = ""


def unit_panel(panel: UnitPanel, side: int = 96, columns: int = 3, scale: str = "tile", cells: int = 9) -> Image.Image:
    """The 3 x 3 image patches of a channel beside the 3 x 3 projections."""
    left = grid(list(panel.patches), columns, side, cells=cells)
    shown = signed(panel.projections, scale) if len(panel.projections) else np.zeros((0, 3, 1, 1), np.uint8)
    right = grid([np.moveaxis(t, 0, -1) for t in shown], columns, side, cells=cells)
    margin, head = 10, 22 + (14 if panel.note else 0)
    sheet = Image.new("RGB", (left.width + right.width + 3 * margin, left.height + head + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (margin, 3), panel.title, 14, sheet.width - 2 * margin)
    if panel.note:
        write(pen, (margin, 21), panel.note, 11, sheet.width - 2 * margin, FAINT)
    sheet.paste(left, (margin, head))
    sheet.paste(right, (left.width + 2 * margin, head))
    return sheet


def montage(panels: Sequence[UnitPanel], side: int = 64, across: int = 2, scale: str = "tile") -> Image.Image:
    """Several channels' panels on one sheet, `across` beside each other."""
    if not panels:
        raise ArgumentError("montage of no panels")
    pictures = [unit_panel(p, side, scale=scale) for p in panels]
    width = max(p.width for p in pictures)
    height = max(p.height for p in pictures)
    rows = -(-len(pictures) // across)
    sheet = Image.new("RGB", (width * min(across, len(pictures)), height * rows), PAPER)
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % across * width, number // across * height))
    return sheet


def feature_maps(
    maps: np.ndarray,
    columns: int = 8,
    side: int = 56,
    scale: str = "tile",
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Maps [K,h,w] as a grid, zero mid-grey: brighter is activity, darker is below zero."""
    shown = signed(np.asarray(maps)[:, None], scale)[:, 0]
    return grid(list(shown), columns, side, labels=labels)


# ------------------------------------------------------------------------------------------------ out of here
def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG, making its folder. Same picture, same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")
    return path


def data_uri(image: Image.Image, form: str = "PNG", **options: Any) -> str:
    """The picture itself as an address, for a page or an SVG in one file; `form` and `options` as Pillow's `save` has them."""
    file = BytesIO()
    image.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
