"""Switches of the cone against those of the whole image: they may differ only where a window is nearly tied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import conelens
from conelens.assets import photographs
from conelens.certify import near_ties
from conelens.cone import plan_cone
from conelens.data import load_image
from conelens.execution import forward_cone, forward_whole, steps_from_whole
from conelens.models import load_model
from conelens.operators import MaxPool2d, inside


@pytest.fixture(scope="module")
def squeezenet() -> tuple[conelens.Network, Tensor]:
    """SqueezeNet and a photograph, the same on a white background, letterboxed, and noise."""
    loaded = load_model("squeezenet1_1")
    net = conelens.trace(loaded.module, (3, 224, 224))
    photograph = loaded.preprocess(load_image(photographs() / "chelsea.jpg"))
    white = photograph.clone()
    white[:, :, 120:] = loaded.preprocess.tensor(np.full((1, 1, 3), 255, np.uint8))
    boxed = photograph.clone()
    boxed[:, :40] = boxed[:, 184:] = loaded.preprocess.tensor(np.zeros((1, 1, 3), np.uint8))
    noise = torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(0)) * 60
    return net, torch.stack([photograph, white, boxed, noise])


def compare(net: conelens.Network, images: Tensor, layer: str, image: int, place: tuple[int, int]) -> tuple[int, int, int]:
    """(switches compared, differing, differing outside near ties) for one unit."""
    graph, target = net.graph, net.node(layer).index
    plan = plan_cone(graph, target, np.array([place]))
    windows: dict[int, Tensor] = {}
    whole: dict[int, Tensor] = {}
    switches: dict[int, Tensor] = {}
    with torch.inference_mode():
        x = images[image : image + 1]
        _, cone_steps = forward_cone(graph, plan, x, None, torch.zeros(1, dtype=torch.long), observe=windows.__setitem__)
        forward_whole(graph, x, (target,), switches=switches)
        full_steps = steps_from_whole(graph, plan, torch.zeros(1, dtype=torch.long), switches, whole)
    compared = differing = unexplained = 0
    for index in plan.order:
        op = graph[index].op
        if not isinstance(op, MaxPool2d):
            continue
        ours, theirs = cone_steps[index].memo["switches"], full_steps[index].memo["switches"]
        on_map = inside(plan.places[index], graph[index].size, ours.device).expand_as(ours)
        different = (ours != theirs) & on_map
        near, _ = near_ties(windows[index], op, ours)
        compared += int(on_map.sum())
        differing += int(different.sum())
        unexplained += int((different & ~near).sum())
    return compared, differing, unexplained


@pytest.mark.parametrize("layer", ["features.3.squeeze", "features.7.squeeze", "features.9.expand3x3"])
def test_switches_differ_only_at_near_ties(squeezenet: tuple[conelens.Network, Tensor], layer: str) -> None:
    net, images = squeezenet
    _, height, width = net[layer].shape
    for image in range(4):
        for place in ((0, 0), (height // 2, width // 2), (height - 1, width // 3), (height // 3, width - 2)):
            compared, differing, unexplained = compare(net, images, layer, image, place)
            assert compared > 0
            assert unexplained == 0
            if image == 3:
                assert differing == 0
