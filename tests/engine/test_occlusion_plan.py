"""What a sweep is planned to cost, against counts that were made on their own (interval by interval, whole sweep summed)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import conelens
from benchmarks.networks import NETWORKS, build
from conelens.changed import changed_spans
from conelens.occlusion import make_windows
from tests.kit.random_graphs import RandomNet

# Whole-network work over Krypton's rule, exact changed outputs and exact changed inputs, for (window, stride) on 224x224.
FACTORS: dict[str, dict[tuple[int, int], tuple[float, float, float]]] = {
    "VGG-16": {
        (16, 4): (6.52, 9.14, 13.00),
        (16, 8): (6.52, 8.88, 12.51),
        (16, 16): (6.52, 9.30, 13.25),
        (32, 4): (5.04, 6.64, 8.82),
        (32, 8): (5.04, 6.50, 8.57),
        (32, 16): (5.04, 6.75, 8.98),
    },
    "AlexNet": {
        (16, 4): (2.38, 3.56, 5.66),
        (16, 8): (2.38, 3.48, 5.47),
        (16, 16): (2.38, 3.38, 5.23),
        (32, 4): (1.99, 2.95, 4.42),
        (32, 8): (1.99, 2.89, 4.29),
        (32, 16): (1.99, 2.83, 4.14),
    },
    "ZFNet": {
        (16, 4): (4.06, 5.81, 10.01),
        (16, 8): (4.06, 5.89, 10.19),
        (16, 16): (4.06, 6.44, 11.60),
        (32, 4): (3.24, 4.57, 7.23),
        (32, 8): (3.24, 4.63, 7.35),
        (32, 16): (3.24, 5.01, 8.20),
    },
    "ResNet-18": {
        (16, 4): (2.19, 2.83, 3.81),
        (16, 8): (2.19, 2.80, 3.75),
        (16, 16): (2.19, 2.91, 3.93),
        (32, 4): (1.99, 2.49, 3.24),
        (32, 8): (1.99, 2.47, 3.20),
        (32, 16): (1.99, 2.56, 3.34),
    },
    "ResNet-50": {
        (16, 4): (2.07, 2.69, 3.04),
        (16, 8): (2.07, 2.77, 3.13),
        (16, 16): (2.07, 2.74, 3.10),
        (32, 4): (1.91, 2.36, 2.63),
        (32, 8): (1.91, 2.42, 2.71),
        (32, 16): (1.91, 2.40, 2.69),
    },
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_factors_of_the_five_networks(name: str) -> None:
    net = conelens.trace(build(name), (3, 224, 224))
    for (window, stride), expected in FACTORS[name].items():
        found = conelens.plan_occlusion(net, window, stride).factors
        assert tuple(round(found[scheme], 2) for scheme in ("krypton", "gather", "delta")) == expected


def test_the_table_adds_up() -> None:
    plan = conelens.plan_occlusion(conelens.trace(build("AlexNet"), (3, 224, 224)), 16, 4)
    assert plan.positions == 2809
    assert sum(layer.macs.full for layer in plan.layers) == pytest.approx(714.19e6, rel=1e-4)
    text = str(plan)
    assert [line.split()[0] for line in text.splitlines()[1:9]] == [layer.name for layer in plan.layers]
    assert re.search(r"sum +714\.2 +\d+\.\d +5\.\d\d", text)
    first = plan.layers[0]
    assert first.map_size == (55, 55)
    assert first.region == pytest.approx((6.89, 6.89), abs=0.01)
    assert {layer.scheme for layer in plan.layers} == {"delta", "dense"}
    with pytest.raises(conelens.ArgumentError, match="form"):
        conelens.plan_occlusion(conelens.trace(build("AlexNet"), (3, 224, 224)), form="rerun")
    with pytest.raises(conelens.ArgumentError, match="net: got"):
        conelens.plan_occlusion(nn.ReLU())  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_nothing_changes_outside_the_spans(seed: int) -> None:
    """Every cell that differs between the clean and the changed image lies in the predicted intervals."""
    model = RandomNet(9000 + seed).double()
    net = conelens.trace(model, torch.zeros(1, *model.input_shape, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, *model.input_shape, dtype=torch.float64, generator=generator)
    rng = np.random.default_rng(seed)
    low = np.array([int(rng.integers(0, cells)) for cells in model.input_shape[1:]])
    high = np.array([int(rng.integers(start + 1, cells + 1)) for start, cells in zip(low, model.input_shape[1:], strict=True)])
    changed = image.clone()
    changed[:, :, low[0] : high[0], low[1] : high[1]] += torch.randn(
        1, model.input_shape[0], *(high - low), dtype=torch.float64, generator=generator
    )
    order = net.graph.ancestors((net.graph.outputs[0],))
    spans = [changed_spans(net.graph, order, axis, low[axis : axis + 1], high[axis : axis + 1]).spans for axis in (0, 1)]
    names = [net.graph[index].name for index in order]
    before, after = net.forward(image, names), net.forward(changed, names)
    for index, name in zip(order, names, strict=True):
        x, y = (_maps(maps[name], net.graph[index].size) for maps in (before, after))
        differs = (x - y).abs().amax((0, 1)) > 1e-9
        (top,), (bottom,) = spans[0][index]
        (left,), (right,) = spans[1][index]
        inside = torch.zeros_like(differs)
        inside[top:bottom, left:right] = True
        assert not (differs & ~inside).any(), name


def _maps(values: Tensor, size: tuple[int, int]) -> Tensor:
    return values.reshape(*values.shape[:2], *size)


def test_plan_of_a_network_without_weights() -> None:
    net = conelens.trace(nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), (3, 16, 16))
    plan = conelens.plan_occlusion(net, 4, 4)
    assert plan.layers == []
    assert plan.factors["planned"] == 1.0
    assert "16 positions" in str(plan)


def test_a_grid_of_ones_own() -> None:
    net = conelens.trace(build("AlexNet"), (3, 224, 224))
    grid = make_windows((224, 224), 16, 4)
    assert conelens.plan_occlusion(net, grid).factors == conelens.plan_occlusion(net, 16, 4).factors


def test_hundreds_of_positions_are_planned_at_once() -> None:
    """Merging classes stays far below the cost of the sweep: every position is in one class, whatever the number of them."""
    net = conelens.trace(build("ResNet-18"), (3, 224, 224))
    plan = conelens.plan_occlusion(net, 16, 1)
    assert plan.positions == 209**2
    assert 1 < plan.classes[0] < 60
