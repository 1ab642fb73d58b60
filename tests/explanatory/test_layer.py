"""What a layer expects of an image is the papers' product of Gaussians, and what it finds is the best unit under it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from conelens.explanatory.features import Grid
from conelens.explanatory.fit import first_layer_state
from conelens.explanatory.layer import GraphLayer, Parents
from conelens.explanatory.rules import FORMS, Rules

GRID = Grid((1.5, 3.5), (4.0, 8.0), (6, 5))


def two_layers(seed: int = 0) -> tuple[GraphLayer, GraphLayer, torch.Tensor]:
    """An upper layer of 3 x 2 nodes, found in 4 images, and a lower one of 2 x 3 nodes with 4 parents each; float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    upper = GraphLayer("upper", GRID, draw(3, 2, 2) * 20, 2 + 4 * draw(3, 2), 5 + draw(3, 2), draw(3, 2, 2) * 20)
    edges = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(6)]).view(2, 3, 4)
    lower = GraphLayer("lower", GRID, draw(2, 3, 2) * 20, 2 + draw(2, 3), 3 + draw(2, 3), draw(2, 3, 2), edges, draw(2, 3, 4))
    positions = upper.anchor + 6 * (draw(4, 3, 2, 2) - 0.5)
    sigma = upper.sigma.flatten()[edges]
    return replace(lower, prior_sigma=sigma.square().reciprocal().mean(-1).rsqrt()), upper, positions


@pytest.mark.parametrize(("weight", "power"), [("geometric", "all"), ("agreement", "own"), ("release", "own")])
def test_the_density_is_the_product_of_the_parents(weight: str, power: str) -> None:
    lower, upper, positions = two_layers()
    rules = Rules(weight=weight)
    assert lower.edges is not None
    nodes = lower.edges.unique()
    expected = lower.expect(rules, 4, Parents.of(upper, nodes, positions.flatten(1, 2)[:, nodes]))
    assert expected.shift is not None
    places = np.random.default_rng(1).uniform(0, 30, (5, 2))
    logs = []
    for image in range(4):
        for d in range(2):
            for k in range(3):
                # eq. 2 of the papers: one Gaussian per parent, around mu_V - mu_V' + p_V', to the power 1 / M
                product = 0.0
                for parent in lower.edges[d, k].tolist():
                    around = lower.mean[d, k] - upper.anchor.flatten(0, 1)[parent] + positions.flatten(1, 2)[image, parent]
                    variance = float(upper.sigma.flatten()[parent]) ** 2
                    product = product + multivariate_normal(around.numpy(), variance).logpdf(places) / 4
                centre = lower.mean[d, k] + expected.shift[image, d, k]
                squares = ((places - centre.numpy()) ** 2).sum(1)
                ours = expected.weight[image, d, k].log().item() - squares / (2 * expected.sigma[d, k].item() ** 2)
                logs.append(ours - product)
    differences = np.array(logs).reshape(4, 6, 5)
    if power == "all":
        np.testing.assert_allclose(differences, 0, atol=1e-12)
        return
    # other weights change a node's density by one factor, the same at every place and in every image
    np.testing.assert_allclose(differences, differences[:1, :, :1] * np.ones_like(differences), atol=1e-12)
    sigma = upper.sigma.flatten()[lower.edges].flatten(0, 1)
    whole = -2 * sigma.log().mean(-1) - math.log(2 * math.pi)
    if weight == "agreement":
        factor = -(2 * math.pi * expected.sigma.flatten().square()).log() - whole
    else:
        factor = expected.sigma.flatten().log() - sigma.log().sum(-1) - whole
        factor = factor - factor.mean() + differences[0, :, 0].mean()  # up to one factor for all nodes
    np.testing.assert_allclose(differences[0, :, 0], factor.numpy(), atol=1e-12)


