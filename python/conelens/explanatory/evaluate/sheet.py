"""A rating page for people: do the strongest places of a node, or of its raw filter, show the same part?

The human experiment on part interpretability of Zhang et al. (2018): a region of fixed radius is drawn round each place, people
count how many of the top regions show one part. Rows of nodes and of filters come in one random order and nothing in the page
tells which is which; the key, a file of its own, does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from conelens.errors import ArgumentError, DataError
from conelens.explanatory.evaluate.bootstrap import Interval, mean_over_images
from conelens.explanatory.evaluate.detectors import Detector
from conelens.explanatory.pictures import Photographs, patch_box
from conelens.figures import GREY, cut, data_uri, enlarge

KEY_FORMAT, RATINGS_FORMAT = "conelens.sheet-key 1", "conelens.ratings 1"
KINDS = ("node", "filter")
CONTEXT = 1.5  # half side of a patch in radii
SHOWN = 150  # side of a patch on the page
MOST = 9  # patches in a row: one per digit key


class SheetFiles(NamedTuple):
    """The page for the raters, and the key that stays with whoever evaluates."""

    page: Path
    key: Path


def write_sheet(
    path: str | Path, dataset: Photographs, nodes: Detector, filters: Detector, filter_of: Tensor | None = None, *,
    count: int = 20, top: int = 9, radius: float = 35.0, parts: Sequence[str] = (), seed: int = 0,
) -> SheetFiles:  # fmt: skip
    """Write a self-contained HTML page with ``2 count`` rows to rate, and ``<page>.key.json`` beside it.

    ``count`` filters are drawn, and one node of each; a row holds the ``top`` images with the highest scores. Drawn from are
    the nodes that, like their filter, are seen in as many images.

    Args:
        path: of the page.
        dataset: the images of both detectors, in their order.
        nodes, filters: [N,F,2] and [N,D,2] pixels with scores.
        filter_of: int64 [F], the filter of each node; default: F / D nodes of each filter, filter by filter.
        radius: of the region that is judged, in pixels of the network input (the paper's patches are 70 wide).
        parts: names that the page suggests.
        seed: of the choice and the order.

    Raises:
        ArgumentError: sizes that do not fit, or too few nodes that are seen often enough.
    """
    filter_of = _filters_of(nodes, filters, filter_of)
    if len(dataset) != len(nodes.scores) or len(dataset) != len(filters.scores):
        raise ArgumentError(
            f"dataset: got {len(dataset)} images, nodes on {len(nodes.scores)} and filters on {len(filters.scores)}; "
            "wanted the same ones"
        )
    if not 2 <= top <= MOST or count < 1 or radius <= 0:
        raise ArgumentError(f"top, count, radius: got {top}, {count}, {radius}, wanted 2..{MOST}, at least 1, more than 0")
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for pair, node in enumerate(_sample(nodes, filters, filter_of, count, top, generator)):
        for kind, detector, index in zip(KINDS, (nodes, filters), (node, int(filter_of[node]))):
            images = detector.scores[:, index].sort(descending=True, stable=True).indices[:top].tolist()
            rows.append({"kind": kind, "pair": pair, "index": index, "images": images})
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    pictures = [
        [_region(dataset.frame(i), detector.positions[i, row["index"]].numpy(), radius) for i in row["images"]]
        for row in rows
        for detector in [nodes if row["kind"] == "node" else filters]
    ]
    sheet = hashlib.sha256("".join(picture for row in pictures for picture in row).encode()).hexdigest()[:16]
    page = Path(path)
    files = SheetFiles(page, page.with_name(page.name + ".key.json"))
    content = json.dumps({"format": RATINGS_FORMAT, "sheet": sheet, "parts": list(parts), "rows": pictures})
    template = Path(__file__).with_name("sheet.html").read_text(encoding="utf-8")
    page.parent.mkdir(parents=True, exist_ok=True)
    # no "<" in the data: it cannot end the element that holds it
    page.write_text(template.replace("{{ content }}", content.replace("<", "\\u003c")), encoding="utf-8")
    key = {"format": KEY_FORMAT, "sheet": sheet, "top": top, "nodes": nodes.name, "filters": filters.name, "rows": rows}
    files.key.write_text(json.dumps(key | {"radius": radius, "seed": seed}, indent=1), encoding="utf-8")
    return files


def _filters_of(nodes: Detector, filters: Detector, filter_of: Tensor | None) -> Tensor:
    count, width = nodes.scores.shape[1], filters.scores.shape[1]
    if filter_of is None:
        if not width or count % width:
            raise ArgumentError(f"filter_of: got none for {count} nodes and {width} filters, wanted the filter of each node")
        return torch.arange(count) // (count // width)
    if filter_of.shape != (count,) or int(filter_of.min()) < 0 or int(filter_of.max()) >= width:
        raise ArgumentError(f"filter_of: got {tuple(filter_of.shape)}, wanted a filter 0..{width - 1} of each of {count} nodes")
    return filter_of


def _sample(
    nodes: Detector, filters: Detector, filter_of: Tensor, count: int, top: int, generator: torch.Generator
) -> list[int]:
    """``count`` random nodes of different filters, seen (like their filters) in ``top`` images."""
    seen, filters_seen = ((d.scores > 0).sum(0) >= top for d in (nodes, filters))
    usable = (seen & filters_seen[filter_of]).nonzero()[:, 0]
    chosen: dict[int, int] = {}
    for node in usable[torch.randperm(len(usable), generator=generator)].tolist():
        chosen.setdefault(int(filter_of[node]), node)
    if len(chosen) < count:
        raise ArgumentError(
            f"count: got {count}, wanted at most {len(chosen)}, the filters with a node that is seen in {top} images; "
            "ask for fewer, or give more images"
        )
    return list(chosen.values())[:count]


def _region(frame: np.ndarray, position: np.ndarray, radius: float) -> str:
    """The surroundings of a position (y, x) as a JPEG data URI, dimmed outside of a circle."""
    side = round(2 * CONTEXT * radius)
    box = patch_box(position, side)
    patch = cut(frame, box)
    y, x = np.ogrid[box[0] : box[2], box[1] : box[3]]
    away = np.hypot(y - position[0], x - position[1])
    dimmed = patch * 0.35 + GREY * 0.65
    shown = np.where((away <= radius)[..., None], patch, dimmed)
    shown[np.abs(away - radius) < 0.8] = (255, 224, 0)
    return data_uri(enlarge(np.rint(shown).astype(np.uint8), SHOWN), "JPEG", quality=85)


# ------------------------------------------------------------------------------------------------------- read back
@dataclass(frozen=True)
class Ratings:
    """Purity as people see it: the share of a row's regions that show one part, averaged over rows.

    ``nodes`` and ``filters`` with intervals over the sampled pairs, ``difference`` (nodes minus filters) paired; ``shares``
    [pairs, 2] float64 (node, filter), averaged over raters; ``parts`` the names given to each pair's rows.
    """

    nodes: Interval
    filters: Interval
    difference: Interval
    shares: Tensor
    parts: list[tuple[list[str], list[str]]]


def read_ratings(
    path: str | Path | Sequence[str | Path], key: str | Path, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Ratings:
    """Purity of nodes and filters from the file (or files, one per rater) that the page's button saved.

    Raises:
        DataError: a file that is none, of another sheet, changed by hand, or not rated to the end.
    """
    about = _read_json(key, KEY_FORMAT)
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ArgumentError("path: got no ratings, wanted the file of at least one rater")
    try:
        cells = [(int(row["pair"]), KINDS.index(row["kind"])) for row in about["rows"]]
        top, sheet = int(about["top"]), str(about["sheet"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{key}: the key of the sheet is damaged ({error})") from error
    pairs = len(cells) // 2
    if sorted(cells) != [(pair, kind) for pair in range(pairs) for kind in (0, 1)]:
        raise DataError(f"{key}: the key of the sheet is damaged (its rows do not pair nodes with filters)")
    shares = torch.zeros(pairs, 2, dtype=torch.float64)
    parts: list[tuple[list[str], list[str]]] = [([], []) for _ in range(pairs)]
    for file in paths:
        for (pair, kind), (same, part) in zip(cells, _read_rows(file, sheet, len(cells), top)):
            shares[pair, kind] += same / top / len(paths)
            parts[pair][kind].append(part)
    columns = (shares[:, 0], shares[:, 1], shares[:, 0] - shares[:, 1])
    nodes, filters, difference = (mean_over_images(column, resamples, seed, level) for column in columns)
    return Ratings(nodes, filters, difference, shares, parts)


def _read_rows(path: str | Path, sheet: str, rows: int, top: int) -> list[tuple[int, str]]:
    """How many regions of each row show the part, and its name."""
    ratings = _read_json(path, RATINGS_FORMAT)
    if ratings.get("sheet") != sheet:
        raise DataError(f"{path}: ratings of sheet {ratings.get('sheet')!r}, wanted {sheet!r}; give the key of the same page")
    try:
        given = {int(row["row"]): (list(map(int, row["same"])), str(row["part"])) for row in ratings["rows"]}
        lines = [f"{row}:{','.join(map(str, same))}:{part}" for row, (same, part) in given.items()]
        checksum = _checksum("\n".join([sheet, *lines]))
        valid = len(given) == len(ratings["rows"]) and all(
            0 <= row < rows and same == sorted(set(same)) and set(same) <= set(range(1, top + 1))
            for row, (same, _) in given.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: the ratings are damaged ({error})") from error
    if not valid or ratings.get("checksum") != checksum:
        raise DataError(f"{path}: the ratings were changed after the page saved them; save them again from the page")
    missing = sorted(set(range(rows)) - set(given))
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {rows} rows are not rated (the first is {missing[0] + 1}); "
            "open the page in the same browser, which has kept the others, and rate them"
        )
    return [(len(given[row][0]), given[row][1]) for row in range(rows)]


def _read_json(path: str | Path, wanted: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != wanted:
        raise DataError(f"{path}: not a file of the format {wanted!r}")
    return content


def _checksum(text: str) -> int:
    """32-bit FNV-1a of the UTF-8 bytes, as the page computes it: shows slips and edits, proves nothing."""
    value = 0x811C9DC5
    for byte in text.encode("utf-8"):
        value = (value ^ byte) * 0x01000193 % 2**32
    return value
