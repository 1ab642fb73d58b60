"""The experiment: draws, distances, rates, intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate import Detector
from conelens.explanatory.evaluate.localisation import Annotation, Localisation, instances, localise
from conelens.explanatory.evaluate.vote import Vote
from conelens.landmarks import Landmarks

SIZE = (90, 120)
DIAGONAL = 150.0
PARTS = ("head", "leg")


@dataclass
class Says:
    """A method that answers the same whatever is annotated, and remembers what was."""

    name: str
    answer: Tensor

    def __post_init__(self) -> None:
        self.asked: list[Annotation] = []

    def locate(self, part: Annotation) -> Tensor:
        self.asked.append(part)
        return self.answer


def truth(images: int = 12, hidden: tuple[int, ...] = (3, 7), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points [N,2,2] and boxes (10 high, 20 wide) of two parts; the second is absent from ``hidden`` images."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(images, 2, 2, generator=generator) * torch.tensor([70.0, 90.0]) + 10
    points[list(hidden), 1] = torch.nan
    half = torch.tensor([5.0, 10.0])
    return points, torch.cat((points - half, points + half), 2)


def test_a_node_that_follows_the_part_has_distance_0_and_rate_1() -> None:
    points, boxes = truth(hidden=())
    nodes = points[:, :1] + torch.tensor([-7.0, 11.0])
    vote = Vote(Detector("exact", nodes, torch.rand(12, 1) + 0.5), SIZE, patterns=1)
    row = localise([vote], points[:, :1], boxes[:, :1], ["head"], SIZE).table()[0]
    assert row.distance.estimate == pytest.approx(0, abs=1e-4) and row.distance.high < 1e-4
    assert row.rate == (1.0, 1.0, 1.0)


def test_distances_and_rates_by_loops() -> None:
    points, boxes = truth()
    answer = points.nan_to_num(30.0)[:, 0] + torch.linspace(-14, 14, 12)[:, None]
    says = Says("shifted", answer)
    found = localise([says], points, boxes, PARTS, SIZE, repeats=4)
    assert found.annotated.shape == (2, 4, 3) and found.distance.shape == found.inside.shape == (1, 2, 4, 12)
    for p in range(2):
        for r in range(4):
            asked = says.asked[4 * p + r]
            assert torch.equal(asked.images, found.annotated[p, r])
            torch.testing.assert_close(asked.points, points[asked.images, p].double())
            torch.testing.assert_close(asked.boxes, boxes[asked.images, p].double())
            for i in range(12):
                away, inside = found.distance[0, p, r, i], found.inside[0, p, r, i]
                if i in asked.images or (p == 1 and i in (3, 7)):
                    assert away.isnan() and inside.isnan()
                    continue
                y, x = (answer[i] - points[i, p]).tolist()
                assert away == pytest.approx(np.hypot(y, x) / DIAGONAL, rel=1e-5)
                assert inside == float(abs(y) <= 5 and abs(x) <= 10)
    rows = {row.part: row for row in found.table(samples=50)}
    for p, part in enumerate(PARTS):
        assert rows[part].distance.estimate == pytest.approx(float(np.nanmean(found.distance[0, p])))
        assert rows[part].rate.estimate == pytest.approx(float(np.nanmean(found.inside[0, p])))
    assert rows["mean"].distance.estimate == pytest.approx((rows["head"].distance.estimate + rows["leg"].distance.estimate) / 2)


def test_of_several_instances_the_nearest_counts() -> None:
    points, boxes = truth(6, hidden=())
    both = torch.stack((points, points + torch.tensor([0.0, 25.0])), 2)
    both[:3, :, 1] = torch.nan  # half of the images have one instance
    areas = torch.stack((boxes, boxes + torch.tensor([0.0, 25.0, 0.0, 25.0])), 2)
    areas[:3, :, 1] = torch.nan
    says = Says("beside", points[:, 0] + torch.tensor([0.0, 20.0]))
    annotated = torch.tensor([[[0, 5]], [[0, 5]]])
    found = localise([says], both, areas, PARTS, SIZE, annotated=annotated)
    assert torch.equal(says.asked[0].points, points[[0, 5], 0].double())  # the first one is the annotation
    torch.testing.assert_close(found.distance[0, 0, 0, 1:5] * DIAGONAL, torch.tensor([20.0, 20, 5, 5]).double())
    assert found.inside[0, 0, 0, 1:5].tolist() == [0, 0, 1, 1]


def test_instances_of_landmarks() -> None:
    points, boxes = truth(5, hidden=(3,))
    pair = torch.tensor([[0.0, 0, 10, 20], [30, 40, 50, 70]])
    points[2, 1], boxes[2, 1] = torch.nan, torch.nan  # as the readers leave it where there are several
    all_points, all_boxes = instances(Landmarks(PARTS, points, boxes, SIZE, {(2, 1): pair}))
    assert all_points.shape == (5, 2, 2, 2) and all_boxes.shape == (5, 2, 2, 4)
    assert all_points[2, 1].tolist() == [[5, 10], [40, 55]] and torch.equal(all_boxes[2, 1], pair)
    torch.testing.assert_close(all_points[:2, :, 0], points[:2])
    assert all_points[:2, :, 1].isnan().all() and points[2, 1].isnan().all()
    single, _ = instances(Landmarks(PARTS, points, boxes, SIZE))
    torch.testing.assert_close(single, points[:, :, None], equal_nan=True)


def test_draws_are_seeded_different_and_have_the_part() -> None:
    points, boxes = truth(30, hidden=tuple(range(10)))
    says = Says("any", torch.zeros(30, 2))
    first, again, other = (localise([says], points, boxes, PARTS, SIZE, seed=seed).annotated for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(len(set(images)) == 3 for images in first.flatten(0, 1).tolist())
    assert first[1].min() >= 10 and len(first[0].unique()) > 12


def test_every_method_gets_the_same_annotations_and_the_difference_is_paired() -> None:
    points, boxes = truth(40, hidden=())
    spread = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) * 60
    near = Says("near", points[:, 0] + spread * 0.6)
    far = Says("far", points[:, 0] + spread * 0.6 + 1.5)
    found = localise([near, far], points, boxes, PARTS, SIZE)
    assert all(torch.equal(a.images, b.images) for a, b in zip(near.asked, far.asked, strict=True))
    rows = {(row.method, row.part): row.distance for row in found.table(samples=300)}
    assert rows["near", "head"].high > rows["far", "head"].low  # alone, the intervals overlap
    difference = found.against("near", samples=300)[0]
    assert (difference.method, difference.part) == ("far", "head")
    assert difference.distance.high < 0  # paired, near is nearer
    expected = rows["near", "head"].estimate - rows["far", "head"].estimate
    assert difference.distance.estimate == pytest.approx(expected)


def test_the_bootstrap_by_loops() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((1, 2, 5, 30)) + rng.random((1, 2, 5, 1)) + rng.random((1, 1, 1, 30))
    values[0, 1, :, :4] = np.nan
    values[0, 0, 2, 5] = np.nan
    distance = torch.from_numpy(values)
    rows = Localisation(("m",), PARTS, torch.zeros(2, 5, 3, dtype=torch.int64), distance, distance).table(samples=4000)
    means = []
    for _ in range(2000):
        images = rng.integers(30, size=30)
        parts = [np.nanmean(values[0, p][rng.integers(5, size=5)][:, images]) for p in range(2)]
        means.append([*parts, np.mean(parts)])
    expected = np.quantile(means, (0.025, 0.975), axis=0).T
    for row, (low, high) in zip(rows, expected, strict=True):
        width = high - low
        assert row.distance == row.rate
        assert abs(row.distance.low - low) < 0.08 * width and abs(row.distance.high - high) < 0.08 * width


def test_parts_without_boxes_have_no_rate() -> None:
    points, boxes = truth()
    row = localise([Says("any", torch.zeros(12, 2))], points, boxes * torch.nan, PARTS, SIZE).table(samples=20)[0]
    assert np.isnan(row.rate.estimate) and row.distance.estimate > 0


def test_refusals() -> None:
    points, boxes = truth(12, hidden=tuple(range(3, 12)))
    says = Says("any", torch.zeros(12, 2))
    with pytest.raises(ArgumentError, match="'leg': got 3 images that have it, wanted 3 to annotate and at least one"):
        localise([says], points, boxes, PARTS, SIZE)
    points, boxes = truth()
    wrong: list[tuple[list[list[list[int]]], str]] = [
        ([[[0, 1, 2]], [[0, 1, 3]]], r"absent from \[3\]"),
        ([[[0, 1, 1]], [[0, 1, 2]]], "different ones"),
        ([[[0, 1, 12]], [[0, 1, 2]]], r"absent from \[12\]"),
        ([[[0, 1, 2]]], "wanted int64"),
        ([[list(range(12))], [list(range(12))]], "every image"),
    ]
    for annotated, told in wrong:
        with pytest.raises(ArgumentError, match=told):
            localise([says], points, boxes, PARTS, SIZE, annotated=torch.tensor(annotated))
    with pytest.raises(ArgumentError, match="its own name"):
        localise([says, says], points, boxes, PARTS, SIZE)
    with pytest.raises(ArgumentError, match="without NaN"):
        localise([Says("lost", torch.full((12, 2), torch.nan))], points, boxes, PARTS, SIZE)
    with pytest.raises(ArgumentError, match=r"wanted \[12, 2\]"):
        localise([Says("short", torch.zeros(11, 2))], points, boxes, PARTS, SIZE)
    with pytest.raises(ArgumentError, match="points and boxes"):
        localise([says], points, boxes[:, :1], PARTS, SIZE)
    with pytest.raises(ArgumentError, match="points and boxes"):
        localise([says], points, boxes, ["head"], SIZE)
    with pytest.raises(ArgumentError, match="shots"):
        localise([says], points, boxes, PARTS, SIZE, shots=0)
    found = localise([says], points, boxes, PARTS, SIZE)
    with pytest.raises(ArgumentError, match="wanted one of any"):
        found.against("other")