def test_noise_is_a_tenth_of_the_nodes_mean_mass_or_absolute() -> None:
    lower, upper, positions = two_layers()
    nodes = torch.arange(6)
    parents = Parents.of(upper, nodes, positions.flatten(1, 2))
    expected = lower.expect(FORMS["recommended"], 4, parents)
    # the mass of a node: its density summed over the cells of an endless map
    y = np.arange(-400, 400) * GRID.step[0]
    x = np.arange(-400, 400) * GRID.step[1]
    mass = np.zeros((4, 6))
    for image in range(4):
        for node in range(6):
            sigma = expected.sigma.flatten()[node].item()
            cells = np.exp(-(y[:, None] ** 2 + x**2) / (2 * (10 * sigma) ** 2)).sum() / 100  # finer cells: the integral
            mass[image, node] = expected.weight[image].flatten()[node].item() * cells
    np.testing.assert_allclose(expected.tau.numpy(), 0.1 * mass.mean(1), rtol=1e-6)
    assert lower.expect(FORMS["paper"], 4, parents).tau.tolist() == [0.1 / 32] * 4


def test_an_image_in_which_no_parents_agree_has_a_likelihood() -> None:
    """Two parents 600 pixels apart, spreads of 2: their agreement is exp(-22500), below any float."""
    layer = first_layer_state("layer", GRID, 1, 3, 0)
    layer = replace(layer, edges=torch.tensor([[[0, 1]] * 3]), strength=torch.ones(1, 3, 2))
    apart = torch.tensor([[[-300.0, 0.0], [300.0, 0.0]]])
    parents = Parents(apart, torch.tensor([2.0, 2.0]), torch.arange(2), torch.arange(2))
    found = layer.find(torch.rand(1, 1, 6, 5).half(), layer.expect(Rules(), 1, parents), Rules(), argmax=True)
    assert bool(torch.isfinite(found.log_likelihood).all()) and bool(torch.isfinite(found.mass).all())


def test_top_nodes_expect_the_same_everywhere() -> None:
    _, upper, _ = two_layers()
    expected = upper.expect(Rules(), 3, None)
    assert expected.shift is None and expected.weight.shape == (3, 3, 2)
    torch.testing.assert_close(expected.weight[2], 1 / (2 * math.pi * upper.prior_sigma**2))


def test_a_node_is_where_activity_times_density_is_largest() -> None:
    lower, upper, positions = two_layers()
    features = torch.rand(4, 2, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    features[1, 0] = 0
    nodes = torch.arange(6)
    parents = Parents.of(upper, nodes, positions.flatten(1, 2))
    expected = lower.expect(Rules(), 4, parents)
    placement, centres = lower.place(features, parents, Rules())
    assert expected.shift is not None
    for image in range(4):
        for d in range(2):
            for k in range(3):
                centre, best = (
                    lower.mean[d, k] + expected.shift[image, d, k],
                    (0.0, centre_of(lower, expected, image, d, k), 0.0),
                )
                for y in range(6):
                    for x in range(5):
                        place = torch.tensor([1.5 + 4 * y, 3.5 + 8 * x], dtype=torch.float64)
                        density = torch.exp(-(place - centre).square().sum() / (2 * expected.sigma[d, k] ** 2))
                        score = float(features[image, d, y, x] * expected.weight[image, d, k] * density)
                        if score > best[0]:
                            best = (score, place, float(features[image, d, y, x]))
                assert float(placement.scores[image, d, k]) == pytest.approx(best[0], rel=1e-12)
                torch.testing.assert_close(placement.positions[image, d, k].double(), best[1], rtol=1e-6, atol=1e-5)
                assert float(placement.activations[image, d, k]) == best[2]
    assert placement.scores[1, 0].tolist() == [0, 0, 0]
    found = lower.find(features, expected, Rules(), argmax=False)
    owned = found.first / found.mass[..., None].clamp(min=1e-8)
    torch.testing.assert_close(centres, lower.mean + expected.shift + owned)
    assert torch.equal(lower.place(features, parents, Rules(parents="unit"))[1], placement.positions)


def centre_of(layer: GraphLayer, expected, image: int, d: int, k: int) -> torch.Tensor:
    return layer.mean[d, k] + expected.shift[image, d, k]
