"""Learning: likelihoods that never fall, closed-form steps that are maxima, sums that add up, parts that are found."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.mixture import GaussianMixture
from torch import nn

import conelens
from conelens.errors import ArgumentError
from conelens.explanatory.features import Features, Grid
from conelens.explanatory.fit import LayerFit, choose_candidates, first_layer_state
from conelens.explanatory.graph import ExplanatoryGraph
from conelens.explanatory.layer import GraphLayer, Parents, Placement
from conelens.explanatory.rules import FORMS, Rules, preset_layers
from conelens.explanatory.statistics import Summary
from tests.kit.planted import LOWER, UPPER, PlantedNet, planted

GRID = Grid((3.5, 3.5), (8.0, 8.0), (9, 7))


def double(layer: GraphLayer) -> GraphLayer:
    wide = {
        name: value.double()
        for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return replace(layer, **wide)


def noisy(
    images: int = 6, channels: int = 3, nodes: int = 4, parents: int = 8, seed: int = 0
) -> tuple[GraphLayer, torch.Tensor, Parents]:
    """A layer, features and parents made of noise, float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(images, channels, *GRID.size, generator=generator, dtype=torch.float64).pow(4)
    features[features < 0.05] = 0
    layer = double(first_layer_state("layer", GRID, channels, nodes, seed))
    displacement = 6 * torch.randn(images, parents, 2, generator=generator, dtype=torch.float64)
    sigma = 4 + 4 * torch.rand(parents, generator=generator, dtype=torch.float64)
    return layer, features, Parents(displacement, sigma, torch.arange(parents), torch.arange(parents))


@pytest.mark.parametrize("form", ["recommended", "paper"])
def test_likelihood_never_falls_while_the_edges_stand(form: str) -> None:
    layer, features, parents = noisy()
    fit = LayerFit(layer, features, FORMS[form], 3, parents)
    fit.update(fit.statistics(), 1)  # chooses parents
    layer.history.clear()
    for iteration in range(25):
        fit.move(fit.statistics(), iteration + 2)
    steps = np.diff(layer.history)
    assert (steps >= -1e-13).all() and steps.sum() > 1e-4


def test_damped_steps_climb_too() -> None:
    layer, features, parents = noisy()
    fit = LayerFit(layer, features, replace(FORMS["recommended"], damped=True), 3, parents)
    fit.update(fit.statistics(), 1)
    layer.history.clear()
    for iteration in range(25):
        fit.move(fit.statistics(), iteration + 2)
    assert (np.diff(layer.history) >= -1e-13).all() and layer.history[-1] > layer.history[0]


def test_the_closed_form_step_is_the_maximum_of_the_expected_likelihood() -> None:
    """Expected complete log-likelihood sum q F log N(p; mu + shift, sigma~^2) by SciPy, posteriors fixed (§2.4)."""
    layer, features, parents = noisy()
    fit = LayerFit(layer, features, Rules(), 3, parents)
    fit.update(fit.statistics(), 1)
    expected = layer.expect(fit.rules, len(features), parents)
    y, x = (GRID.start[a] + GRID.step[a] * np.arange(GRID.size[a]) for a in (0, 1))
    places = np.stack(np.meshgrid(y, x, indexing="ij"), -1)
    d, k = 1, 2
    assert expected.shift is not None

    def centre(image: int, node: int) -> np.ndarray:
        return (layer.mean[d, node] + expected.shift[image, d, node]).numpy()

    owned = []
    for image in range(len(features)):
        density = []
        for node in range(4):
            squares = ((places - centre(image, node)) ** 2).sum(-1)
            density.append(
                float(expected.weight[image, d, node]) * np.exp(-squares / (2 * float(expected.sigma[d, node]) ** 2))
            )
        posterior = density[k] / (sum(density) + float(expected.tau[image]))
        owned.append(posterior * features[image, d].numpy())

    def loss(mean: np.ndarray) -> float:
        total = 0.0
        for image in range(len(features)):
            around = mean + expected.shift[image, d, k].numpy()
            total += (owned[image] * ((places - around) ** 2).sum(-1)).sum() / (2 * float(expected.sigma[d, k]) ** 2)
        return total

    best = minimize(loss, layer.mean[d, k].numpy(), method="BFGS", options={"gtol": 1e-10}).x
    fit.move(fit.statistics(), 2)
    np.testing.assert_allclose(layer.mean[d, k].numpy(), best, atol=1e-5)


