"""Deconvnet on the kinds of network that people analyse: equal to autograd, with kernels forced."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from captum.attr import NeuronDeconvolution
from torch import Tensor, nn

import conelens
from conelens.network import Network
from conelens.ops import require_kernels
from tests.kit.networks import KINDS, live_units, make
from tests.kit.oracle import deconvnet_by_autograd, relative

SIZE = (61, 58)


def images(count: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def project(
    net: Network, x: Tensor, units: list[tuple[int, int, int, int]], route: str = "auto", layer: str = "last"
) -> conelens.projection.Projection:
    with require_kernels():
        return conelens.project(
            net, x, layer, [u[1] for u in units], [u[2:] for u in units], [u[0] for u in units], route=route
        )


@pytest.mark.parametrize("kind", KINDS)
def test_projection_equals_autograd(kind: str) -> None:
    model, x = make(kind), images()
    units = live_units(model, x)
    assert len(units) >= 5
    wanted, activity = deconvnet_by_autograd(model, x, "last", units)
    assert (wanted.flatten(1).norm(dim=1) > 0).all()
    net = conelens.trace(model, x)
    for route in ("full", "cone"):
        got = project(net, x, units, route)
        assert relative(got.values, activity) < 1e-12
        for one, other in zip(got.pixels, wanted, strict=True):
            assert relative(one, other) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_near_float64(kind: str) -> None:
    model, x = make(kind), images()
    units = live_units(model, x)
    wanted, _ = deconvnet_by_autograd(model, x, "last", units)
    net = conelens.trace(model.float(), x.float())
    for route in ("full", "cone"):
        assert relative(project(net, x.float(), units, route).pixels, wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_other_layers_and_memory_formats(kind: str) -> None:
    """Units of a layer half-way down; channels_last images and weights change nothing."""
    model, x = make(kind), images()
    net = conelens.trace(model, x)
    inside = [
        layer.name
        for layer in net.layers()
        if layer.kind in ("conv", "relu", "max_pool", "batch_norm") and layer.name in dict(model.named_modules())
    ]
    layer = inside[len(inside) // 2]
    units = live_units(model, x, layer, 4)
    wanted, _ = deconvnet_by_autograd(model, x, layer, units)
    assert relative(project(net, x, units, layer=layer).pixels, wanted) < 1e-12
    last = x.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert relative(project(conelens.trace(model, last), last, units, layer=layer).pixels, wanted) < 1e-12


@pytest.mark.parametrize("kind", ["VGG", "GoogLeNet", "ResNet"])
def test_a_batch_of_units_equals_a_loop(kind: str) -> None:
    model, x = make(kind), images(3)
    net = conelens.trace(model, x)
    units = live_units(model, x, count=12)
    for route in ("full", "cone"):
        together = project(net, x, units, route)
        for index, unit in enumerate(units):
            alone = project(net, x, [unit], route)
            assert relative(alone.pixels[0], together.pixels[index]) < 1e-12
            assert torch.equal(alone.boxes[0], together.boxes[index])


@pytest.mark.parametrize("kind", ["AlexNet, overlapping 3/2", "DenseNet"])
def test_projection_is_positively_homogeneous(kind: str) -> None:
    """A layer scaled by c > 0 has a seed and filters c times as large, so its projection is c² times as
    large.
    """
    model, x = make(kind), images(1)
    units = live_units(model, x)
    before = project(conelens.trace(model, x), x, units)
    factor = 3.7
    last = model.get_submodule("last")
    last.weight.data *= factor  # type: ignore[union-attr, operator]
    if last.bias is not None:
        last.bias.data *= factor  # type: ignore[union-attr, operator]
    after = project(conelens.trace(model, x), x, units)
    assert relative(after.values, before.values * factor) < 1e-14
    assert relative(after.pixels, before.pixels * factor**2) < 1e-14


@pytest.mark.parametrize("kind", ["ResNet", "ZFNet, ceil and LRN"])
def test_nothing_outside_the_box(kind: str) -> None:
    model, x = make(kind), images(1)
    units = live_units(model, x)
    wanted, _ = deconvnet_by_autograd(model, x, "last", units)
    boxes = project(conelens.trace(model, x), x, units).boxes
    for plane, (top, left, bottom, right) in zip(wanted, boxes.tolist(), strict=True):
        plane[:, max(top, 0) : bottom, max(left, 0) : right] = 0
        assert not plane.any()


def test_lrn_by_its_jacobian() -> None:
    """The option differs from the identity, and equals autograd."""
    model, x = make("ZFNet, ceil and LRN"), images() * 40
    units = live_units(model, x)
    by_identity, _ = deconvnet_by_autograd(model, x, "last", units)
    wanted, _ = deconvnet_by_autograd(model, x, "last", units, {"lrn": "jacobian"})
    assert relative(by_identity, wanted) > 0.1
    net = conelens.trace(model, x, policy={"lrn": "jacobian"})
    for route in ("full", "cone"):
        assert relative(project(net, x, units, route).pixels, wanted) < 1e-12
    assert relative(project(conelens.trace(model, x), x, units).pixels, by_identity) < 1e-12


def test_batch_norm_equals_its_fold_into_the_filters() -> None:
    """Batch norm and convolution written as one convolution by hand give the same projection."""
    model, x = make("groups, depthwise, dilation"), images()
    units = live_units(model, x)
    wanted = project(conelens.trace(model, x), x, units).pixels
    norm, conv = model.get_submodule("3"), model.get_submodule("2")
    assert isinstance(norm, nn.BatchNorm2d)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    conv.bias.data = (conv.bias - norm.running_mean) * factor + norm.bias  # type: ignore[union-attr, operator]
    conv.weight.data = conv.weight * factor.reshape(-1, 1, 1, 1)  # type: ignore[union-attr, operator]
    model.set_submodule("3", nn.Identity())
    assert relative(project(conelens.trace(model, x), x, units).pixels, wanted) < 1e-13


# --- Captum -------------------------------------------------------------------------------------------------


def captum(model: nn.Module, x: Tensor, units: list[tuple[int, int, int, int]]) -> Tensor:
    """Captum seeds with one; ours with the activity."""
    method = NeuronDeconvolution(model, model.get_submodule("last"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cat([method.attribute(x[i : i + 1].clone().requires_grad_(), (c, y, w)).detach() for i, c, y, w in units])


def modules_in_place(model: nn.Module, inplace: bool) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    return model


@pytest.mark.parametrize("kind", ["VGG", "AlexNet, overlapping 3/2", "groups, depthwise, dilation", "average pools"])
def test_captum_agrees_where_it_is_right(kind: str) -> None:
    """nn.ReLU modules that nothing shares."""
    model, x = modules_in_place(make(kind), False), images()
    units = live_units(model, x)
    p = project(conelens.trace(model, x), x, units)
    assert relative(captum(model, x, units) * p.values[:, None, None, None], p.pixels) < 1e-12


def test_captum_gives_the_plain_gradient_for_functional_relu() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x)))

    torch.manual_seed(0)
    model, x = Functional().double().eval(), images(1)
    units = live_units(model, x)
    p = project(conelens.trace(model, x), x, units)
    leaf = x.clone().requires_grad_()
    _, channel, y, column = units[0]
    (gradient,) = torch.autograd.grad(model(leaf)[0, channel, y, column], leaf)
    theirs = captum(model, x, units)
    assert relative(theirs[0], gradient[0]) < 1e-14
    assert relative(theirs * p.values[:, None, None, None], p.pixels) > 0.3
    assert relative(p.pixels, deconvnet_by_autograd(model, x, "last", units)[0]) < 1e-12


def test_captum_loses_the_skip_that_shares_a_relu_input() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 4, 3),
            )
            self.relu, self.after = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.after(x + self.second(self.relu(x))))

    torch.manual_seed(0)
    model, x = Shared().double().eval(), images(1)
    units = live_units(model, x)
    p = project(conelens.trace(model, x), x, units)
    assert relative(captum(model, x, units) * p.values[:, None, None, None], p.pixels) > 0.3
    assert relative(p.pixels, deconvnet_by_autograd(model, x, "last", units)[0]) < 1e-12
