"""CUB-200-2011: its text files, in miniature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conelens.errors import ArgumentError, DataError
from conelens.landmarks import cub200
from tests.landmarks.dots import PLAIN, centroid, spot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2, 3, 4):
        spot(tmp_path / "images" / "001.Bird" / f"b{number}.jpg", 120, 160, 60.0, 100.0)
    tables = {
        "images.txt": "".join(f"{i} 001.Bird/b{i}.jpg\n" for i in (1, 2, 3, 4)),
        "train_test_split.txt": "1 0\n2 1\n3 0\n4 0\n",
        # the second of the test images reaches out of its picture, the third is too small
        "bounding_boxes.txt": "1 60.0 40.0 80.0 60.0\n2 0 0 160 120\n3 80.0 -10.0 200.0 100.0\n4 60.0 40.0 20.0 20.0\n",
        "parts/parts.txt": "1 back\n6 forehead\n7 left eye\n14 tail\n",
        "parts/part_locs.txt": "1 1 100.0 60.0 1\n1 6 70.0 50.0 1\n1 14 0.0 0.0 0\n3 1 100.0 60.0 1\n3 7 90.0 20.0 1\n",
    }
    (tmp_path / "parts").mkdir()
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_landmarks_are_points_in_the_clipped_box(folder: Path) -> None:
    parts = cub200(folder, preprocess=PLAIN)
    assert [parts.source(i).name for i in range(len(parts))] == ["b1.jpg", "b3.jpg"]
    assert parts.landmarks.names == ("head", "back", "tail")
    assert parts.images[1].region == (0.0, 80.0, 90.0, 160.0)
    for i in (0, 1):
        np.testing.assert_allclose(parts.landmarks.points[i, 1], centroid(parts.frame(i)), atol=0.3)
    assert parts.landmarks.points[0, 0].tolist() == pytest.approx([10 / 60 * 60 - 0.5, 10 / 80 * 80 - 0.5])
    assert parts.landmarks.points[0, 2].isnan().all(), "a tail that is not visible"
    assert parts.landmarks.boxes.isnan().all()


def test_splits_and_other_parts(folder: Path) -> None:
    assert [cub200(folder, split).label(0)[:2] for split in ("train", "test", "all")] == ["b2", "b1", "b1"]
    assert len(cub200(folder, "all")) == 3 and len(cub200(folder, smallest_area=400.0)) == 3
    eye = cub200(folder, preprocess=PLAIN, landmarks={"eye": "left eye"}).landmarks
    assert eye.points[1, 0].tolist() == pytest.approx([20 / 90 * 60 - 0.5, 10 / 80 * 80 - 0.5])
    with pytest.raises(ArgumentError, match=r"\['beak'\], wanted some of back, forehead, left eye, tail"):
        cub200(folder, landmarks={"beak": "beak"})
    with pytest.raises(ArgumentError, match="split: got 'val'"):
        cub200(folder, "val")


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("bounding_boxes.txt", "2 1.0 2.0 3.0", r"bounding_boxes.txt:1: got 4 fields"),
        ("bounding_boxes.txt", "1 1.0 2.0 -3.0 4.0", r"bounding_boxes.txt:1: width is -3.0"),
        ("bounding_boxes.txt", "2 1.0 2.0 3.0 4.0", r"split.txt:1: image 1 is missing"),
        ("train_test_split.txt", "1 2", r"split.txt:1: the split is '2'"),
        ("images.txt", "1 ../../secret.jpg", r"images.txt:1: '../../secret.jpg' leads out"),
        ("images.txt", "1 /etc/secret.jpg", r"images.txt:1: '/etc/secret.jpg' leads out"),
        ("parts/part_locs.txt", "1 99 1.0 2.0 1", r"part_locs.txt:1: part '99'"),
        ("parts/part_locs.txt", "1 6 1.0 2.0 yes", r"part_locs.txt:1: visible is 'yes'"),
        ("parts/part_locs.txt", "1 6 x 2.0 1", r"part_locs.txt:1: x is 'x'"),
    ],
)
def test_a_line_that_means_nothing_is_named(folder: Path, table: str, line: str, message: str) -> None:
    (folder / table).write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        cub200(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "images" / "001.Bird" / "b3.jpg").unlink()
    parts = cub200(folder)
    assert len(parts) == 2
    with pytest.raises(DataError, match=r"b3.jpg: no such file"):
        _ = parts[1]
    (folder / "bounding_boxes.txt").unlink()
    with pytest.raises(DataError, match=r"bounding_boxes.txt: no such file"):
        cub200(folder)