def test_a_top_layer_without_noise_is_a_gaussian_mixture() -> None:
    """scikit-learn on the same points, as many of them as there is activity; variance and weights fixed."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randint(0, 4, (5, 1, *GRID.size), generator=generator).double()
    layer = double(first_layer_state("top", GRID, 1, 3, seed=2))
    fit = LayerFit(layer, features, Rules(noise=0.0), 1, None)
    y, x = np.nonzero(np.ones(GRID.size))
    count = features.sum((0, 1)).numpy().astype(int)[y, x]
    points = np.repeat(np.stack((3.5 + 8.0 * y, 3.5 + 8.0 * x), -1), count, 0)
    variance = float(layer.prior_sigma[0, 0]) ** 2
    mixture = GaussianMixture(3, covariance_type="spherical")
    mixture.weights_ = np.full(3, 1 / 3)
    mixture.means_ = layer.mean[0].numpy().copy()
    mixture.covariances_ = np.full(3, variance)
    mixture.precisions_cholesky_ = 1 / np.sqrt(mixture.covariances_)
    for iteration in range(8):
        total = fit.statistics()
        owned = mixture.predict_proba(points)
        np.testing.assert_allclose(total.mass.numpy(), owned.sum(0), rtol=1e-12)
        # ours has no 1/K in front of the densities
        assert total.likelihood == pytest.approx(mixture.score_samples(points).sum() + len(points) * np.log(3), rel=1e-12)
        fit.move(total, iteration + 1)
        mixture.means_ = owned.T @ points / owned.sum(0)[:, None]
        np.testing.assert_allclose(layer.mean[0].numpy(), mixture.means_, rtol=1e-12)
    spread = np.array([(owned[:, k] @ ((points - mixture.means_[k]) ** 2).sum(1)) / owned[:, k].sum() / 2 for k in range(3)])
    # the variance around the mean that moved, with the posteriors from before
    low, high = layer.least_sigma()
    np.testing.assert_allclose(layer.sigma[0].numpy(), np.clip(np.sqrt(spread), low, high), rtol=1e-10)


@pytest.mark.parametrize("form", list(FORMS))
def test_statistics_of_parts_add_up_in_any_order(form: str) -> None:
    layer, features, parents = noisy(images=7)
    rules = FORMS[form]
    whole = LayerFit(layer, features, rules, 3, parents)
    whole.update(whole.statistics(), 1)
    cuts = [(4, 7), (0, 1), (1, 4)]
    parts = [LayerFit(layer, features[a:b], rules, 3, parents.part(a, b), first_image=a).statistics() for a, b in cuts]
    total, merged = whole.statistics(), (parts[0] + parts[1]) + parts[2]
    for name, value in vars(total).items():
        other = getattr(merged, name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-10)
    assert merged.likelihood == pytest.approx(total.likelihood, rel=1e-12)
    for index in (1, 2):
        found = [torch.cat([part[index] for part in each.seen]) for each in (total, merged) if each.seen]
        assert not found or torch.equal(*found)
    one, other = replace(layer, history=[]), replace(layer, history=[])
    LayerFit(one, features, rules, 3, parents).update(total, 2)
    LayerFit(other, features, rules, 3, parents).update(merged, 2)
    torch.testing.assert_close(one.mean, other.mean)
    assert one.edges is not None and other.edges is not None and torch.equal(one.edges, other.edges)


def over_workers(
    features: Features, cuts: list[tuple[int, int]], counts: dict[str, int], edges: int, iterations: int, rules: Rules
) -> list[dict[str, GraphLayer]]:
    """A whole fit of which every worker sees but its own images; what is passed around are Statistics and Summaries."""
    shards = [features.part(*cut) for cut in cuts]
    learned: list[dict[str, GraphLayer]] = [{} for _ in cuts]
    parents: list[Parents | None] = [None for _ in cuts]
    for number, name in enumerate(features.layers[::-1]):
        fits = []
        for worker, (shard, (start, _)) in enumerate(zip(shards, cuts, strict=True)):
            layer = first_layer_state(name, features.grids[name], features[name].shape[1], counts[name], 7919 * number)
            learned[worker][name] = layer
            fits.append(LayerFit(layer, shard[name], rules, edges, parents[worker], start))
        for iteration in range(iterations):
            total = reduce(add, [fit.statistics() for fit in fits])
            for fit in fits:
                fit.update(total, iteration + 1)
        summary = reduce(add, [fit.summary() for fit in fits])
        for worker, fit in enumerate(fits):
            fit.finish(summary)
            parents[worker] = fit.as_parents(choose_candidates(fit.layer, summary, rules, edges))
    return learned


@pytest.mark.parametrize("form", list(FORMS))
def test_workers_that_see_but_their_own_images_learn_the_same_graph(
    scene: tuple[conelens.Network, torch.Tensor, torch.Tensor], form: str
) -> None:
    features = Features.extract(scene[0], scene[1][:20], [LOWER, UPPER], scale="channel")
    whole = ExplanatoryGraph.fit(None, features, nodes_per_filter=[3, 5], edges=3, iterations=4, form=form)
    workers = over_workers(features, [(13, 20), (0, 13), (20, 20)], {LOWER: 3, UPPER: 5}, 3, 4, FORMS[form])
    for learned in workers:
        for name, layer in whole.layers.items():
            other = vars(learned[name])
            for key, value in vars(layer).items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-4)
                elif key in ("mean_score", "history"):
                    assert other[key] == pytest.approx(value, rel=1e-5)


def test_large_tables_are_worked_on_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for cells in (1 << 24, 17):
        monkeypatch.setattr("conelens.explanatory.fit._TABLE_CELLS", cells)
        layer, features, parents = noisy()
        fit = LayerFit(layer, features, Rules(), 3, parents)
        total = fit.statistics()
        fit.update(total, 1)
        results.append((total.squares, total.pull, layer.edges, layer.strength))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_parents_are_those_under_which_displacements_are_most_likely() -> None:
    """The choice against the criterion written out in loops, from the means as they are after the step."""
    layer, features, parents = noisy()
    fit = LayerFit(layer, features, Rules(), 3, parents)
    fit.update(fit.statistics(), 1)
    expected = layer.expect(fit.rules, len(features), parents)
    found = layer.find(features, expected, fit.rules, argmax=False)
    before = layer.mean.clone()
    fit.update(fit.statistics(), 2)
    assert expected.shift is not None and layer.edges is not None and layer.strength is not None
    for d in range(3):
        for k in range(4):
            mass = found.mass[:, d, k]
            own = found.first[:, d, k] / mass[:, None] + expected.shift[:, d, k] + before[d, k] - layer.mean[d, k]
            scores = []
            for parent in range(8):
                squares = (mass * (own - parents.displacement[:, parent]).square().sum(-1)).sum()
                variance = parents.sigma[parent] ** 2
                scores.append(float(-variance.log() - squares / (2 * variance * mass.sum())))
            assert layer.edges[d, k].tolist() == np.argsort(scores)[::-1][:3].tolist()
            still = (mass * own.square().sum(-1)).sum()
            best = int(layer.edges[d, k, 0])
            share = 1 - (mass * (own - parents.displacement[:, best]).square().sum(-1)).sum() / still
            assert float(layer.strength[d, k, 0]) == pytest.approx(float(share), rel=1e-9)


def test_candidates_move_and_stay_off_the_border() -> None:
    """Grid of 9 x 7 cells of 8 pixels: the middle is (35.5, 27.5), a tenth from its border lies 28.8 and 22.4 pixels away."""
    layer = first_layer_state("top", GRID, 1, 8, seed=0)
    offsets = torch.tensor([[0, 0], [28, 0], [-28, 0], [30, 0], [-30, 0], [0, 23], [0, -23], [0, 0]], dtype=torch.float32)
    wiggle = torch.tensor([5, 4, 4, 9, 9, 9, 9, 0.05])
    positions = offsets + torch.tensor([-1.0, 1.0])[:, None, None] * wiggle[:, None]
    scores = torch.tensor([[1.0, 2, 3, 9, 9, 9, 9, 9]]).expand(2, 8)
    summary = Summary.of(positions, scores)
    pruning = Rules(still=0.5)
    # the half that moves most is outside: by score alone
    assert choose_candidates(layer, summary, pruning, 1).tolist() == [3]
    assert choose_candidates(layer, summary, Rules(), 1).tolist() == [7, 2, 1, 0]
    wiggle[3:7] = 0.1
    summary = Summary.of(offsets + torch.tensor([-1.0, 1.0])[:, None, None] * wiggle[:, None], scores)
    assert choose_candidates(layer, summary, pruning, 2).tolist() == [2, 1, 0]
    assert choose_candidates(layer, summary, Rules(still=0.5, pool=2), 2).tolist() == [2, 1]
    assert choose_candidates(layer, summary, Rules(pool=None), 2).tolist() == list(range(8))
    assert choose_candidates(layer, summary, Rules(still=0.5, pool=1), 5).tolist() == [2, 3, 4, 5, 6]  # too few: by score alone


@pytest.fixture(scope="module")
def scene() -> tuple[conelens.Network, torch.Tensor, torch.Tensor]:
    return conelens.trace(PlantedNet().eval(), (4, 96, 96)), *planted(90)


def graph_of(
    scene: tuple[conelens.Network, torch.Tensor, torch.Tensor], form: str = "recommended", **more: object
) -> ExplanatoryGraph:
    return ExplanatoryGraph.fit(scene[0], scene[1], [LOWER, UPPER], [3, 5], edges=3, form=form, scale="channel", **more)  # type: ignore[arg-type]


def errors(placement: Placement, parts: torch.Tensor, filter_: int, part: int) -> tuple[torch.Tensor, int]:
    """Distances [N] of the filter's best node to a part, in pixels, and which node that is."""
    distance = (placement.positions[:, filter_] - parts[:, part, None]).norm(dim=-1)
    best = int(distance.median(0).values.argmin())
    return distance[:, best], best


