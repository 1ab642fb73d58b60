"""The mistakes of deconvnet re-implementations, E1 to E16: conelens equals the oracle where each wrong
variant differs.

The catalogue comes from a reading of some twenty code bases. Each test holds the wrong variant itself, so
that it fails should conelens ever become one of them, or the oracle blind to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from conelens.errors import ConelensError, UnsupportedOperatorError
from tests.kit.by_hand import MISTAKES, deconvnet
from tests.kit.networks import live_units, make
from tests.kit.oracle import deconvnet_by_autograd, relative

IMAGES = torch.randn(2, 3, 27, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
Unit = tuple[int, int, int, int]


def chain() -> nn.Sequential:
    """Strided and overlapping, with batch norm: a place for every mistake."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, 2, 1),
    )
    nn.init.uniform_(model[4].weight, -1.5, 1.5)
    model[4].running_mean.normal_(0, 0.3)
    model[4].running_var.uniform_(0.2, 3)
    return model.double().eval()


def ours(model: nn.Module, images: Tensor, layer: str, units: list[Unit], policy: dict[str, str] | None = None) -> Tensor:
    net = conelens.trace(model, images, policy)
    return conelens.project(net, images, layer, [u[1] for u in units], [u[2:] for u in units], [u[0] for u in units]).pixels


def right(model: nn.Module, images: Tensor, layer: str, units: list[Unit]) -> Tensor:
    """What conelens gives, once it is seen to equal the oracle."""
    wanted, _ = deconvnet_by_autograd(model, images, layer, units)
    assert wanted.norm() > 0
    got = ours(model, images, layer, units)
    assert relative(got, wanted) < 1e-12
    return got


def hooked(model: nn.Module, image: Tensor, layer: str, unit: Unit, attach: Callable[[nn.ReLU], None]) -> Tensor:
    """Autograd with something attached to every nn.ReLU module, as hook-based implementations do; seeded with
    the activity.
    """
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            attach(module)
    captured: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: captured.append(o))
    leaf = image.clone().requires_grad_()
    model(leaf)
    handle.remove()
    value = captured[0][unit]
    (gradient,) = torch.autograd.grad(value, leaf, value.detach())
    return gradient[0]


def gradient(model: nn.Module, image: Tensor, layer: str, unit: Unit) -> Tensor:
    return hooked(model, image, layer, unit, lambda module: None)


# E1 random biases, E2 forward biases, E3 no top-down ReLU, E4 guided backprop, E5 replication, E6
# overwriting, E7 foreign switches, E14 identity BN
@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m != "last tie"])
def test_mistakes_on_the_way_down_differ(mistake: str) -> None:
    model = chain()
    units = live_units(model, IMAGES[:1], "7", 4)
    wanted = right(model, IMAGES[:1], "7", units)
    for unit, projection in zip(units, wanted, strict=True):
        by_hand = deconvnet(model, IMAGES[:1], unit[1:])
        assert relative(by_hand, projection) < 1e-12
        wrong = deconvnet(model, IMAGES[:1], unit[1:], mistake, IMAGES[1:])
        assert relative(wrong, projection) > 0.05, f"{mistake} makes no difference here, so the test is blind"


def test_e1_projections_are_the_same_on_every_run() -> None:
    model = chain()
    units = live_units(model, IMAGES[:1], "7", 2)
    assert torch.equal(ours(model, IMAGES[:1], "7", units), ours(model, IMAGES[:1], "7", units))
    runs = [deconvnet(model, IMAGES[:1], units[0][1:], "random biases") for _ in range(2)]
    assert not torch.equal(*runs)


def test_e6_torch_unpooling_overwrites_where_windows_share_their_maximum() -> None:
    """F.max_unpool2d keeps one of two signals that belong to the same cell; the sum of both is right."""
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1.0  # the maximum of all four 3x3 windows at stride 2
    pooled, switches = conelens.ops.max_pool2d_with_switches(x, 3, 2)
    found = conelens.ops.max_unpool2d(pooled, switches, 3, 2, output_size=(5, 5))
    theirs = F.max_unpool2d(*F.max_pool2d(x, 3, 2, return_indices=True), 3, 2, output_size=(5, 5))
    assert found[0, 0, 2, 2] == 4
    assert theirs[0, 0, 2, 2] == 1


