"""Baselines of part localisation, on features whose answer is known and against NumPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.localisation import Annotation
from conelens.explanatory.evaluate.localisation_baselines import (
    GlobalRidge,
    ImageCentre,
    LinearProbe,
    LocalTemplate,
    MeanPosition,
    NearestNeighbour,
)
from conelens.explanatory.features import Grid

GRID = Grid((7.5, 7.5), (16.0, 16.0), (6, 6))
SIZE = (96, 96)


def scenes(images: int = 15, seed: int = 0) -> tuple[Tensor, Annotation, Tensor]:
    """Features [N,8,6,6] with a part at one cell of each image among noise; the part in three of them; its centres."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(images, 8, 36, generator=generator)
    cells = torch.randint(36, (images,), generator=generator)
    features[torch.arange(images), :, cells] = torch.tensor([0.0, 0, 0, 3, 0, 4, 0, 0])
    centres = GRID.pixels(cells) + torch.tensor([3.0, -2.0])  # the part's middle is off its unit's
    annotated = torch.tensor([2, 5, 11])
    boxes = torch.cat((centres - 7, centres + 7), 1)
    return features.unflatten(2, (6, 6)).half(), Annotation(annotated, centres[annotated], boxes[annotated]), centres


def test_fixed_positions() -> None:
    _, part, _ = scenes()
    assert (ImageCentre(15, (96, 101)).locate(part) == torch.tensor([47.5, 50.0])).all()
    found = MeanPosition(15).locate(part)
    assert found.shape == (15, 2)
    torch.testing.assert_close(found[4], part.points.mean(0))


@pytest.mark.parametrize("pooled", [False, True])
def test_nearest_neighbours_by_loops(pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.explanatory.evaluate.units.BLOCK", 4 * 8 * 36)  # several blocks
    features, part, _ = scenes()
    described = features.float().numpy()
    described = described.mean((2, 3)) if pooled else described.reshape(15, -1)
    found = NearestNeighbour(features, pooled).locate(part)
    for i in range(15):
        cosines = [
            described[i] @ described[a] / np.linalg.norm(described[i]) / np.linalg.norm(described[a]) for a in part.images
        ]
        assert found[i].tolist() == part.points[int(np.argmax(cosines))].tolist()
    assert torch.equal(found[part.images], part.points)
    assert len(found.unique(dim=0)) == 3


def test_the_global_ridge_is_the_primal_one() -> None:
    features, part, _ = scenes()
    pooled = features.double().mean((2, 3)).numpy()
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    chosen = pooled[part.images]
    centred, targets = chosen - chosen.mean(0), part.points.double().numpy()
    penalty = 0.1 * (centred**2).sum(1).mean()
    weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(8), centred.T @ (targets - targets.mean(0)))
    expected = ((pooled - chosen.mean(0)) @ weights + targets.mean(0)).clip(0, 95)
    np.testing.assert_allclose(GlobalRidge(features, SIZE).locate(part).numpy(), expected, atol=1e-2)
    assert expected.std(0).min() > 3  # it does tell images apart


def test_the_global_ridge_of_equal_images_is_the_mean() -> None:
    features, part, _ = scenes()
    found = GlobalRidge(features[:1].expand_as(features), SIZE).locate(part)
    torch.testing.assert_close(found, part.points.mean(0).expand(15, 2))


def test_the_linear_probe_finds_a_linear_part() -> None:
    features, part, centres = scenes()
    found = LinearProbe(features, GRID).locate(part)
    assert ((found - centres).abs() <= torch.tensor([3.0, 2.0])).all()  # the centre of the part's own unit


def test_the_linear_probe_is_weighted_ridge() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = torch.rand(60, 8, 6, 6, generator=torch.Generator().manual_seed(3))  # no clear part: every detail counts
    points = torch.tensor([[30.0, 50.0], [60.0, 33.0], [50.0, 80.0]])
    half = torch.tensor([[25.0], [9.0], [0.5]])  # the last one holds no unit's centre
    part = Annotation(torch.tensor([2, 5, 11]), points, torch.cat((points - half, points + half), 1))
    units = features.double().flatten(2).transpose(1, 2).numpy()
    units = units / np.linalg.norm(units, axis=2, keepdims=True)
    places = GRID.pixels(torch.arange(36)).numpy()
    label = np.array(
        [[top <= y <= bottom and left <= x <= right for y, x in places] for top, left, bottom, right in part.boxes]
    )
    assert label.sum(1)[0] > label.sum(1)[1] > label.sum(1)[2] == 0
    label[2, np.linalg.norm(places - points[2].numpy(), axis=1).argmin()] = True
    label = label.ravel()
    weight = np.where(label, 0.5 / label.sum(), 0.5 / (~label).sum())
    examples = units[part.images].reshape(-1, 8)
    centred = examples - weight @ examples
    alpha = (centred.T * weight @ centred).trace() / 8
    model = linear_model.Ridge(alpha=alpha).fit(examples, np.where(label, 1.0, -1.0), sample_weight=weight)
    best = model.predict(units.reshape(-1, 8)).reshape(60, 36).argmax(1)
    assert torch.equal(LinearProbe(features, GRID).locate(part), GRID.pixels(torch.from_numpy(best)))


def test_the_local_template_carries_its_offset() -> None:
    features, part, centres = scenes()
    torch.testing.assert_close(LocalTemplate(features, GRID).locate(part), centres)


def test_local_templates_by_loops() -> None:
    features = torch.rand(10, 5, 6, 6, generator=torch.Generator().manual_seed(4))
    images, points = torch.tensor([1, 4, 8]), torch.tensor([[20.0, 33.0], [70.0, 50.0], [2.0, 90.0]])
    found = LocalTemplate(features, GRID).locate(Annotation(images, points, torch.cat((points - 5, points + 5), 1)))
    units = features.flatten(2).numpy()
    for i in range(10):
        best = (-1.0, np.zeros(2))
        for image, point in zip(images.tolist(), points.numpy()):
            own = [min(range(6), key=lambda cell, p=p: abs(7.5 + 16 * cell - p)) for p in point]
            template = units[image, :, own[0] * 6 + own[1]]
            for cell in range(36):
                unit = units[i, :, cell]
                cosine = unit @ template / np.linalg.norm(unit) / np.linalg.norm(template)
                shift = 16.0 * (np.array(divmod(cell, 6)) - own)
                best = max(best, (cosine, point + shift), key=lambda pair: pair[0])
        np.testing.assert_allclose(found[i].numpy(), best[1], rtol=1e-5)


def test_a_probe_with_nothing_to_tell_apart_answers_the_mean_position() -> None:
    features, part, _ = scenes()
    found = LinearProbe(features, GRID).locate(part._replace(boxes=torch.tensor([[0.0, 0, 96, 96]]).expand(3, 4)))
    assert torch.equal(found, part.points.float().mean(0).expand(len(features), 2))


def test_refusals() -> None:
    features, part, _ = scenes()
    with pytest.raises(ArgumentError, match="extent of the part"):
        LinearProbe(features, GRID).locate(part._replace(boxes=part.boxes * torch.nan))
    for make in (lambda: LinearProbe(features, GRID, penalty=0.0), lambda: GlobalRidge(features, SIZE, penalty=-1.0)):
        with pytest.raises(ArgumentError, match="penalty"):
            make()
    for method in (LinearProbe, LocalTemplate):
        with pytest.raises(ArgumentError, match="grid"):
            method(features[..., :5], GRID)
    broken = features.clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="NaN"):
        GlobalRidge(broken, SIZE)
    with pytest.raises(ArgumentError, match="N,D,H,W"):
        NearestNeighbour(features[0])
