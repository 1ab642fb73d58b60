"""Pascal-Part: annotations written as MATLAB files, occlusion, boxes and masks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conelens.errors import ArgumentError, DataError
from conelens.landmarks import pascal_part
from conelens.landmarks.pascal_part import GROUPS
from tests.landmarks.dots import PLAIN, centroid, spot

io = pytest.importorskip("scipy.io")
CAT, DOG = 8, 12


def mask(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    result = np.zeros((120, 160), np.uint8)
    result[top:bottom, left:right] = 1
    return result


def record(kind: int, whole: np.ndarray, **parts: np.ndarray) -> dict[str, Any]:
    marked = np.zeros(len(parts), [("part_name", object), ("mask", object)])
    for i, item in enumerate(parts.items()):
        marked[i] = item
    return {"class": "animal", "class_ind": kind, "mask": whole, "parts": marked}


def write(path: Path, *objects: dict[str, Any]) -> None:
    """As MATLAB does: a struct `anno` whose `objects` is an array of structs."""
    rows = np.zeros((1, len(objects)), [(name, object) for name in ("class", "class_ind", "mask", "parts")])
    for i, item in enumerate(objects):
        rows[0, i] = tuple(item.values())
    path.parent.mkdir(exist_ok=True)
    io.savemat(path, {"anno": {"imname": path.stem, "objects": rows}})


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("2008_000001", "2008_000002"):
        spot(tmp_path / "images" / f"{name}.jpg", 120, 160, 40.0, 50.0)
    whole = mask(20, 30, 100, 130)
    cat = record(CAT, whole, head=mask(30, 40, 50, 60), leye=mask(35, 45, 38, 48), torso=mask(50, 30, 100, 130))
    # in front of the cat: hides the lower rows of its torso
    write(tmp_path / "anno" / "2008_000001.mat", cat, record(DOG, mask(90, 0, 120, 160)))
    small = record(CAT, mask(0, 0, 40, 40), head=mask(0, 0, 9, 9))
    write(tmp_path / "anno" / "2008_000002.mat", small, record(CAT, whole, neck=mask(40, 50, 60, 90)))
    return tmp_path / "anno", tmp_path / "images"


def test_an_instance_is_cut_to_what_is_visible_of_it(folders: tuple[Path, Path]) -> None:
    parts = pascal_part(*folders, "cat", PLAIN)
    assert len(parts) == 2 and parts.landmarks.names == ("head", "neck", "torso")
    assert parts.images[0].region == (20.0, 30.0, 90.0, 130.0)
    np.testing.assert_allclose(parts.landmarks.points[0, 0], centroid(parts.frame(0)), atol=0.3)
    # the torso's visible rows are 50..90 of 20..90
    torso = (np.array([30, 0, 70, 100]) / [70, 100, 70, 100] * [60, 80, 60, 80] - 0.5).tolist()
    assert parts.landmarks.boxes[0, 2].tolist() == pytest.approx(torso)
    assert parts.landmarks.points[:, 1].isnan().any(1).tolist() == [True, False]
    assert parts.label(1) == "2008_000002.jpg [20, 30, 100, 130]"
    assert len(pascal_part(*folders, "cat", smallest_area=100.0)) == 3


def test_masks_of_groups_leave_out_what_is_hidden(folders: tuple[Path, Path]) -> None:
    parts = pascal_part(*folders, "cat", PLAIN)
    head, torso, *rest = parts.regions(0, GROUPS["cat"])
    assert [bool(r.any()) for r in rest] == [False, False, False]
    rows = torso.any(1).nonzero()[:, 0]
    assert rows.min() == round(30 / 70 * 60) and rows.max() == 59
    assert head.sum() == pytest.approx(20 * 20 * (60 / 70) * (80 / 100), rel=0.1)


def test_an_image_of_another_size_is_refused(folders: tuple[Path, Path]) -> None:
    spot(folders[1] / "2008_000001.jpg", 60, 80, 20.0, 25.0)
    with pytest.raises(DataError, match=r"60x80.*marked on 120x160"):
        _ = pascal_part(*folders, "cat")[0]


def test_a_wrong_annotation_is_named(folders: tuple[Path, Path]) -> None:
    annotations, images = folders
    whole = mask(0, 0, 100, 100)
    wrong: list[tuple[dict[str, Any], str]] = [
        (record(CAT, whole, head=np.ones((3, 3), np.uint8)), r"object 1 is \(120, 160\), but its part is \(3, 3\)"),
        (record(CAT, whole.astype(float)), "a mask has shape"),
        (record(CAT, whole) | {"class_ind": "cat"}, "class_ind of object 1 is no number"),
    ]
    for item, message in wrong:
        write(annotations / "2008_000001.mat", item)
        with pytest.raises(DataError, match=message):
            pascal_part(annotations, images, "cat")
    write(annotations / "2008_000001.mat", record(CAT, whole), record(CAT, whole[:50]))
    with pytest.raises(DataError, match="differ in size"):
        pascal_part(annotations, images, "cat")
    for content, message in (({"other": 1}, "no variable 'anno'"), ({"anno": {"imname": "x"}}, "field 'objects' is missing")):
        io.savemat(annotations / "2008_000001.mat", content)
        with pytest.raises(DataError, match=f"2008_000001.mat: .*{message}"):
            pascal_part(annotations, images, "cat")
    for broken in (b"", b"no mat file" * 50):
        (annotations / "2008_000001.mat").write_bytes(broken)
        with pytest.raises(DataError, match="not a"):
            pascal_part(annotations, images, "cat")


def test_what_is_missing_is_named(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="category: got 'zebra'"):
        pascal_part(*folders, "zebra")
    with pytest.raises(DataError, match="no bird of at least 2500 pixels in 2 annotations"):
        pascal_part(*folders, "bird")
    with pytest.raises(DataError, match=r"no \.mat files"):
        pascal_part(tmp_path, folders[1], "cat")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ArgumentError, match=r"pip install 'conelens\[parts\]'"):
        pascal_part(*folders, "cat")
