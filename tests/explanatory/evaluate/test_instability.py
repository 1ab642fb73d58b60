"""Location instability against loops, and where its value is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate import Detector, instability
from conelens.landmarks import Landmarks
from tests.explanatory.evaluate import by_loops

SELECTIONS = ("visible", "release")


def landmarks(points: np.ndarray | torch.Tensor) -> Landmarks:
    points = torch.as_tensor(points)
    names = tuple(f"part {k}" for k in range(points.shape[1]))
    return Landmarks(names, points, torch.full((*points.shape[:2], 4), torch.nan))


def detector(positions: np.ndarray | torch.Tensor, scores: np.ndarray | torch.Tensor) -> Detector:
    return Detector("nodes", torch.as_tensor(positions), torch.as_tensor(scores))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("images", "nodes", "parts", "top"), [(40, 7, 3, 10), (12, 30, 1, 20), (5, 3, 2, 2), (1, 2, 1, 5)])
def test_equals_loops(selection: str, images: int, nodes: int, parts: int, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["conelens.explanatory.evaluate.instability"]  # behind the function of the same name
    monkeypatch.setattr(module, "BLOCK", 3 * images)  # three nodes at a time
    case = by_loops.random_case(np.random.default_rng(images), images, nodes, parts)
    result = instability(detector(*case[:2]), landmarks(case[2]), selection=selection, top=top, nodes=4)
    expected = by_loops.deviations(*case, 224 * np.sqrt(2), top, selection)
    np.testing.assert_allclose(result.deviation, expected, rtol=1e-5, atol=1e-8)
    kept = by_loops.best(case[1], top, 4)
    assert result.nodes.tolist() == kept
    if not np.isnan(expected[kept]).all():
        assert result.mean == pytest.approx(np.nanmean(expected[kept]), rel=1e-5)
    assert result.skipped == np.isnan(expected[kept]).sum()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_names_the_images_it_used(selection: str) -> None:
    positions, scores, points = by_loops.random_case(np.random.default_rng(7), 30, 5, 2)
    result = instability(detector(positions, scores), landmarks(points), selection=selection, top=8)
    for f in range(5):
        for k in range(2):
            expected = by_loops.selected(scores[:, f], ~np.isnan(points[:, k, 0]), 8, selection)
            used = result.images[f, k]
            assert used[: len(expected)].tolist() == expected and (used[len(expected) :] == -1).all()
            distances = np.hypot(*(positions[expected, f] - points[expected, k]).T) / np.hypot(224, 224)
            np.testing.assert_allclose(result.distances[f, k, : len(expected)], distances, rtol=1e-5)
            assert result.distances[f, k, len(expected) :].isnan().all()


def test_a_detector_of_the_part_itself_is_at_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(50, 1, 2, generator=generator) * 224
    offset = torch.tensor([[0.0, 0.0], [30.0, -12.0]])
    result = instability(detector(points + offset, torch.ones(50, 2)), landmarks(points))
    torch.testing.assert_close(result.deviation, torch.zeros(2, 1), atol=1e-6, rtol=0)


def test_two_uniform_points_are_at_0_175() -> None:
    generator = torch.Generator().manual_seed(0)
    positions, points = (torch.rand(2000, n, 2, generator=generator) * 224 for n in (50, 1))
    result = instability(detector(positions, torch.rand(2000, 50, generator=generator)), landmarks(points), top=2000)
    assert result.mean == pytest.approx(0.175, abs=0.002)


def test_distance_is_measured_in_diagonals_of_the_input() -> None:
    points = torch.zeros(2, 1, 2)
    marks = Landmarks(("part",), points, torch.full((2, 1, 4), torch.nan), size=(30, 40))
    result = instability(detector(torch.tensor([[[0.0, 10.0]], [[0.0, 20.0]]]), torch.ones(2, 1)), marks)
    assert result.mean == pytest.approx(np.std([0.2, 0.4], ddof=1))


def test_an_unseen_node_and_an_unseen_part_are_skipped_and_counted() -> None:
    points = torch.rand(6, 2, 2)
    points[1:, 1] = torch.nan  # the second part is seen once
    scores = torch.ones(6, 2)
    scores[1:, 1] = 0  # the second node is seen once
    result = instability(detector(torch.rand(6, 2, 2), scores), landmarks(points))
    assert result.deviation.isnan().tolist() == [[False, True], [True, True]]
    assert result.skipped == 3 and result.mean == pytest.approx(float(result.deviation[0, 0]))
    nothing = instability(detector(torch.rand(6, 2, 2), torch.zeros(6, 2)), landmarks(points))
    assert np.isnan(nothing.mean) and nothing.skipped == 4


def test_the_releases_numbers_are_the_defaults() -> None:
    positions, scores, points = by_loops.random_case(np.random.default_rng(3), 150, 200, 1, hidden=0.0)
    scores += 0.1
    visible, release = (instability(detector(positions, scores), landmarks(points), selection=s) for s in SELECTIONS)
    assert visible.images.shape[2] == 100 and len(visible.nodes) == 200
    assert release.images.shape[2] == 20 and release.nodes.tolist() == by_loops.best(scores, 20, 167)
    torch.testing.assert_close(release.by_part, release.deviation[release.nodes].mean(0))


def test_wrong_arguments_are_named() -> None:
    marks, nodes = landmarks(torch.rand(4, 1, 2)), detector(torch.rand(4, 1, 2), torch.ones(4, 1))
    with pytest.raises(ArgumentError, match="selection: got 'best', wanted one of visible, release"):
        instability(nodes, marks, selection="best")
    with pytest.raises(ArgumentError, match="has 4 images, but there are landmarks of 3"):
        instability(nodes, marks.take([0, 1, 2]))
    for settings in ({"top": 0}, {"nodes": 0}):
        with pytest.raises(ArgumentError, match="wanted at least 1"):
            instability(nodes, marks, **settings)