@pytest.mark.parametrize(("form", "share"), [("recommended", 0.85), ("paper", 0.85)])
def test_planted_parts_are_found(scene: tuple[conelens.Network, torch.Tensor, torch.Tensor], form: str, share: float) -> None:
    net, images, parts = scene
    graph = graph_of(scene, form)
    features = Features.extract(net, images, [LOWER, UPPER], scale=graph.scale)
    placement = graph.infer(features)[LOWER]
    raw = graph[LOWER].grid.pixels(features[LOWER].flatten(2).max(-1).indices)
    for part in range(3):
        distance, node = errors(placement, parts, part, part)
        assert float(distance.median()) <= 2 and float((distance <= 4).float().mean()) >= share
        # the filter alone is drawn away by clutter, the prior alone by the object's place
        assert float((raw[:, part] - parts[:, part]).norm(dim=-1).le(4).float().mean()) < share - 0.15
        elsewhere = placement.positions[:, part, node].roll(1, 0)
        instability = [
            (p - parts[:, other]).norm(dim=-1).std()
            for other in range(3)
            for p in (placement.positions[:, part, node], elsewhere, raw[:, part])
        ]
        nodes, prior, filters = torch.stack(instability).view(3, 3).mean(0)
        assert nodes < 0.75 * prior and nodes < 0.75 * filters
        edges = graph[LOWER].edges
        assert edges is not None and int(edges[part, node, 0]) // 5 < 2  # the strongest is not clutter's filter


