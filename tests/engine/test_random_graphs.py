"""Deconvnet on random graphs: equal to autograd, and the cone equal to the whole image, with kernels forced."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

import conelens
from conelens.cone import unit_boxes
from tests.kit.oracle import deconvnet_by_autograd, relative
from tests.kit.random_graphs import RandomNet

GRAPHS = 320


def _units(net: RandomNet, step: int, images: int, rng: random.Random) -> list[tuple[int, int, int, int]]:
    channels, height, width = net.shapes[step + 1]
    corners = [
        (0, 0),
        (height - 1, width - 1),
        (rng.randrange(height), rng.randrange(width)),
        (height // 2, width // 2),
    ]
    return [(rng.randrange(images), rng.randrange(channels), y, x) for y, x in corners]


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_projection_equals_autograd_and_cone_equals_whole(seed: int) -> None:
    rng = random.Random(seed)
    model = RandomNet(seed).double()
    images = torch.randn(3, *model.input_shape, dtype=torch.float64)
    net = conelens.trace(model, images)
    step = len(model.steps) - 1
    units = _units(model, step, 3, rng)
    wanted, activity = deconvnet_by_autograd(model, images, f"steps.{step}", units)
    image, channel = [u[0] for u in units], [u[1] for u in units]
    where = [u[2:] for u in units]
    name = net.layers()[net.graph.outputs[0]].name
    with warnings.catch_warnings(), conelens.ops.require_kernels():
        warnings.simplefilter("ignore", conelens.DeadUnitWarning)
        full = conelens.project(net, images, name, channel, where, image, route="full")
        cone = conelens.project(net, images, name, channel, where, image, route="cone")
        single = conelens.project(net, images, name, channel[0], where[0], image[:1], route="cone")
    assert torch.allclose(full.values, activity, rtol=1e-12, atol=1e-13)
    assert relative(full.pixels, wanted) < 1e-12
    assert relative(cone.pixels, wanted) < 1e-12
    assert relative(single.pixels, wanted[:1]) < 1e-12 or wanted[0].norm() == 0


@pytest.mark.parametrize("seed", range(40))
def test_all_positive_network_equals_the_plain_gradient(seed: int) -> None:
    """With nothing to rectify, the deconvnet is the gradient times the activation."""
    model = RandomNet(1000 + seed, all_positive=True).double()
    if any(getattr(s.body, "affine", False) or isinstance(s.body, torch.nn.LocalResponseNorm) for s in model.steps):
        model = RandomNet(5000 + seed, all_positive=True).double()
    images = torch.rand(1, *model.input_shape, dtype=torch.float64)
    if any(isinstance(s.body, torch.nn.BatchNorm2d | torch.nn.LocalResponseNorm) for s in model.steps):
        return  # both may subtract, so the network is not all positive
    leaf = images.clone().requires_grad_()
    out = model(leaf)
    channel, y, x = 0, out.shape[2] // 2, out.shape[3] // 2
    (gradient,) = torch.autograd.grad(out[0, channel, y, x], leaf)
    net = conelens.trace(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", conelens.DeadUnitWarning)
        p = conelens.project(net, images, net.layers()[net.graph.outputs[0]].name, channel, (y, x))
    assert relative(p.pixels[0], gradient[0] * out[0, channel, y, x].detach()) < 1e-12


@pytest.mark.parametrize("seed", range(60))
def test_box_is_the_receptive_field_found_by_probing(seed: int) -> None:
    """The box clipped to the image encloses every pixel that can change the unit, and is tight for a positive linear net."""
    model = RandomNet(2000 + seed, all_positive=True).double()
    net = conelens.trace(model, tuple(model.input_shape))
    _channels, height, width = model.shapes[-1]
    leaf = torch.rand(1, *model.input_shape, dtype=torch.float64).requires_grad_()
    for y, x in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
        unit = model(leaf)[0, :, y, x].sum()
        top, left, bottom, right = unit_boxes(net.graph, net.graph.outputs[0], torch.tensor([[y, x]]).numpy())[0]
        if not unit.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(unit, leaf)
        rows, columns = torch.nonzero(gradient[0].abs().sum(0), as_tuple=True)
        if len(rows):
            assert top <= rows.min() and rows.max() < bottom
            assert left <= columns.min() and columns.max() < right
