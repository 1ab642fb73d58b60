"""The vote of patterns, against a search of every place in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate import Detector
from conelens.explanatory.evaluate.localisation import Annotation
from conelens.explanatory.evaluate.vote import Vote

SIZE = (120, 160)


def random_detector(images: int = 9, nodes: int = 14, seed: int = 0) -> Detector:
    rng = np.random.default_rng(seed)
    positions = rng.uniform((0, 0), SIZE, (images, nodes, 2)).astype(np.float32)
    scores = (rng.random((images, nodes)) * (rng.random((images, nodes)) > 0.2)).astype(np.float32)
    return Detector("nodes", torch.from_numpy(positions), torch.from_numpy(scores))


def annotation(images: list[int], points: list[tuple[float, float]]) -> Annotation:
    centres = torch.tensor(points)
    return Annotation(torch.tensor(images), centres, torch.cat((centres - 9, centres + 9), 1))


def heights(place: np.ndarray, votes: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    """What votes [V,2] give to places [..., 2]: [..., V]."""
    apart = place[..., None, :] - votes
    gauss = np.exp(-(apart**2).sum(-1) / (2 * sigma**2))
    return weights * gauss * (np.abs(apart) <= 2 * sigma).all(-1)


def agreed(votes: np.ndarray, weights: np.ndarray, sigma: float) -> tuple[np.ndarray, float]:
    """The best place of one image, of all whole pixels."""
    lattice = np.stack(np.meshgrid(*map(np.arange, map(float, SIZE)), indexing="ij"), -1)
    total = heights(lattice, votes, weights, sigma).sum(-1)
    best = np.unravel_index(total.argmax(), total.shape)
    return lattice[best], float(total[best])


def by_search(detector: Detector, part: Annotation, patterns: int, candidates: int, sigma: float) -> np.ndarray:
    """Vote.locate by the letter."""
    positions, scores = detector.positions.double().numpy(), detector.scores.double().numpy()
    scores = scores / np.sqrt((scores**2).mean(0))
    others = [i for i in range(len(scores)) if i not in part.images.tolist()]
    templates = []
    for a, point in zip(part.images.tolist(), part.points.double().numpy()):
        order = [v for v in np.argsort(-scores[a], kind="stable")[:candidates] if scores[a, v] > 0]
        votes = positions[:, order] + point - positions[a, order]
        weights = scores[:, order]
        middle = [agreed(votes[i], weights[i], sigma)[0] for i in others]
        near = [
            [np.exp(-((votes[i] - place) ** 2).sum(-1) / (2 * sigma**2)) for place in np.roll(middle, shift, 0)[[n]]]
            for shift in range(5)
            for n, i in enumerate(others)
        ]
        own, *elsewhere = np.array(near).reshape(5, len(others), -1)
        stability = (weights[others] * (own - np.mean(elsewhere, 0))).sum(0) / weights[others].sum(0)
        kept = np.argsort(-scores[a, order] * stability, kind="stable")[:patterns]
        places = [agreed(votes[i, kept], weights[i, kept], sigma) for i in range(len(scores))]
        templates.append([(total / places[a][1], place) for place, total in places])
    return np.array([max((t[i] for t in templates), key=lambda pair: pair[0])[1] for i in range(len(scores))])


@pytest.mark.parametrize("seed", range(2))
def test_the_vote_by_the_letter(seed: int) -> None:
    detector = random_detector(seed=seed)
    part = annotation([1, 4, 6], [(40.0, 60.0), (70.5, 30.0), (55.0, 120.0)])
    found = Vote(detector, SIZE, patterns=6, candidates=10, sigma=12.0, step=2.0).locate(part)
    expected = by_search(detector, part, 6, 10, 12.0)
    assert found.shape == (9, 2)
    np.testing.assert_allclose(found.numpy(), expected, atol=1.0)  # the search knows whole pixels


def test_a_pattern_that_follows_the_part_beats_noise() -> None:
    rng = np.random.default_rng(0)
    images, noise = 40, 60
    truth = torch.from_numpy(rng.uniform((30, 30), (90, 130), (images, 2)).astype(np.float32))
    offsets = torch.from_numpy(rng.uniform(-25, 25, (10, 2)).astype(np.float32))
    follows = truth[:, None] + offsets
    lost = torch.from_numpy(rng.uniform((0, 0), SIZE, (images, noise, 2)).astype(np.float32))
    scores = torch.from_numpy(rng.uniform(0.5, 1.0, (images, 10 + noise)).astype(np.float32))
    part = annotation([0, 1, 2], [tuple(point) for point in truth[:3].tolist()])
    found = Vote(Detector("both", torch.cat((follows, lost), 1), scores), SIZE, patterns=10).locate(part)
    torch.testing.assert_close(found, truth, atol=0.05, rtol=0.0)  # selection leaves the noise out
    alone = Vote(Detector("noise", lost, scores[:, 10:]), SIZE, patterns=10).locate(part)
    assert (alone - truth).norm(dim=1).mean() > 20


def test_patterns_that_never_move_are_not_chosen() -> None:
    # many more stand still than follow: they agree with one another in every image, and on nothing in it
    rng = np.random.default_rng(1)
    truth = torch.from_numpy(rng.uniform((20, 20), (100, 140), (40, 2)).astype(np.float32))
    still = torch.from_numpy(rng.uniform((0, 0), SIZE, (1, 6, 2)).astype(np.float32)).expand(40, 6, 2)
    nodes = Detector("mixed", torch.cat((still, truth[:, None].expand(40, 5, 2) + 3), 1), torch.ones(40, 11))
    part = annotation([0, 1, 2], [tuple(point) for point in truth[:3].tolist()])
    torch.testing.assert_close(Vote(nodes, SIZE, patterns=5, sigma=10.0).locate(part), truth, atol=0.05, rtol=0.0)


def test_the_better_template_decides() -> None:
    # patterns 0 (pose a) and 1 (pose b) both follow, each with its own displacement; each is seen in its pose only
    truth = torch.tensor([[30.0, 40.0], [60.0, 90.0], [50.0, 50.0], [80.0, 100.0], [44.0, 66.0]])
    pose = torch.tensor([0, 1, 0, 1, 1])
    positions = torch.stack((truth + torch.tensor([10.0, 0.0]), truth - torch.tensor([0.0, 20.0])), 1)
    positions[pose == 1, 0] = 5.0
    positions[pose == 0, 1] = 5.0
    scores = torch.where(torch.nn.functional.one_hot(pose, 2).bool(), 1.0, 0.05)
    part = annotation([0, 1], [(30.0, 40.0), (60.0, 90.0)])
    found = Vote(Detector("poses", positions, scores), SIZE, patterns=1).locate(part)
    torch.testing.assert_close(found, truth, atol=0.05, rtol=0.0)


def test_templates_compete_by_the_evidence_of_their_own_image() -> None:
    # template a was annotated where its pattern is weak: in image 2 it answers with three times that, b with twice its own
    positions = torch.tensor([[30.0, 40.0], [60.0, 90.0]]).expand(5, 2, 2).clone()
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [1.0, 3.0], [8.0, 1.0]])
    part = annotation([0, 1], [(35.0, 40.0), (60.0, 80.0)])
    found = Vote(Detector("two", positions, scores), SIZE, patterns=1).locate(part)
    a, b = (35.0, 40.0), (60.0, 80.0)
    expected = torch.tensor([a, b, a, b, a])
    torch.testing.assert_close(found, expected)


def test_scales_of_patterns_do_not_count() -> None:
    detector = random_detector()
    scale = torch.logspace(-3, 3, 14)
    part = annotation([0, 1, 2], [(40.0, 60.0), (70.0, 30.0), (55.0, 120.0)])
    first, second = (
        Vote(Detector("n", detector.positions, scores), SIZE, patterns=5, sigma=12.0).locate(part)
        for scores in (detector.scores, detector.scores * scale)
    )
    torch.testing.assert_close(first, second, atol=0.05, rtol=0.0)


def test_nothing_seen_in_an_image_gives_the_mean_annotation() -> None:
    detector = random_detector()
    detector.scores[5] = 0
    part = annotation([0, 1, 2], [(40.0, 60.0), (70.0, 30.0), (55.0, 120.0)])
    found = Vote(detector, SIZE, patterns=5).locate(part)
    torch.testing.assert_close(found[5], torch.tensor([55.0, 70.0]))


def test_answers_stay_within_the_image() -> None:
    detector = random_detector()
    far = Detector("far", detector.positions + 400, detector.scores)
    part = annotation([0, 1, 2], [(0.0, 0.0), (119.0, 159.0), (0.0, 159.0)])
    for one in (detector, far):
        found = Vote(one, SIZE, patterns=5).locate(part)
        assert (found >= 0).all() and (found <= torch.tensor(SIZE) - 1).all()


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = random_detector()
    part = annotation([0, 1, 2], [(40.0, 60.0), (70.0, 30.0), (55.0, 120.0)])
    whole = Vote(detector, SIZE, patterns=5).locate(part)
    monkeypatch.setattr("conelens.explanatory.evaluate.vote.BLOCK", 1)
    torch.testing.assert_close(Vote(detector, SIZE, patterns=5).locate(part), whole, atol=0.05, rtol=0.0)


def test_refusals() -> None:
    detector = random_detector()
    with pytest.raises(ArgumentError, match="candidates"):
        Vote(detector, SIZE, patterns=11, candidates=10)
    with pytest.raises(ArgumentError, match="sigma"):
        Vote(detector, SIZE, sigma=0.0)
    detector.scores[4] = 0
    vote = Vote(detector, SIZE)
    with pytest.raises(ArgumentError, match=r"no pattern scores on annotated images \[4\]"):
        vote.locate(annotation([4], [(70.0, 30.0)]))
    both = vote.locate(annotation([0, 4], [(40.0, 60.0), (70.0, 30.0)]))  # the dark one gives no template
    assert both.shape == (len(detector.scores), 2) and torch.allclose(both[0], torch.tensor([40.0, 60.0]), atol=1)