def test_the_release_finds_parts_that_stay_within_its_windows() -> None:
    """Its 6 x 6 points reach 0.15 of the map to each side, so that the object may not roam as far."""
    net = conelens.trace(PlantedNet().eval(), (4, 96, 96))
    images, parts = planted(90, roam=16)
    graph = ExplanatoryGraph.fit(net, images, [LOWER, UPPER], 12, edges=3, form="release", scale="channel")
    placement = graph.infer(images)[LOWER]
    for part in range(3):
        distance, node = errors(placement, parts, part, part)
        elsewhere = (placement.positions[:, part, node].roll(1, 0) - parts[:, part]).norm(dim=-1)
        assert float(distance.median()) <= 5 and float(distance.mean()) < 0.75 * float(elsewhere.mean())


def test_shifting_the_images_shifts_the_positions(scene: tuple[conelens.Network, torch.Tensor, torch.Tensor]) -> None:
    graph = graph_of(scene)
    images, parts = planted(30, seed=4, clutter=0)
    inside = ((parts > 14) & (parts < 74)).all((1, 2))
    moved = torch.roll(images[inside], (8, 4), (2, 3))
    before, after = (graph.infer(each)[LOWER] for each in (images[inside], moved))
    for part in range(3):
        _, node = errors(before, parts[inside], part, part)
        shift = after.positions[:, part, node] - before.positions[:, part, node]
        assert shift.median(0).values.tolist() == [8.0, 4.0]
        assert float((shift - torch.tensor([8.0, 4.0])).abs().max()) <= 2  # a cell: of two equally near ones, the other


