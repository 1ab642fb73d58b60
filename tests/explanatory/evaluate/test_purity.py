"""Part interpretability against loops over pixels, and where its value is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate import Detector, Purity, purity_of_maps, purity_of_nodes
from conelens.explanatory.features import Grid

SIZE = (40, 50)
GRID = Grid((3.5, 4.5), (8.0, 10.0), (5, 5))
Y, X = np.mgrid[: SIZE[0], : SIZE[1]]


def discs(centres: np.ndarray, radius: float) -> np.ndarray:
    region = np.zeros(SIZE, bool)
    for y, x in centres:
        region |= (Y - y) ** 2 + (X - x) ** 2 <= radius**2
    return region


def by_loops(regions: list[list[np.ndarray]], parts: np.ndarray, overlap: float) -> tuple[np.ndarray, np.ndarray]:
    """association [F, P], shown [F] from regions [N][F] and parts [N, P, height, width]."""
    images, count = parts.shape[:2]
    association = np.full((len(regions[0]), count), np.nan)
    for f in range(len(regions[0])):
        for k in range(count):
            hits = []
            for i in range(images):
                if parts[i, k].any():
                    both, either = regions[i][f] & parts[i, k], regions[i][f] | parts[i, k]
                    hits.append(both.sum() / either.sum() > overlap)
            if hits:
                association[f, k] = np.mean(hits)
    shown = np.array([np.mean([regions[i][f].any() for i in range(images)]) for f in range(len(regions[0]))])
    return association, shown


def random_parts(rng: np.random.Generator, images: int) -> np.ndarray:
    """[N, 3, height, width]: a disc, a disc that is often missing, a part that no image shows."""
    parts = np.zeros((images, 3, *SIZE), bool)
    for i in range(images):
        parts[i, 0] = discs(rng.uniform(5, 35, (1, 2)), 9.0)
        if rng.random() < 0.5:
            parts[i, 1] = discs(rng.uniform(5, 35, (1, 2)), 12.0)
    return parts


def same(found: Purity, expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found.association, expected[0], atol=1e-6)
    np.testing.assert_allclose(found.shown, expected[1], atol=1e-6)
    assert found.mean == pytest.approx(np.nanmax(expected[0], axis=1).mean())
    assert found.best_part.tolist() == np.nanargmax(expected[0], axis=1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maps_equal_loops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.explanatory.evaluate.purity._BLOCK_BYTES", 2 * 4 * 12 * 25)  # two filters at a time
    rng = np.random.default_rng(0)
    features = torch.from_numpy(np.round(rng.normal(size=(12, 5, 5, 5)), 1)).to(dtype)
    features[:, 3] = -features[:, 3].abs() - 1  # never positive
    features[:, 4] = 0  # a dead filter
    parts = random_parts(rng, 12)
    found = purity_of_maps(features, GRID, lambda i: torch.from_numpy(parts[i]), 8.0, share=0.05)
    regions = []
    for i in range(12):
        row = []
        for f in range(5):
            values = features[:, f].float().numpy()
            # the smallest threshold, among 0 and the values, above which lies at most the share
            threshold = min(t for t in {0.0, *values.flat} if t >= 0 and np.mean(values > t) <= 0.05)
            assert found.threshold[f] == pytest.approx(threshold)
            row.append(discs([(3.5 + 8 * y, 4.5 + 10 * x) for y, x in np.argwhere(values[i] > threshold)], 8.0))
        regions.append(row)
    same(found, by_loops(regions, parts, 0.2))
    assert found.of_nodes[3:].tolist() == found.shown[3:].tolist() == [0, 0]
    assert 0 < found.mean < 1


def test_nodes_equal_loops() -> None:
    rng = np.random.default_rng(1)
    parts = random_parts(rng, 20)
    positions = rng.uniform(-5, 55, (20, 6, 2)).astype(np.float32)
    scores = np.round(rng.uniform(0, 1, (20, 6)), 1).astype(np.float32)
    detector = Detector("nodes", torch.from_numpy(positions), torch.from_numpy(scores))
    found = purity_of_nodes(detector, lambda i: torch.from_numpy(parts[i]), 8.0, share=0.4, overlap=0.1)
    thresholds = [np.sort(scores[:, f])[::-1][8] for f in range(6)]
    regions = [[discs(positions[i, f][None], 8.0) & (scores[i, f] > thresholds[f]) for f in range(6)] for i in range(20)]
    same(found, by_loops(regions, parts, 0.1))
    assert found.shown.max() <= 0.4 and found.mean > 0


def test_a_detector_of_the_part_is_pure_and_one_that_never_fires_is_not() -> None:
    parts = random_parts(np.random.default_rng(2), 10)
    centres = np.array([[np.argwhere(p[0]).mean(0)] * 2 for p in parts], np.float32)
    scores = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    found = purity_of_nodes(
        Detector("nodes", torch.from_numpy(centres), scores), lambda i: torch.from_numpy(parts[i]), 9.0, share=1.0
    )
    assert found.of_nodes.tolist() == [1.0, 0.0] and found.best_part[0] == 0
    assert found.association[:, 2].isnan().all()


def test_wrong_arguments_are_named() -> None:
    nodes, features = Detector("nodes", torch.zeros(2, 1, 2), torch.ones(2, 1)), torch.zeros(2, 1, 5, 5)

    def regions(image: int) -> torch.Tensor:
        return torch.ones(1, *SIZE, dtype=torch.bool)

    with pytest.raises(ArgumentError, match="radius: got 0"):
        purity_of_nodes(nodes, regions, 0, share=0.5)
    with pytest.raises(ArgumentError, match=r"share and overlap: got 0.0 and 0.2"):
        purity_of_nodes(nodes, regions, 5, share=0.0)
    with pytest.raises(ArgumentError, match=r"wanted \[N, D, 5, 5\]"):
        purity_of_maps(features[..., :4], GRID, regions, 5)
    with pytest.raises(ArgumentError, match="features: got NaN or infinity"):
        purity_of_maps(features / 0, GRID, regions, 5)
    with pytest.raises(ArgumentError, match="images: got none"):
        purity_of_maps(features[:0], GRID, regions, 5)
