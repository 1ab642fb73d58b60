"""CUB-200-2011: birds with 15 marked points, from the data set's text files (Wah et al. 2011)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from conelens.data import Preprocess, image_size
from conelens.errors import ArgumentError, DataError
from conelens.landmarks.parts import Box, Mark, PartImage, PartSet
from conelens.landmarks.tables import file_below, number, rows

# the papers' landmarks by the data set's names: its forehead stands for the head
LANDMARKS = {"head": "forehead", "back": "back", "tail": "tail"}
SPLITS = {"train": ("1",), "test": ("0",), "all": ("0", "1")}


def cub200(
    folder: str | Path, split: str = "test", preprocess: Preprocess | None = None, *,
    landmarks: Mapping[str, str] = LANDMARKS, smallest_area: float = 50.0**2,
) -> PartSet:  # fmt: skip
    """The birds of a split, each cut to its bounding box (clipped to the image), as one category.

    Args:
        folder: ``CUB_200_2011``, with images.txt, train_test_split.txt, bounding_boxes.txt, parts/ and images/.
        split: "train", "test" or "all".
        preprocess: input recipe (default: 224 x 224, values in 0..1).
        landmarks: name of a landmark -> name of the part in parts/parts.txt.
        smallest_area: birds in a smaller box (pixels of the file) are left out.

    An image whose header cannot be read keeps its place; reading it raises DataError, which engines report and skip.

    Raises:
        DataError: a missing file, or a line that cannot be understood.
        ArgumentError: an unknown split or part.
    """
    if split not in SPLITS:
        raise ArgumentError(f"split: got {split!r}, wanted one of {', '.join(SPLITS)}")
    root = Path(folder)
    parts = {number_: name for _, (number_, name) in rows(root / "parts" / "parts.txt", 2)}
    missing = [part for part in landmarks.values() if part not in parts.values()]
    if missing:
        raise ArgumentError(f"landmarks: got the parts {missing}, wanted some of {', '.join(parts.values())}")
    paths = {i: file_below(root / "images", where, name) for where, (i, name) in rows(root / "images.txt", 2)}
    boxes = _boxes(root / "bounding_boxes.txt")
    points = _points(root / "parts" / "part_locs.txt", parts)
    names = {part: name for name, part in landmarks.items()}
    images = []
    for where, (i, flag) in rows(root / "train_test_split.txt", 2):
        if flag not in SPLITS["all"]:
            raise DataError(f"{where}: the split is {flag!r}, wanted 1 (train) or 0 (test)")
        if i not in paths or i not in boxes:
            raise DataError(f"{where}: image {i} is missing in images.txt or bounding_boxes.txt")
        if flag in SPLITS[split]:
            top, left, bottom, right = box = _clipped(boxes[i], paths[i])
            height, width = bottom - top, right - left
            if height > 0 and width > 0 and height * width >= smallest_area:
                marked = tuple(Mark(names.get(part, part), (y - top) / height, (x - left) / width) for part, y, x in points[i])
                images.append(PartImage(paths[i], marked, box))
    return PartSet(images, tuple(landmarks), preprocess or Preprocess())


def _boxes(path: Path) -> dict[str, Box]:
    boxes = {}
    for where, (i, *texts) in rows(path, 5):
        x, y = (number(where, text, what) for text, what in zip(texts, ("x", "y")))
        width, height = (number(where, text, what, 0) for text, what in zip(texts[2:], ("width", "height")))
        boxes[i] = (y, x, y + height, x + width)
    return boxes


def _points(path: Path, parts: Mapping[str, str]) -> dict[str, list[tuple[str, float, float]]]:
    """Image id -> (part, y, x) of the parts that can be seen."""
    points: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for where, (i, part, x, y, visible) in rows(path, 5):
        if part not in parts:
            raise DataError(f"{where}: part {part!r} is not in parts.txt")
        if visible not in ("0", "1"):
            raise DataError(f"{where}: visible is {visible!r}, wanted 0 or 1")
        if visible == "1":
            points[i].append((parts[part], number(where, y, "y"), number(where, x, "x")))
    return points


def _clipped(box: Box, path: Path) -> Box:
    """The box within its image; as it is where the image cannot be read, which reading it will say."""
    try:
        height, width = image_size(path)
    except DataError:
        return box
    return (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(height)), min(box[3], float(width)))
