"""ILSVRC 2013 DET Animal-Part as a folder of crops with one table (Zhang et al. 2018, "Interpretable Convolutional Neural
Networks").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from conelens.data import Preprocess, find_images
from conelens.errors import ArgumentError, DataError
from conelens.landmarks.parts import Mark, PartImage, PartSet
from conelens.landmarks.tables import number, rows

TABLE = "parts.csv"


def animal_part(folder: str | Path, preprocess: Preprocess | None = None, names: Sequence[str] | None = None) -> PartSet:
    """The crops of a folder and its ``parts.csv``.

    A line of the table is ``image,part,centre y,centre x,height,width``, the numbers as fractions of the crop, without a
    header. Images without a line count as not annotated; an image may have several lines for a part.

    Args:
        folder: images and ``parts.csv``.
        preprocess: input recipe (default: 224 x 224, values in 0..1).
        names: the landmarks (default: the table's parts in the order of their first line).

    Raises:
        DataError: no such folder, no table, a line that cannot be understood or that names an image that is not there.
        ArgumentError: a name that the table does not have.
    """
    root = Path(folder)
    paths = find_images(root)
    known = {path.relative_to(root).as_posix() for path in paths}
    marked: dict[str, list[Mark]] = defaultdict(list)
    lines = list(rows(root / TABLE, 6, ","))
    if lost := [(where, image) for where, (image, *_) in lines if image not in known]:
        (where, image), others = lost[0], f" (and {len(lost) - 1} more lines without an image)" if len(lost) > 1 else ""
        raise DataError(f"{where}: no image {image!r} in {root}{others}; put them back or take the lines out")
    for where, (image, part, *numbers) in lines:
        if not part:
            raise DataError(f"{where}: the name of the part is empty")
        y, x = (number(where, text, what, 0, 1) for text, what in zip(numbers, ("centre y", "centre x")))
        height, width = (number(where, text, what, 1e-6, 1.1) for text, what in zip(numbers[2:], ("height", "width")))
        marked[image].append(Mark(part, y, x, height, width))
    found = tuple(dict.fromkeys(a.part for image in marked.values() for a in image))
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise ArgumentError(f"names: got {unknown}, wanted some of {', '.join(found)} (the parts of {root / TABLE})")
    images = (PartImage(path, tuple(marked[path.relative_to(root).as_posix()])) for path in paths)
    return PartSet(images, names or found, preprocess or Preprocess())
