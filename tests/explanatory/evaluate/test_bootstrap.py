"""Bootstrap of location instability: equal to resampling by hand, paired, reproducible, and of the right width."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate import (
    Detector,
    Interval,
    draws,
    instability,
    interval,
    mean_over_images,
    paired_difference,
    resampled_instability,
)
from conelens.landmarks import Landmarks
from tests.explanatory.evaluate import by_loops

DIAGONAL = float(np.hypot(224, 224))


def case(seed: int, images: int = 25, nodes: int = 4, parts: int = 2) -> tuple[Detector, Landmarks, tuple[np.ndarray, ...]]:
    arrays = by_loops.random_case(np.random.default_rng(seed), images, nodes, parts)
    positions, scores, points = map(torch.from_numpy, arrays)
    names = tuple(map(str, range(parts)))
    return Detector("nodes", positions, scores), Landmarks(names, points, torch.full((images, parts, 4), torch.nan)), arrays


@pytest.mark.parametrize("selection", ["visible", "release"])
def test_equals_the_metric_on_images_that_are_really_repeated(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.explanatory.evaluate.bootstrap.BLOCK", 6 * 25 * 3)  # three nodes at a time
    detector, landmarks, arrays = case(0)
    values = resampled_instability(detector, landmarks, resamples=6, seed=4, selection=selection, top=7, nodes=4)
    for value, counts in zip(values, draws(25, 6, seed=4)):
        again = np.repeat(np.arange(25), counts.int().numpy())
        expected = by_loops.deviations(*(a[again] for a in arrays), DIAGONAL, 7, selection)
        assert float(value) == pytest.approx(np.nanmean(expected), rel=1e-4)


def test_nodes_are_drawn_with_replacement_too() -> None:
    detector, landmarks, _ = case(1, nodes=9)
    values = resampled_instability(detector, landmarks, resamples=5, seed=4, over="nodes", top=7)
    deviation = instability(detector, landmarks, top=7).deviation
    for value, counts in zip(values, draws(9, 5, seed=5)):
        assert float(value) == pytest.approx(float(deviation.repeat_interleave(counts.long(), 0).nanmean()), rel=1e-4)
    images, both = (resampled_instability(detector, landmarks, resamples=500, over=o, top=7) for o in ("images", "both"))
    assert both.std() > images.std()


def test_the_release_draws_among_its_best_nodes() -> None:
    detector, landmarks, arrays = case(2, nodes=9)
    settings = {"selection": "release", "top": 7, "nodes": 3}
    kept = torch.tensor(by_loops.best(arrays[1], 7, 3))
    alone = resampled_instability(detector.nodes(kept), landmarks, resamples=5, selection="release", top=7)
    torch.testing.assert_close(resampled_instability(detector, landmarks, resamples=5, **settings), alone)


def test_differences_are_paired() -> None:
    detector, landmarks, _ = case(3, images=60)
    same = paired_difference(detector, detector, landmarks, resamples=50)
    assert same == Interval(0.0, 0.0, 0.0) and not same.excludes_zero
    nearly = replace(detector, positions=detector.positions * 0.98 + 1)
    together = paired_difference(detector, nearly, landmarks, resamples=300)
    apart = [resampled_instability(d, landmarks, resamples=300, seed=s) for s, d in enumerate((detector, nearly))]
    assert together.high - together.low < 0.3 * float(torch.quantile(apart[0] - apart[1], 0.975) * 2)
    exact = replace(detector, positions=landmarks.points[:, :1].nan_to_num(0).expand(-1, 4, -1))
    better = paired_difference(
        exact, detector, Landmarks(("0",), landmarks.points[:, :1], landmarks.boxes[:, :1]), resamples=50
    )
    assert better.excludes_zero and better.high < 0
    assert better.estimate == pytest.approx(-instability(detector, landmarks).by_part[0].item(), abs=1e-6)


def test_same_seed_same_interval() -> None:
    detector, landmarks, _ = case(4)
    first, again, other = (resampled_instability(detector, landmarks, resamples=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_width_is_that_of_new_images() -> None:
    """The spread over resamples is close to the spread over image sets that are really drawn anew."""
    fresh = [instability(*case(seed, images=120, nodes=3, parts=1)[:2], top=40).mean for seed in range(150)]
    spreads = [
        float(resampled_instability(*case(seed, images=120, nodes=3, parts=1)[:2], top=40, resamples=200).std())
        for seed in range(10)
    ]  # fmt: skip
    assert np.mean(spreads) == pytest.approx(np.std(fresh), rel=0.25)


def test_intervals_of_means_over_images() -> None:
    values = torch.tensor([1.0, 2.0, torch.nan, 6.0])
    found = mean_over_images(values, resamples=400, seed=3, level=0.9)
    known = [np.nanmean(np.repeat(values.numpy(), c.int().numpy())) for c in draws(4, 400, seed=3) if c[[0, 1, 3]].sum()]
    assert found.estimate == 3.0
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(known, [0.05, 0.95])))
    rows = draws(50, 30, seed=1)
    assert rows.shape == (30, 50) and (rows.sum(1) == 50).all() and rows.max() > 1
    assert np.isnan(interval(1.0, torch.tensor([torch.nan])).low)


def test_wrong_arguments_are_named() -> None:
    detector, landmarks, _ = case(5)
    with pytest.raises(ArgumentError, match="over: got 'parts', wanted one of images, nodes, both"):
        resampled_instability(detector, landmarks, over="parts")
    with pytest.raises(ArgumentError, match="got 25 and 0, wanted at least 1"):
        resampled_instability(detector, landmarks, resamples=0)
    with pytest.raises(ArgumentError, match="level: got 95"):
        interval(0.0, torch.zeros(3), level=95)
