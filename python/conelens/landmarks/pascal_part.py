"""Pascal-Part: the animals of PASCAL VOC 2010 with masks of their parts (Chen et al. 2014); needs the extra 'parts' (SciPy)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conelens.data import Preprocess
from conelens.errors import ArgumentError, DataError
from conelens.landmarks.parts import Box, Mark, PartImage, PartSet

CLASSES = {"bird": 3, "cat": 8, "cow": 10, "dog": 12, "horse": 13, "sheep": 17}
LANDMARKS = ("head", "neck", "torso")

_FRONT_LEGS = ("lfuleg", "lflleg", "rfuleg", "rflleg", "lfho", "rfho")
_BACK_LEGS = ("lbuleg", "lblleg", "rbuleg", "rblleg", "lbho", "rbho")
_PETS = {
    "head": ("head", "leye", "reye", "lear", "rear", "nose", "muzzle"),
    "torso": ("torso", "neck"),
    "front legs": ("lfleg", "rfleg", "lfpa", "rfpa"),
    "back legs": ("lbleg", "rbleg", "lbpa", "rbpa"),
    "tail": ("tail",),
}
_CATTLE = {
    "head": ("head", "leye", "reye", "lear", "rear", "muzzle", "lhorn", "rhorn"),
    "torso": ("torso", "neck"),
    "front legs": _FRONT_LEGS,
    "back legs": _BACK_LEGS,
}
# parts that count as one for part interpretability (Zhang et al. 2018, "Interpretable Convolutional Neural Networks")
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "bird": {
        "head": ("head", "leye", "reye", "beak"),
        "torso": ("torso", "neck", "lwing", "rwing"),
        "legs": ("lleg", "rleg", "lfoot", "rfoot"),
        "tail": ("tail",),
    },
    "cat": _PETS,
    "dog": _PETS,
    "cow": _CATTLE,
    "horse": _CATTLE,
    "sheep": _CATTLE,
}


def pascal_part(
    annotations: str | Path, images: str | Path, category: str, preprocess: Preprocess | None = None, *,
    names: Sequence[str] = LANDMARKS, smallest_area: float = 50.0**2,
) -> PartSet:  # fmt: skip
    """Every instance of a category, cut to the box of its visible pixels.

    Later objects of an annotation occlude earlier ones; a part's landmark is the centre of the box of what is left of its mask.
    ``PartSet.regions(i, GROUPS[category])`` gives the masks of the groups that part interpretability uses.

    Args:
        annotations: folder ``Annotations_Part`` with one .mat per image; all are read, since only they know the category.
        images: folder ``JPEGImages`` with one .jpg of the same name each.
        category: "bird", "cat", "cow", "dog", "horse" or "sheep".
        preprocess: input recipe (default: 224 x 224, values in 0..1).
        names: the landmarks, by the data set's part names (the fields ``part_name``).
        smallest_area: instances in a smaller box (pixels of the file) are left out.

    Raises:
        ArgumentError: unknown category, or SciPy is not installed.
        DataError: no such folder, or a .mat that is no annotation of Pascal-Part.
    """
    if category not in CLASSES:
        raise ArgumentError(f"category: got {category!r}, wanted one of {', '.join(CLASSES)}")
    files = sorted(Path(annotations).glob("*.mat"))
    if not files:
        raise DataError(f"{annotations}: no .mat files in this folder; wanted Pascal-Part's Annotations_Part")
    found: list[PartImage] = []
    for file in files:
        image = Path(images) / f"{file.stem}.jpg"
        found += (
            PartImage(image, _annotations(parts, box), box, whole.shape, partial(_masks_of, file, number))
            for number, (kind, whole, parts) in enumerate(_objects(file))
            if kind == CLASSES[category] and (box := _box(whole)) is not None and _area(box) >= smallest_area
        )
    if not found:
        raise DataError(f"{annotations}: no {category} of at least {smallest_area:g} pixels in {len(files)} annotations")
    return PartSet(found, names, preprocess or Preprocess())


def _masks_of(file: Path, number: int) -> Mapping[str, np.ndarray]:
    return list(_objects(file))[number][2]


def _objects(file: Path) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """(class, visible mask, visible mask of each part) of the objects of an annotation, in its order."""
    objects = np.atleast_1d(_field(_load(file), "objects", file))
    masks = [_mask(o, file) for o in objects]
    if len({mask.shape for mask in masks}) > 1:
        raise DataError(f"{file}: the masks of its objects differ in size: {sorted({mask.shape for mask in masks})}")
    for number, (item, mask) in enumerate(zip(objects, masks, strict=True)):
        free = ~np.logical_or.reduce(masks[number + 1 :]) if masks[number + 1 :] else np.ones_like(mask)
        parts: dict[str, np.ndarray] = {}
        for part in np.atleast_1d(_field(item, "parts", file)):
            visible = _mask(part, file)
            if visible.shape != mask.shape:
                raise DataError(f"{file}: object {number + 1} is {mask.shape}, but its part is {visible.shape}")
            name = str(_field(part, "part_name", file))
            parts[name] = parts.get(name, False) | (visible & free)
        try:
            kind = int(_field(item, "class_ind", file))
        except (TypeError, ValueError) as error:
            raise DataError(f"{file}: class_ind of object {number + 1} is no number") from error
        yield kind, mask & free, parts


def _load(file: Path) -> Any:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ArgumentError("Pascal-Part's .mat files need SciPy: pip install 'conelens[parts]'") from error
    try:
        # structs as plain objects; nothing in such a file is executed
        content = loadmat(file, squeeze_me=True, struct_as_record=False, variable_names=["anno"])
    except Exception as error:  # SciPy raises whatever its parser trips over
        raise DataError(f"{file}: not a .mat file that SciPy can read ({error})") from error
    if "anno" not in content:
        raise DataError(f"{file}: no variable 'anno'; wanted an annotation of Pascal-Part")
    return content["anno"]


def _field(struct: Any, name: str, file: Path) -> Any:
    try:
        return getattr(struct, name)
    except AttributeError as error:
        raise DataError(f"{file}: a field {name!r} is missing; wanted an annotation of Pascal-Part") from error


def _mask(struct: Any, file: Path) -> np.ndarray:
    mask = np.asarray(_field(struct, "mask", file))
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise DataError(f"{file}: a mask has shape {mask.shape} and dtype {mask.dtype}, wanted a 2-D mask of 0 and 1")
    return mask != 0


def _box(mask: np.ndarray) -> Box | None:
    ys, xs = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(ys):
        return None
    return (float(ys[0]), float(xs[0]), float(ys[-1] + 1), float(xs[-1] + 1))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _annotations(parts: Mapping[str, np.ndarray], region: Box) -> tuple[Mark, ...]:
    found = []
    top, left, bottom, right = region
    height, width = bottom - top, right - left
    for name, mask in parts.items():
        if (box := _box(mask)) is not None:
            y, x = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            size = (box[2] - box[0]) / height, (box[3] - box[1]) / width
            found.append(Mark(name, (y - top) / height, (x - left) / width, *size))
    return tuple(found)
