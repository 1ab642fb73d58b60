"""Detectors: peaks of filters, a constant position, another image's evidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate import Detector, constant_position, raw_filters, without_evidence
from conelens.explanatory.evaluate.detectors import derangement
from conelens.explanatory.features import Grid

GRID = Grid((7.5, 3.5), (16.0, 8.0), (5, 6))


def some(images: int = 9, nodes: int = 4) -> Detector:
    generator = torch.Generator().manual_seed(images)
    scores = torch.rand(images, nodes, generator=generator) - 0.3
    return Detector("nodes", torch.rand(images, nodes, 2, generator=generator) * 50, scores.clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_filters_stand_at_their_first_maximum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.explanatory.evaluate.detectors._BLOCK_BYTES", 2 * 4 * 3 * 30)  # two images at a time
    features = torch.randint(-3, 4, (7, 3, 5, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    features[2] = -1
    found = raw_filters(features, GRID)
    for i in range(7):
        for d in range(3):
            y, x = np.unravel_index(int(features[i, d].float().numpy().argmax()), (5, 6))
            assert found.positions[i, d].tolist() == [7.5 + 16 * y, 3.5 + 8 * x]
            assert found.scores[i, d] == max(float(features[i, d].max()), 0.0)
    assert found.positions.dtype == found.scores.dtype == torch.float32


def test_a_constant_position_keeps_scores() -> None:
    nodes = some()
    centre = constant_position(nodes, (10.0, 20.0))
    assert (centre.positions == torch.tensor([10.0, 20.0])).all() and centre.scores is nodes.scores
    own = constant_position(nodes)
    for f in range(4):
        seen = nodes.scores[:, f] > 0
        torch.testing.assert_close(own.positions[:, f], nodes.positions[seen, f].mean(0).expand(9, 2))


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_derangement_moves_everyone_in_one_cycle(count: int) -> None:
    order = derangement(count, seed=5).tolist()
    place, visited = 0, []
    while place not in visited:
        visited.append(place)
        place = order[place]
    assert len(visited) == count and order == derangement(count, seed=5).tolist()
    assert count < 50 or order != derangement(count, seed=6).tolist()


def test_without_evidence_positions_are_another_images() -> None:
    nodes = some()
    other = without_evidence(nodes, seed=2)
    order = derangement(9, seed=2)
    assert torch.equal(other.positions, nodes.positions[order]) and other.scores is nodes.scores
    with pytest.raises(ArgumentError, match="got 1 images, wanted at least 2"):
        without_evidence(some(images=1))


def test_parts_of_a_detector() -> None:
    nodes = some()
    part = nodes.nodes(torch.tensor([2, 0])).images(torch.tensor([3]))
    assert torch.equal(part.positions, nodes.positions[[3]][:, [2, 0]]) and torch.equal(
        part.scores, nodes.scores[[3]][:, [2, 0]]
    )


def test_what_is_no_detector_is_refused() -> None:
    positions, scores = torch.zeros(3, 2, 2), torch.ones(3, 2)
    with pytest.raises(ArgumentError, match=r"wanted \[N, F, 2\] and \[N, F\]"):
        Detector("d", positions[:2], scores)
    with pytest.raises(ArgumentError, match="positions that are NaN"):
        Detector("d", positions / 0, scores)
    for wrong in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ArgumentError, match="scores that are NaN, infinite or negative"):
            Detector("d", positions, scores * wrong)
    with pytest.raises(ArgumentError, match=r"wanted \[N, D, 5, 6\]"):
        raw_filters(torch.zeros(2, 3, 6, 5), GRID)
