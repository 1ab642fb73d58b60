"""project(): its arguments, its results, both routes, and what it says about near ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens import cost, projection
from tests.kit.oracle import deconvnet_by_autograd, relative


def chain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(inplace=True),
    )  # fmt: skip
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def net() -> conelens.Network:
    return conelens.trace(chain(), (3, 41, 37))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 41, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def alive(net: conelens.Network, images: Tensor, layer: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """One interior, border and corner unit that fires in each image."""
    maps = net.forward(images, [layer])[layer]
    rows, channels, places = [], [], []
    for image in range(len(images)):
        firing = (maps[image] > 0).nonzero().tolist()
        height, width = maps.shape[2:]
        corner = next(u for u in firing if u[1] in (0, height - 1) and u[2] in (0, width - 1))
        border = next(u for u in firing if u[1] == 0 and 0 < u[2] < width - 1)
        inner = next(u for u in firing if 3 < u[1] < height - 3 and 3 < u[2] < width - 3)
        for channel, y, x in (corner, border, inner):
            rows.append(image)
            channels.append(channel)
            places.append((y, x))
    return rows, channels, places


def test_peak_is_the_first_maximum_and_the_seed_is_its_activity(net: conelens.Network, images: Tensor) -> None:
    p = conelens.project(net, images, "6", 4)
    maps = net.forward(images, ["6"])["6"]
    flat = maps[:, 4].flatten(1)
    assert p.positions.tolist() == [[int(i) // maps.shape[3], int(i) % maps.shape[3]] for i in flat.argmax(1)]
    assert torch.allclose(p.values, flat.amax(1).clamp_min(0))
    wanted, _ = deconvnet_by_autograd(chain(), images, "6", [(n, 4, *p.positions[n].tolist()) for n in range(4)])
    assert relative(p.pixels, wanted) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_cone_equals_whole_image_for_interior_border_and_corner_units(dtype: torch.dtype, limit: float, images: Tensor) -> None:
    model = chain(dtype)
    x = images.to(dtype)
    net = conelens.trace(model, x)
    rows, channels, places = alive(net, x, "6")
    with conelens.ops.require_kernels():
        full = conelens.project(net, x, "6", channels, places, rows, route="full")
        cone = conelens.project(net, x, "6", channels, places, rows, route="cone", certify=True)
        auto = conelens.project(net, x, "6", channels, places, rows)
    assert float(full.pixels.norm()) > 0
    assert relative(cone.pixels, full.pixels) < limit and relative(auto.pixels, full.pixels) < limit
    assert cone.near_ties is not None and int(cone.near_ties.sum()) == 0  # noise has no near ties
    wanted, _ = deconvnet_by_autograd(model, x, "6", list(zip(rows, channels, *zip(*places, strict=True), strict=True)))
    assert relative(full.pixels, wanted) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_many_units_equal_one_by_one_in_any_order(
    net: conelens.Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, channels, places = alive(net, images, "6")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [[v[i] for i in order] for v in (rows, channels, places)]
    together = conelens.project(net, images, "6", channels, places, rows, route="full")
    mixed = conelens.project(net, images, "6", shuffled[1], shuffled[2], shuffled[0], route="full")
    assert relative(mixed.pixels, together.pixels[order]) < 1e-12
    monkeypatch.setattr(cost, "CHUNK_CELLS", {"cpu": 1})  # one unit at a time
    for route in ("full", "cone"):
        single = conelens.project(net, images, "6", shuffled[1], shuffled[2], shuffled[0], route=route)
        assert relative(single.pixels, together.pixels[order]) < 1e-12
        assert single.boxes.tolist() == together.boxes[order].tolist()


def test_peaks_of_many_passes_equal_those_of_one(
    net: conelens.Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = conelens.project(net, images, "6", [4, 2, 4, 1])
    monkeypatch.setattr(projection, "images_per_pass", lambda *a: 1)
    for route in ("auto", "cone"):
        apart = conelens.project(net, images, "6", [4, 2, 4, 1], route=route)
        assert apart.positions.tolist() == together.positions.tolist()
        assert apart.boxes.tolist() == together.boxes.tolist()
        assert relative(apart.pixels, together.pixels) < 1e-12


def test_full_route_runs_each_image_once(net: conelens.Network, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    forward = projection.forward_whole
    monkeypatch.setattr(projection, "forward_whole", lambda g, x, *a, **k: sizes.append(len(x)) or forward(g, x, *a, **k))
    conelens.project(net, images, "6", [1, 2, 3, 4, 5], "peak", [2, 2, 0, 2, 0])
    assert sizes == [2]


def test_crops_boxes_patches_and_pixels_fit_together(net: conelens.Network, images: Tensor) -> None:
    rows, channels, places = alive(net, images, "6")
    p = conelens.project(net, images, "6", channels, places, rows)
    layer = net["6"]
    patches = p.patches(images)
    assert patches.shape == p.crops.shape and p.crops.shape[2:] == layer.receptive_field
    for u, (row, (y, x)) in enumerate(zip(rows, places, strict=True)):
        top, left, bottom, right = p.boxes[u].tolist()
        assert (top, left) == (layer.offset[0] + layer.stride[0] * y, layer.offset[1] + layer.stride[1] * x)
        assert (bottom - top, right - left) == layer.receptive_field
        inside = p.pixels[u][:, max(top, 0) : bottom, max(left, 0) : right]
        assert torch.count_nonzero(p.pixels[u]) == torch.count_nonzero(inside)  # nothing outside the box
        cut = p.crops[u][:, max(-top, 0) : max(-top, 0) + inside.shape[1], max(-left, 0) : max(-left, 0) + inside.shape[2]]
        assert torch.equal(cut, inside)
        shown = patches[u][:, max(-top, 0) : max(-top, 0) + inside.shape[1], max(-left, 0) : max(-left, 0) + inside.shape[2]]
        assert torch.equal(shown, images[row][:, max(top, 0) : bottom, max(left, 0) : right])
    assert torch.equal(torch.cat(list(p.iter_pixels(5))), p.pixels)


def test_no_units_and_no_images(net: conelens.Network, images: Tensor) -> None:
    p = conelens.project(net, images[:0], "6", 4)
    assert len(p) == 0 and p.pixels.shape == (0, 3, 41, 37) and p.boxes.shape == (0, 4)
    assert len(conelens.project(net, images, "6", [], [], [], certify=True)) == 0


def test_dead_unit_is_named_and_zero(net: conelens.Network, images: Tensor) -> None:
    maps = net.forward(images, ["6"])["6"]
    channel, y, x = (maps[0] < 0).nonzero()[0].tolist()
    with pytest.warns(conelens.DeadUnitWarning, match=rf"6\[{channel}\] at \({y}, {x}\)"):
        p = conelens.project(net, images, "6", channel, (y, x), 0)
    assert not p.pixels.any() and p.values.tolist() == [0.0]


def test_projection_is_positively_homogeneous_in_scale(images: Tensor) -> None:
    model = chain()
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.bias.data.zero_()  # type: ignore[union-attr]
    net = conelens.trace(model, images)
    a, b = (conelens.project(net, images * s, "6", 4) for s in (1.0, 3.0))
    assert relative(b.pixels, 3 * a.pixels) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel": 10}, "channel: got 10, wanted 0..9"),
        ({"channel": -1}, "channel: got -1"),
        ({"channel": 1.5}, "channel: got 1.5, wanted whole numbers"),
        ({"channel": None}, "channel: got None"),
        ({"position": "middle"}, "position: got 'middle', wanted 'peak'"),
        ({"position": (0, 99)}, "position x: got 99"),
        ({"position": (1, 2, 3)}, r"position: got \(1, 2, 3\)"),
        ({"image": 4}, "image: got 4, wanted 0..3"),
        ({"channel": [1, 2, 3]}, "channel of 3 for 4 images"),
        ({"route": "fast"}, "route: got 'fast', wanted one of auto, cone, full"),
        (
            {"images": torch.zeros(1, 3, 40, 37, dtype=torch.float64)},
            r"images: got shape \(1, 3, 40, 37\), wanted \[N, 3, 41, 37\]",
        ),
        ({"images": torch.zeros(1, 3, 41, 37)}, "images: got torch.float32, wanted torch.float64"),
        ({"images": torch.full((1, 3, 41, 37), float("nan"), dtype=torch.float64)}, "NaN"),
        ({"images": [[1]]}, "images: got list"),
    ],
)
def test_bad_arguments_are_named(net: conelens.Network, images: Tensor, change: dict, message: str) -> None:
    arguments = {"images": images, "channel": 1, "position": "peak", **change}
    with pytest.raises(conelens.ArgumentError, match=message):
        conelens.project(net, layer="6", **arguments)


def test_unknown_layer_suggests_the_nearest(net: conelens.Network, images: Tensor) -> None:
    with pytest.raises(conelens.LayerError, match=r"did you mean.*conv3_1"):
        conelens.project(net, images, "conv3_3", 0)


# --- near ties -------------------------------------------------------------------------------------------------------


def planted(gap: float) -> tuple[nn.Sequential, Tensor]:
    """A pool over raw pixels whose best two values differ by ``gap`` in one window."""
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 1, 1, bias=False)).double().eval()
    model[1].weight.data.fill_(1.0)
    image = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    image[0, 0, 0, 0], image[0, 0, 1, 1], image[0, 0, 2:, 2:] = (
        1.0,
        1.0 - gap,
        torch.tensor([[0.5, 0.1], [0.2, 0.3]]),
    )
    return model, image


@pytest.mark.parametrize(("ulps", "near"), [(0, 1), (7, 1), (9, 0), (1e6, 0)])
def test_near_ties_are_those_within_eight_ulp(ulps: float, near: int) -> None:
    model, image = planted(ulps * torch.finfo(torch.float64).eps)
    net = conelens.trace(model, image)
    for route in ("cone", "full"):
        p = conelens.project(net, image, "1", 0, [(0, 0), (1, 1)], [0, 0], route=route, certify=True)
        assert p.near_ties is not None and p.tie_effect is not None
        assert p.near_ties.tolist() == [near, 0]
        # the whole signal moves to another pixel: |a - b| / |a| = sqrt(2)
        assert p.tie_effect.tolist() == pytest.approx([2**0.5 if near else 0.0, 0.0])


def test_differing_switches_between_routes_are_near_ties() -> None:
    """A white background and a letterboxed picture: the routes may differ only where certify says so."""
    torch.manual_seed(5)
    model = chain(torch.float32)
    noise = torch.rand(3, 3, 41, 37)
    noise[0, :, :, 20:] = 1.0  # white background
    noise[1, :, :10] = noise[1, :, 30:] = 0.0  # letterbox
    net = conelens.trace(model, noise)
    maps = net.forward(noise, ["6"])["6"]
    # not the faintest: the relative error of a seed that is a cancelled sum says nothing about switches
    rows, channels, ys, xs = (maps > 0.05 * maps.amax()).nonzero().T.tolist()
    places = list(zip(ys, xs, strict=True))
    full = conelens.project(net, noise, "6", channels, places, rows, route="full")
    cone = conelens.project(net, noise, "6", channels, places, rows, route="cone", certify=True)
    assert cone.near_ties is not None
    difference = (full.crops - cone.crops).flatten(1).norm(dim=1) / full.crops.flatten(1).norm(dim=1).clamp_min(1e-12)
    certain = cone.near_ties == 0
    assert bool(certain.any()) and bool((~certain).any())
    assert float(difference[certain].max()) < 1e-5


def test_results_are_ordinary_tensors(net: conelens.Network, images: Tensor) -> None:
    p = conelens.project(net, images, "6", 4)
    assert not p.crops.is_inference()
    leaf = p.crops.requires_grad_()
    leaf.square().sum().backward()
    assert leaf.grad is not None


def test_autocast_and_inference_mode_of_the_caller_change_nothing(images: Tensor) -> None:
    x = images.float()

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(x.shape[1], 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y * torch.nn.functional.relu6(y + 3) / 6)

    model = Gated().eval()
    plain = conelens.project(conelens.trace(model, x, policy="gradient"), x, "last", 1)
    with torch.autocast("cpu", torch.bfloat16):
        net = conelens.trace(model, x, policy="gradient")
        cast = conelens.project(net, x, "last", 1)
        table = conelens.top_peaks(net, x, ["last"], k=1)
        assert net(x).dtype == torch.float32
    with torch.inference_mode():
        net = conelens.trace(model, x, policy="gradient")
    assert torch.equal(cast.crops, plain.crops)
    assert torch.equal(conelens.project(net, x, "last", 1).crops, plain.crops)
    assert table.top("last", 1)[0].value == plain.values.max()


def test_a_network_that_gives_nan_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    net = conelens.trace(model, (1, 3, 3))
    net.graph[1].op.weight.data.fill_(float("nan"))
    with pytest.raises(conelens.ArgumentError, match="0 gives NaN"):
        conelens.project(net, torch.ones(1, 1, 3, 3), "0", 0, (1, 1))