def test_the_first_of_tied_values_gets_the_signal() -> None:
    """Dead windows tie at zero; autograd sends the signal to the first cell, and so do we."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)).double().eval()
    image = IMAGES[:1, :, :24, :24]
    units = live_units(model, image, "3", 4)
    wanted = right(model, image, "3", units)
    for unit, projection in zip(units, wanted, strict=True):
        assert relative(deconvnet(model, image, unit[1:]), projection) < 1e-12
        assert relative(deconvnet(model, image, unit[1:], "last tie"), projection) > 0.05


# --- E8 to E11: what hooks and sequential walks miss --------------------------------------------------------


def rectify_by_hook(module: nn.ReLU) -> None:
    """The backward rule of a deconvnet, by a hook on the module."""
    module.register_full_backward_hook(lambda m, received, given: (given[0].clamp(min=0),))


class Functional(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.middle(self.activation(self.first(x)))))


def test_e8_hooks_that_miss_functional_relu_give_the_plain_gradient() -> None:
    model = Functional(F.relu).double().eval()
    units = live_units(model, IMAGES[:1], count=2)
    (projection, _) = right(model, IMAGES[:1], "last", units)
    by_hooks = hooked(model, IMAGES[:1], "last", units[0], rectify_by_hook)
    assert relative(by_hooks, gradient(model, IMAGES[:1], "last", units[0])) == 0
    assert relative(by_hooks, projection) > 0.1
    modular = Functional(nn.ReLU()).double().eval()  # the same hooks do work where a module is called
    assert relative(hooked(modular, IMAGES[:1], "last", units[0], rectify_by_hook), projection) < 1e-12


def test_e9_relu6_does_not_pass_in_silence() -> None:
    model = Functional(nn.ReLU6()).double().eval()
    units = live_units(model, IMAGES[:1], count=2)
    with pytest.raises(UnsupportedOperatorError, match=r"relu6.*policy"):
        conelens.trace(model, IMAGES)
    policy = {"relu6": "clamp"}
    wanted, _ = deconvnet_by_autograd(model, IMAGES[:1], "last", units, policy)
    assert relative(ours(model, IMAGES[:1], "last", units, policy), wanted) < 1e-12
    silent = hooked(model, IMAGES[:1], "last", units[0], rectify_by_hook)
    assert relative(silent, wanted[0]) > 0.1


class Shared(nn.Module):
    """A ReLU whose input a skip also reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 6, 3, 2),
        )
        self.relu, self.after = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.after(x + self.second(self.relu(x))))


def overwrite_input_gradient(module: nn.ReLU) -> None:
    """Captum's way: a hook on the input tensor replaces all of its gradient by what came through the ReLU."""
    kept: list[Tensor] = []

    def keep(given: Tensor) -> None:
        kept.append(given)

    module.register_forward_pre_hook(lambda m, inputs: inputs[0].register_hook(lambda _: kept.pop().clamp(min=0)) and None)
    module.register_forward_hook(lambda m, inputs, output: output.register_hook(keep) and None)


def test_e10_overwriting_a_shared_input_gradient_loses_the_skip() -> None:
    model = Shared().double().eval()
    units = live_units(model, IMAGES[:1], count=2)
    (projection, _) = right(model, IMAGES[:1], "last", units)
    wrong = hooked(model, IMAGES[:1], "last", units[0], overwrite_input_gradient)
    assert relative(wrong, projection) > 0.1


def test_a_signal_is_rectified_where_the_branches_have_met() -> None:
    """Two readers of one ReLU: their signals are summed at the fan-out and then rectified, not each by
    itself.
    """

    class Join(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.first, self.second, self.last = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 6, 3, 2),
            )
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            rectified = F.relu(x)
            return self.last(F.relu(rectified + self.second(rectified if self.shared else F.relu(x))))

    model, early = Join(True).double().eval(), Join(False).double().eval()
    units = live_units(model, IMAGES[:1], count=2)
    (projection, _) = right(model, IMAGES[:1], "last", units)
    assert torch.equal(model(IMAGES), early(IMAGES))
    (wrong, _) = right(early, IMAGES[:1], "last", units)  # the same function of the image, but another network
    assert relative(wrong, projection) > 0.05


