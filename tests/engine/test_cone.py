"""Cone algebra: plans against brute force, the cost of cones, and the choice between cone and whole image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import conelens
from conelens.cone import plan_cone, unit_boxes
from conelens.cost import choose_route, chunks_of_units


def vgg_like(channels: int = 4, size: int = 64) -> conelens.Network:
    layers: list[nn.Module] = []
    before = 3
    for block in range(3):
        for _ in range(2):
            layers += [nn.Conv2d(before, channels * (block + 1), 3, padding=1), nn.ReLU()]
            before = channels * (block + 1)
        layers.append(nn.MaxPool2d(2))
    return conelens.trace(nn.Sequential(*layers).eval(), (3, size, size))


def test_interior_plans_equal_the_general_ones() -> None:
    net = vgg_like()
    target = net.node("conv3_2").index
    positions = np.array([[7, 8], [8, 6], [7, 7]])
    moved = plan_cone(net.graph, target, positions)
    general = plan_cone(net.graph, target, np.concatenate([positions, [[0, 0]]]))  # the corner forces the general plan
    assert not any(moved.hangs.values()) and any(general.hangs.values())
    for index in moved.order:
        assert (moved.places[index].low == general.places[index].low[:3]).all()
        assert moved.places[index].size == general.places[index].size
        for ours, theirs in zip(moved.edges[index], general.edges[index], strict=True):
            assert ours.offset == theirs.offset


def test_windows_are_trimmed_at_a_corner_and_never_exceed_the_map() -> None:
    net = vgg_like()
    target = net.node("conv3_2").index
    corner = plan_cone(net.graph, target, np.array([[0, 0]]))
    middle = plan_cone(net.graph, target, np.array([[8, 8]]))
    assert not any(corner.hangs.values())
    assert corner.places[0].size == (18, 18) and middle.places[0].size == (32, 32)
    everywhere = plan_cone(net.graph, target, np.array([[0, 0], [15, 15]]))
    for index in everywhere.order:
        assert all(s <= m for s, m in zip(everywhere.places[index].size, net.graph[index].size, strict=True))


def test_cost_counts_every_cell_of_the_cone() -> None:
    net = vgg_like()
    # conv1_1 3x3x3 on 3x3 cells + ReLU + conv1_2 on one cell
    assert net.cost("conv1_2").cone == 9 * 4 * 27 + 9 * 4 + 4 * 36
    assert net.cost("conv1_2").whole == 64 * 64 * (4 * 27 + 4 + 4 * 36)


def test_auto_takes_the_cone_for_few_low_units_and_the_image_for_many_high_ones() -> None:
    net = vgg_like(channels=32, size=96)
    low, high = net.node("conv1_2").index, net.node("conv3_2").index
    assert choose_route(net.graph, low, np.zeros(1, int)) == "cone"
    assert choose_route(net.graph, high, np.zeros(500, int)) == "full"


@pytest.mark.parametrize("count", [1, 7, 100])
def test_chunks_hold_every_unit_once(count: int) -> None:
    net = vgg_like(channels=64)
    target = net.node("conv3_2").index
    places = np.random.default_rng(0).integers(0, 16, (count, 2))
    chunks = chunks_of_units(net.graph, target, places, "cpu")
    assert sorted(np.concatenate(chunks).tolist()) == list(range(count))


def test_boxes_continue_past_the_border() -> None:
    net = vgg_like()
    boxes = unit_boxes(net.graph, net.node("conv3_2").index, np.array([[0, 0], [15, 15]]))
    assert boxes.tolist() == [[-14, -14, 18, 18], [46, 46, 78, 78]]


def test_box_of_a_unit_behind_global_pooling_is_the_image_and_its_padding() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    net = conelens.trace(model, (1, 9, 7))
    assert unit_boxes(net.graph, net.node("3").index, np.array([[0, 0]])).tolist() == [[-1, -1, 10, 8]]
    x = torch.rand(1, 1, 9, 7)
    p = conelens.project(net, x, "3", 0, (0, 0), route="cone")
    assert p.crops.shape == (1, 1, 11, 9)
