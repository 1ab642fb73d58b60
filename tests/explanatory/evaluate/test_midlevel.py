"""Mid-level patterns: clusters of unit feature vectors, found again in every image."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens.errors import ArgumentError, ConelensError
from conelens.explanatory.evaluate import Detector
from conelens.explanatory.evaluate.midlevel import kmeans_patterns, strongest_unit_patterns
from conelens.explanatory.evaluate.units import unit_blocks
from conelens.explanatory.features import Grid

GRID = Grid((7.5, 3.5), (16.0, 8.0), (5, 6))
KINDS = [kmeans_patterns, strongest_unit_patterns]
pytest.importorskip("sklearn")


def planted(images: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [N,9,5,6] of three strong directions, each at one cell of every image [N,3], over weak noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.zeros(3, 9)
    for k in range(3):
        directions[k, 3 * k : 3 * k + 3] = torch.tensor([1.0, 2.0, 0.5])
    features = 0.02 * torch.rand(images, 9, 30, generator=generator)
    cells = torch.stack([torch.randperm(30, generator=generator)[:3] for _ in range(images)])
    strength = 1 + torch.rand(images, 3, generator=generator)
    for i in range(images):
        for k in range(3):
            features[i, :, cells[i, k]] += strength[i, k] * directions[k]
    return features.unflatten(2, (5, 6)).half(), cells


def test_strongest_units_find_planted_directions() -> None:
    features, cells = planted()
    found = strongest_unit_patterns(features, GRID, 3, per_image=3)
    expected = GRID.pixels(cells)
    # clusters come in any order: each follows one direction in every image
    follows = [[bool((found.positions[:, c] == expected[:, k]).all()) for k in range(3)] for c in range(3)]
    assert sorted(row.index(True) for row in follows) == [0, 1, 2]
    for c, row in enumerate(follows):
        units = features.float().flatten(2)[torch.arange(12), :, cells[:, row.index(True)]]
        torch.testing.assert_close(found.scores[:, c], units.norm(dim=1), rtol=1e-3, atol=0.0)  # cosine 1, to the noise


def by_scikit_learn(features: np.ndarray, chosen: list[np.ndarray], means: object, among: list[np.ndarray]) -> Iterator[Any]:
    """(image, cluster, cell, score) of clusters of the ``chosen`` cells of each image, found ``among`` cells of each."""
    units = features.reshape(*features.shape[:2], -1).transpose(0, 2, 1)
    lengths = np.linalg.norm(units, axis=2)
    directions = units / lengths[..., None]
    centroids = means.fit(np.concatenate([directions[i, cells] for i, cells in enumerate(chosen)])).cluster_centers_  # type: ignore[attr-defined]
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    for i, cells in enumerate(among):
        for c, centroid in enumerate(centroids):
            cosines = {cell: float(directions[i, cell] @ centroid) for cell in cells}
            cell = max(cosines, key=lambda candidate: cosines[candidate])
            yield i, c, cell, cosines[cell] * lengths[i, cell]


@pytest.mark.parametrize("make", KINDS)
def test_patterns_by_the_letter(make: object) -> None:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    features = np.random.default_rng(1).random((6, 4, 5, 6)).astype(np.float32)
    lengths = np.linalg.norm(features.reshape(6, 4, 30), axis=1)
    strongest = list(np.argsort(-lengths, axis=1, kind="stable")[:, :7])
    everything = [np.arange(30)] * 6
    if make is kmeans_patterns:
        found = kmeans_patterns(torch.from_numpy(features), GRID, 5)
        means = MiniBatchKMeans(5, batch_size=4096, random_state=0, n_init=1, init="random")
        expected = by_scikit_learn(features, everything, means, everything)
    else:
        found = strongest_unit_patterns(torch.from_numpy(features), GRID, 5, per_image=7)
        expected = by_scikit_learn(features, strongest, KMeans(5, random_state=0, n_init=1, init="random"), strongest)
    for i, c, cell, score in expected:
        assert found.positions[i, c].tolist() == [7.5 + 16 * (cell // 6), 3.5 + 8 * (cell % 6)]
        assert found.scores[i, c] == pytest.approx(score, rel=1e-5)


def test_no_more_units_than_the_sample_are_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.cluster import MiniBatchKMeans

    given: list[np.ndarray] = []
    fit = MiniBatchKMeans.fit
    monkeypatch.setattr(MiniBatchKMeans, "fit", lambda self, x: (given.append(x), fit(self, x))[1])
    features, _ = planted()
    kmeans_patterns(features, GRID, 4, sample=50)
    units = torch.nn.functional.normalize(features.float().flatten(2), dim=1).transpose(1, 2).flatten(0, 1)
    nearest = torch.cdist(torch.from_numpy(given[0]), units).min(1)
    assert given[0].shape == (50, 9) and len(nearest.indices.unique()) == 50 and nearest.values.max() < 1e-3


@pytest.mark.parametrize("make", KINDS)
def test_seeds_and_train_images(make: object) -> None:
    features = torch.rand(10, 6, 5, 6, generator=torch.Generator().manual_seed(3))
    first, again, other = (make(features, GRID, 6, seed=seed) for seed in (1, 1, 2))  # type: ignore[operator]
    assert torch.equal(first.positions, again.positions) and torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)
    train = torch.tensor([0, 2, 5])
    changed = features.clone()
    changed[7] = torch.rand(6, 5, 6)
    one, two = (make(f, GRID, 6, train=train) for f in (features, changed))  # type: ignore[operator]
    rest = torch.arange(10) != 7
    assert torch.equal(one.scores[rest], two.scores[rest])  # an image outside of train changes no centroid
    assert not torch.equal(one.scores[7], two.scores[7])


@pytest.mark.parametrize("make", KINDS)
def test_an_image_without_activation_scores_nothing(make: object) -> None:
    features, _ = planted()
    features[4] = 0
    found: Detector = make(features, GRID, 3)  # type: ignore[operator]
    assert (found.scores[4] == 0).all() and (found.scores[5] > 0).all()


@pytest.mark.parametrize("make", KINDS)
def test_refusals(make: object) -> None:
    features, _ = planted()
    broken, negative = features.clone(), features.clone()
    broken[3, 2, 1, 1] = torch.nan
    negative[0, 0, 0, 0] = -1
    wrong = [
        ((broken, GRID, 3), {}, "NaN"),
        ((negative, GRID, 3), {}, "negative"),
        ((features[0], GRID, 3), {}, "N,D,H,W"),
        ((features.int(), GRID, 3), {}, "int32"),
        ((features, GRID, 0), {}, "clusters"),
        ((features * 0, GRID, 3), {}, "active units"),
        ((features, GRID, 3), {"train": torch.tensor([12])}, "train"),
    ]
    for arguments, options, told in wrong:
        with pytest.raises(ArgumentError, match=told):
            make(*arguments, **options)  # type: ignore[operator]
    with pytest.raises(ArgumentError, match=r"1\.\.30"):
        strongest_unit_patterns(features, GRID, 3, per_image=31)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConelensError, match=r"conelens\[evaluate\]"):
        kmeans_patterns(planted()[0], GRID, 3)


def test_blocks_hold_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = planted()
    monkeypatch.setattr("conelens.explanatory.evaluate.units.BLOCK", 5 * 9 * 30)
    blocks = list(unit_blocks(features))
    assert [len(block) for block in blocks] == [5, 5, 2]
    assert torch.equal(torch.cat(blocks), features.float().flatten(2))
    assert torch.equal(torch.cat(list(unit_blocks(features, torch.tensor([7, 1])))), features[[7, 1]].float().flatten(2))