class Branched(nn.Module):
    """Branches, and a pool that overlaps: neither is a chain of children."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.left, self.right = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
        )
        self.relu, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        return self.last(self.pool(self.relu(self.left(x) + self.right(x))))


def test_e11_a_walk_over_children_is_no_network() -> None:
    model = Branched().double().eval()
    units = live_units(model, IMAGES[:1], count=2)
    (projection, _) = right(model, IMAGES[:1], "last", units)
    walked = deconvnet(nn.Sequential(*model.children()), IMAGES[:1], units[0][1:])
    assert relative(walked, projection) > 0.1


def test_e11_an_unknown_layer_raises_an_error_that_can_be_caught() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 25, 23]), nn.Conv2d(4, 4, 3)).double().eval()
    with pytest.raises(ConelensError, match=r"layer_norm in 1"):
        conelens.trace(model, IMAGES)


# --- E12, E13, E15, E16 -------------------------------------------------------------------------------------


def test_e12_the_seed_is_the_unit_that_was_asked_for() -> None:
    model = chain()
    net = conelens.trace(model, IMAGES)
    maps = net.forward(IMAGES, ["7"])["7"]
    channel = int(maps[0].amax((1, 2)).argmax())
    flat = maps[0, channel].argmax()
    y, x = int(flat) // maps.shape[3], int(flat) % maps.shape[3]
    assert (y, x) != (0, 0)
    p = conelens.project(net, IMAGES[:1], "7", channel, "peak")
    assert p.positions.tolist() == [[y, x]]
    wanted, _ = deconvnet_by_autograd(model, IMAGES, "7", [(0, channel, y, x)])
    assert relative(p.pixels, wanted) < 1e-12
    at_corner = deconvnet(model, IMAGES[:1], (channel, 0, 0))
    assert relative(at_corner, wanted[0]) > 0.1
    summed = torch.stack([deconvnet(model, IMAGES[:1], (c, y, x)) for c in range(6)]).sum(0)
    assert relative(summed, wanted[0]) > 0.1


@pytest.mark.parametrize("size", [26, 27, 28, 29])
def test_e13_strided_filters_come_back_to_the_size_they_came_from(size: int) -> None:
    """Without output_padding the map is too small wherever the stride leaves a remainder, and everything
    above it is out of place.
    """
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 6, 3, 3), nn.ReLU(), nn.Conv2d(6, 6, 2, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)).double().eval()
    )
    image = torch.randn(1, 3, size, size, dtype=torch.float64)
    units = live_units(model, image, "4", 3)
    wanted = right(model, image, "4", units)
    assert wanted.shape[2:] == (size, size)
    seed = torch.zeros_like(model(image))
    seed[units[0]] = model(image)[units[0]].detach()
    y = seed
    for conv in (model[4], model[2], model[0]):
        y = F.conv_transpose2d(y.clamp(min=0), conv.weight, None, conv.stride, conv.padding)
    if y.shape[2] == size:
        assert relative(y[0], wanted[0]) < 1e-12
    else:
        stretched = F.interpolate(y, size=(size, size))
        assert relative(stretched[0], wanted[0]) > 0.1


def test_e15_the_strongest_nine_come_from_the_data_set() -> None:
    """Nine images, ordered by their peaks; not nine places of one image, nor one image alone."""
    model = chain()
    images = torch.randn(20, 3, 27, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    net = conelens.trace(model, images)
    table = conelens.top_peaks(net, images, ["7"], k=9, batch_size=6)
    with torch.no_grad():
        strongest = model(images)[:, 2].amax((1, 2))
    wanted = strongest.argsort(descending=True)[:9].tolist()
    found = table.top("7", 2, 9)
    assert [record.image for record in found] == wanted
    assert np.allclose([record.value for record in found], strongest[wanted].clamp(min=0).numpy(), rtol=1e-6)
    one_image = conelens.top_peaks(net, images[:1], ["7"], k=9, distinct="none").top("7", 2, 9)
    assert {record.image for record in one_image} == {0}
    assert wanted != [0] * 9


def test_e16_zero_is_grey_in_pictures() -> None:
    """Min-max stretching gives zero an arbitrary colour."""
    from conelens.figures import signed

    projection = np.array([[[-0.2, 0.0, 1.0]] * 3] * 3)[None]
    shown = signed(projection)
    assert (np.abs(shown[0, :, :, 1].astype(int) - 128) <= 1).all()
    stretched = np.round(255 * (projection - projection.min()) / (projection.max() - projection.min()))
    assert np.abs(stretched[0, :, :, 1] - 128).min() > 50


def test_named_kinds_of_network_show_the_mistakes_too() -> None:
    """Plain gradients and guided backprop differ from the deconvnet on a real residual network, not on toys
    alone.
    """
    model = make("ResNet")
    x = torch.randn(1, 3, 61, 58, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    units = live_units(model, x, count=2)
    (projection, _) = right(model, x, "last", units)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert relative(gradient(model, x, "last", units[0]), projection) > 0.1
    guided = hooked(
        model,
        x,
        "last",
        units[0],
        lambda m: m.register_full_backward_hook(lambda module, received, given: (received[0].clamp(min=0),)) and None,
    )
    assert relative(guided, projection) > 0.1
