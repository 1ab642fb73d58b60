"""parts.csv: what its lines mean, and what is said of lines that mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conelens.data import iter_batches
from conelens.errors import ArgumentError, DataError
from conelens.landmarks import animal_part
from tests.landmarks.dots import PLAIN, centroid, spot

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "animal_part" / "cat"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (y, x) in enumerate([(30, 40), (50, 20), (10, 10)], 1):
        spot(tmp_path / f"{number}.jpg", 100, 80, y, x)
    (tmp_path / "parts.csv").write_text(
        "2.jpg,head,0.5,0.25,0.2,0.5\n\n1.jpg,leg,0.9,0.5,0.1,0.1\n1.jpg, head,0.3,0.5,0.1,0.1\n"
    )
    return tmp_path


def test_parts_are_fractions_of_the_crop(folder: Path) -> None:
    parts = animal_part(folder, PLAIN)
    assert parts.landmarks.names == ("head", "leg") and len(parts) == 3
    for i in (0, 1):
        np.testing.assert_allclose(parts.landmarks.points[i, 0], centroid(parts.frame(i)), atol=0.2)
    assert parts.landmarks.points[2].isnan().all() and parts.landmarks.points[1, 1].isnan().all()
    assert parts.landmarks.boxes[1, 0].tolist() == pytest.approx([23.5, -0.5, 35.5, 39.5])
    assert animal_part(folder, PLAIN, ["leg"]).landmarks.names == ("leg",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1.jpg,head,0.5,0.5,0.1", r"parts.csv:2: got 5 fields"),
        ("1.jpg,head,0.5,zero,0.1,0.1", r"parts.csv:2: centre x is 'zero'"),
        ("1.jpg,head,nan,0.5,0.1,0.1", r"parts.csv:2: centre y is nan"),
        ("1.jpg,head,1.5,0.5,0.1,0.1", r"parts.csv:2: centre y is 1.5.*0 to 1"),
        ("1.jpg,head,0.5,0.5,0.1,0", r"parts.csv:2: width is 0"),
        ("9.jpg,head,0.5,0.5,0.1,0.1", r"parts.csv:2: no image '9.jpg'"),
        ("../1.jpg,head,0.5,0.5,0.1,0.1", r"parts.csv:2: no image '../1.jpg'"),
        ("1.jpg,,0.5,0.5,0.1,0.1", r"parts.csv:2: the name of the part is empty"),
        ("1.jpg,head,0.5,0.5,0.1,0.1,7", r"parts.csv:2: width is '0.1,7'"),
    ],
)
def test_a_line_that_means_nothing_is_named(folder: Path, line: str, message: str) -> None:
    (folder / "parts.csv").write_text(f"1.jpg,head,0.5,0.5,0.1,0.1\n{line}\n")
    with pytest.raises(DataError, match=message):
        animal_part(folder)


def test_lines_without_images_are_counted(folder: Path) -> None:
    lost = "".join(f"{number}.jpg,head,0.5,0.5,0.1,0.1\n" for number in (7, 8, 9))
    (folder / "parts.csv").write_text("1.jpg,head,0.5,0.5,0.1,0.1\n" + lost)
    with pytest.raises(DataError, match=r"parts.csv:2: no image '7.jpg' .*\(and 2 more lines without an image\)"):
        animal_part(folder)


def test_missing_files_and_names_are_named(folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"got \['tail'\], wanted some of head, leg"):
        animal_part(folder, names=["tail"])
    (folder / "parts.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        animal_part(folder)
    (folder / "parts.csv").unlink()
    with pytest.raises(DataError, match=r"parts.csv: no such file"):
        animal_part(folder)
    with pytest.raises(DataError, match="no such folder"):
        animal_part(folder / "none")


def test_an_image_that_does_not_decode_is_named_and_skipped(folder: Path) -> None:
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:300])
    problems = []
    batches = list(iter_batches(animal_part(folder, PLAIN), on_problem=lambda i, error: problems.append((i, str(error)))))
    assert [i for batch in batches for i in batch.indices] == [0, 2]
    assert len(problems) == 1 and problems[0][0] == 1 and "2.jpg" in problems[0][1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/animal_part")
def test_the_cats_of_animal_part() -> None:
    parts = animal_part(SHARED)
    assert len(parts) == 529 and parts.landmarks.names == ("head", "front_legs")
    known = ~parts.landmarks.points.isnan().any(2)
    assert known.sum(0).tolist() == [192, 130]
    assert list(parts.landmarks.several) == [(137, 0)]
    first = torch.tensor([0.33036 * 224 - 0.5, 0.65848 * 224 - 0.5])
    torch.testing.assert_close(parts.landmarks.points[0, 0], first)
    assert parts[0].shape == (3, 224, 224)