def test_the_same_seed_gives_the_same_graph_another_another(scene: tuple[conelens.Network, torch.Tensor, torch.Tensor]) -> None:
    one, same, other = (graph_of(scene, iterations=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one[LOWER].mean, same[LOWER].mean) and not torch.equal(one[LOWER].mean, other[LOWER].mean)


def test_presets_and_orders(scene: tuple[conelens.Network, torch.Tensor, torch.Tensor]) -> None:
    net, images, _ = scene
    with pytest.raises(ArgumentError, match="bottom first"):
        ExplanatoryGraph.fit(net, images)
    with pytest.raises(ArgumentError, match="'lower' is not computed from 'upper'"):
        ExplanatoryGraph.fit(net, images, [UPPER, LOWER])
    with pytest.raises(ArgumentError, match="form: got 'book'"):
        ExplanatoryGraph.fit(net, images, [UPPER], form="book")
    with pytest.raises(ArgumentError, match="noise: got -1"):
        ExplanatoryGraph.fit(net, images, [UPPER], noise=-1)
    with pytest.raises(ArgumentError, match="edges: got 0"):
        ExplanatoryGraph.fit(net, images, [UPPER], edges=0)
    with pytest.raises(ArgumentError, match="wanted 1 to 576"):
        ExplanatoryGraph.fit(net, images, [UPPER], 577)
    with pytest.raises(ArgumentError, match="got 3 numbers for 1 layers"):
        ExplanatoryGraph.fit(net, images, [UPPER], [1, 2, 3])
    with pytest.raises(ArgumentError, match="wanted each layer once"):
        ExplanatoryGraph.fit(net, images, [UPPER, UPPER])
    with pytest.raises(ArgumentError, match="'lower' is not computed from 'upper'"):
        ExplanatoryGraph.fit(net, Features.extract(net, images, [UPPER, LOWER]))


def test_the_preset_of_a_resnet_reads_what_its_relus_read() -> None:
    """A convolution in front of a batch norm says nothing of what fires."""
    steps = [(3, 128, 8), (128, 256, 2), (256, 512, 2)]
    parts = [part for a, b, s in steps for part in (nn.Conv2d(a, b, s, stride=s, bias=False), nn.BatchNorm2d(b), nn.ReLU())]
    assert preset_layers(conelens.trace(nn.Sequential(*parts).eval(), (3, 224, 224))) == ["1", "4", "7"]
    plain = [part for part in parts if not isinstance(part, nn.BatchNorm2d)]
    assert preset_layers(conelens.trace(nn.Sequential(*plain).eval(), (3, 224, 224))) == ["0", "2", "4"]


@pytest.mark.parametrize("wrong", [{"weight": "agrement"}, {"pool": 0}, {"still": 1.0}, {"noise": float("nan")}])
def test_rules_that_do_not_exist_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))}.*: got"):
        Rules(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("edges", ["likelihood", "kernel"])
def test_every_criterion_goes_with_every_order(edges: str) -> None:
    layer, features, parents = noisy()
    chosen = []
    for first in (False, True):
        one = replace(layer, history=[])
        fit = LayerFit(one, features, Rules(edges=edges, edges_first=first), 3, parents)
        fit.update(fit.statistics(), 1)
        assert one.edges is not None
        chosen.append(one.edges)
    assert torch.equal(*chosen) == (edges == "kernel")


def test_a_damped_step_is_damped_by_the_spread_of_its_own_inference() -> None:
    """Steps of the release (§2.4): offset (sigma~_min / sigma~)^2 t^(-1/2), all of it of one E-step."""
    layer, features, parents = noisy()
    fit = LayerFit(layer, features, FORMS["release"], 3, parents)
    for iteration in (1, 2, 3):
        before, sigma = layer.mean.clone(), layer.prior_sigma.clone()
        total = fit.statistics()
        fit.update(total, iteration)
        offset = (total.residual / total.mass[:, None]).view(before.shape)
        share = (sigma.min() / sigma).square() / iteration**0.5
        torch.testing.assert_close(layer.mean, before + share[..., None] * offset, rtol=1e-12, atol=1e-12)
