"""Parts in pixels of the network input: where the picture shows them, through crops, views and masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conelens.errors import ArgumentError, DataError
from conelens.landmarks import Landmarks, Mark, PartImage, PartSet, jittered
from tests.landmarks.dots import PLAIN, centroid, spot

NAN = float("nan")


def cropped(tmp_path: Path, count: int = 1) -> PartSet:
    """An object at rows 20..80, columns 30..130 of a 100 x 150 image; its part is at (50, 70), 12 x 20 pixels."""
    path = spot(tmp_path / "spot.png", 100, 150, 50.0, 70.0)
    mark = Mark("spot", 0.5, 0.4, 0.2, 0.2)
    return PartSet([PartImage(path, (mark,), (20.0, 30.0, 80.0, 130.0))] * count, ("spot",), PLAIN)


def test_the_landmark_is_where_the_picture_shows_the_part(tmp_path: Path) -> None:
    parts = cropped(tmp_path)
    np.testing.assert_allclose(parts.landmarks.points[0, 0], centroid(parts.frame(0)), atol=0.1)
    assert parts.landmarks.points[0, 0].tolist() == [0.5 * 60 - 0.5, 0.4 * 80 - 0.5]
    assert parts.landmarks.boxes[0, 0].tolist() == pytest.approx([23.5, 23.5, 35.5, 39.5])
    assert parts.landmarks.size == (60, 80) and parts.landmarks.diagonal == 100.0


def test_items_are_network_input(tmp_path: Path) -> None:
    parts = cropped(tmp_path)
    recipe = replace(PLAIN, mean=(0.1, 0.2, 0.3), fit="crop")
    item = PartSet(parts.images, parts.names, recipe)[0]
    assert item.shape == (3, 60, 80) and item.dtype == torch.float32
    np.testing.assert_allclose(item[1], parts.frame(0)[..., 1] / 255 - 0.2, atol=1e-6)
    assert parts.source(0).name == "spot.png" and parts.label(0) == "spot.png [20, 30, 80, 130]"


def test_landmarks_move_along_with_a_jittered_view(tmp_path: Path) -> None:
    parts = jittered(cropped(tmp_path, 20), seed=3)
    for i in range(20):
        np.testing.assert_allclose(parts.landmarks.points[i, 0], centroid(parts.frame(i)), atol=0.15)
    assert parts.landmarks.points[:, 0].std(0).min() > 2, "the part stays in its place"


def test_views_depend_on_seed_and_image_alone(tmp_path: Path) -> None:
    parts = cropped(tmp_path, 5)
    views = [item.view for item in jittered(parts, seed=1).images]
    assert len(set(views)) == 5
    assert [item.view for item in jittered(parts.take([0, 1]), seed=1).images] == views[:2]
    assert [item.view for item in jittered(parts, seed=2).images] != views
    for top, left, bottom, right in views:
        assert bottom - top == pytest.approx(right - left) and 0.8 <= bottom - top <= 1
        assert min(top, left) >= 0 and max(bottom, right) <= 1


def test_a_part_that_the_view_leaves_out_is_gone() -> None:
    marks = (Mark("in", 0.5, 0.5, 0.1, 0.1), Mark("out", 0.05, 0.5, 0.2, 0.2), Mark("out", 0.6, 0.6, 0.1, 0.1))
    image = PartImage(Path("x.png"), marks, view=(0.1, 0.1, 0.9, 0.9))
    landmarks = PartSet([image], ("in", "out"), PLAIN).landmarks
    torch.testing.assert_close(landmarks.points[0, 0], torch.tensor([29.5, 39.5]))
    torch.testing.assert_close(landmarks.points[0, 1], torch.tensor([0.625 * 60 - 0.5, 0.625 * 80 - 0.5]))
    assert not landmarks.several, "one of two is out of view"


def test_a_part_just_outside_the_crop_counts_as_long_as_the_whole_crop_is_seen() -> None:
    image = PartImage(Path("x.png"), (Mark("beak", -0.01, 0.5),))
    torch.testing.assert_close(PartSet([image], ("beak",), PLAIN).landmarks.points[0, 0], torch.tensor([-1.1, 39.5]))


def test_several_instances_are_no_landmark_but_the_nearest_can_be_asked_for() -> None:
    image = PartImage(Path("x.png"), (Mark("eye", 0.25, 0.25, 0.1, 0.2), Mark("eye", 0.25, 0.75, 0.1, 0.1)))
    landmarks = PartSet([PartImage(Path("y.png"), ()), image], ("eye",), PLAIN).landmarks
    assert landmarks.points.isnan().all() and landmarks.boxes.isnan().all()
    assert landmarks.several[1, 0].shape == (2, 4)
    points, boxes = landmarks.nearest(torch.tensor([[[0.0, 0.0]], [[10.0, 70.0]]]))
    assert points[0].isnan().all()
    torch.testing.assert_close(points[1, 0], torch.tensor([14.5, 59.5]))
    torch.testing.assert_close(boxes[1, 0], torch.tensor([11.5, 55.5, 17.5, 63.5]))
    assert landmarks.take([1]).several.keys() == {(0, 0)}


def test_regions_are_filled_boxes_of_the_group() -> None:
    marks = (Mark("a", 0.5, 0.5, 0.5, 0.25), Mark("b", 0.1, 0.1, 0.4, 0.4))
    parts = PartSet([PartImage(Path("x.png"), marks)], ("a", "c"), PLAIN)
    expected = np.zeros((60, 80), bool)
    expected[15:45, 30:50] = True
    regions = parts.regions(0)
    assert regions.dtype == torch.bool and not regions[1].any()
    np.testing.assert_array_equal(regions[0], expected)
    expected[:18, :24] = True
    np.testing.assert_array_equal(parts.regions(0, {"both": ("a", "b")})[0], expected)


def test_masks_are_read_at_the_pixels_shown(tmp_path: Path) -> None:
    y, x = np.mgrid[:100, :150]
    mask = (y + 0.5 - 50) ** 2 + (x + 0.5 - 70) ** 2 <= 100
    image = replace(cropped(tmp_path).images[0], masks=lambda: {"spot": mask})
    for parts in (PartSet([image], ("spot",), PLAIN), jittered(PartSet([image], ("spot",), PLAIN))):
        region = parts.regions(0)[0].numpy()
        middle = np.argwhere(region).mean(0)
        np.testing.assert_allclose(middle, parts.landmarks.points[0, 0], atol=0.5)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    parts = cropped(tmp_path)
    with pytest.raises(DataError, match=r"100x150.*marked on 10x10"):
        _ = PartSet([replace(parts.images[0], size=(10, 10))], ("spot",), PLAIN)[0]
    with pytest.raises(DataError, match="no such file"):
        _ = PartSet([PartImage(tmp_path / "none.png")], ("spot",), PLAIN)[0]
    with pytest.raises(ArgumentError, match="'p' is a point"):
        PartSet([PartImage(Path("x.png"), (Mark("p", 0.5, 0.5),))], ("p",), PLAIN).regions(0)
    with pytest.raises(ArgumentError, match="smallest: got 0"):
        jittered(parts, smallest=0.0)
    with pytest.raises(ArgumentError, match="points: got shape"):
        Landmarks(("a",), torch.zeros(3, 2), torch.zeros(3, 1, 4))
    with pytest.raises(ArgumentError, match="boxes: got shape"):
        Landmarks(("a",), torch.zeros(3, 1, 2), torch.zeros(2, 1, 4))
