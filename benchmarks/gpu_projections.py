"""Whole projections of VGG-16 units on a GPU, with random weights: top-down alone, and from pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from benchmarks import gpu_measure as measure
from benchmarks.gpu_measure import Machine, Row, compare
from benchmarks.plain_deconvnet import PlainDeconvnet
from conelens import projection
from conelens.execution import topdown as run_topdown
from conelens.models.trunks import vgg16_features

# units per call, plain projections per second and the promised factors: issue "Must show"
LAYERS = {
    "conv1_2": (4096, 150),
    "conv2_2": (2048, 150),
    "conv3_3": (512, 35),
    "conv4_3": (128, 8),
    "conv5_3": (32, 1.4),
}


def model() -> nn.Module:
    trunk = vgg16_features().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for layer in trunk.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return trunk.to(measure.DEVICE, memory_format=torch.channels_last)


def units_of(net: Any, name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the units, channels and interior places, spread over the map."""
    channels, height, width = net[name].shape
    at = torch.arange(count)
    places = torch.stack([height // 2 + at % 3 - 1, width // 2 + at // 3 % 3 - 1], 1)
    return at % 32, at * 7 % channels, places


def topdown_arguments(net: Any, images: Tensor, name: str, count: int) -> list[tuple[Any, ...]]:
    """What `project` hands to its top-down pass: plan, switches, seeds."""
    rows, channels, places = units_of(net, name, count)
    calls: list[tuple[Any, ...]] = []
    real = projection.topdown

    def record(*args: Any) -> Tensor:
        calls.append(args)
        return real(*args)

    with mock.patch.object(projection, "topdown", record):
        conelens.project(net, images, layer=name, channel=channels, position=places, image=rows, route="cone")
    return calls


def stock_crops(layers: list[nn.Module], channels: Tensor, values: Tensor, switches: list[Tensor]) -> Tensor:
    """The same crops with stock operators: natural windows, transposed convolutions, a real unpool."""
    last = layers[-1]
    signal = values.new_zeros(len(values), last.out_channels, 1, 1)
    signal = signal.to(memory_format=torch.channels_last)
    signal[torch.arange(len(values)), channels, 0, 0] = values
    switches = list(switches)
    for layer in reversed(layers):
        if isinstance(layer, nn.Conv2d):
            signal = F.conv_transpose2d(signal, layer.weight)
        elif isinstance(layer, nn.ReLU):
            signal = torch.relu_(signal)
        else:
            signal = F.max_unpool2d(signal, switches.pop(), 2, 2)
    return signal


def stock_switches(layers: list[nn.Module], count: int, device: torch.device) -> list[Tensor]:
    """Random positions of the maxima in every pool's window of the crop, as F.max_unpool2d wants them."""
    size, found = 1, []
    for at in range(len(layers) - 1, -1, -1):
        layer = layers[at]
        if isinstance(layer, nn.Conv2d):
            size += 2
        elif isinstance(layer, nn.MaxPool2d):
            channels = next(c.out_channels for c in reversed(layers[:at]) if isinstance(c, nn.Conv2d))
            shape = (count, channels, size, size)
            cell = torch.arange(size, device=device)
            dy, dx = (torch.randint(0, 2, shape, device=device) for _ in range(2))
            flat = (2 * cell[:, None] + dy) * 2 * size + 2 * cell + dx
            found.append(flat.contiguous(memory_format=torch.channels_last))
            size *= 2
    return found[::-1]


def layers_of(net_model: nn.Module, net: Any, name: str) -> list[nn.Module]:
    stop = int(net[name].name.rpartition(".")[2])
    return list(net_model.features)[: stop + 1]


def topdown_row(trunk: nn.Module, net: Any, images: Tensor, name: str, count: int) -> Row:
    calls = topdown_arguments(net, images, name, count)
    layers = layers_of(trunk, net, name)
    channels = units_of(net, name, count)[1].to(images.device)
    values = torch.rand(count, device=images.device)
    switches = stock_switches(layers, count, images.device)
    row = Row("top-down", f"switches given, {name}, {count} units", target=">= 0.8x stock crops")
    row = compare(row, {"ours": lambda: torch.cat([run_topdown(*call).flatten() for call in calls])}, {}, 0)
    # its switches are random: the times compare, the values do not
    return compare(row, {}, {"stock crops": lambda: stock_crops(layers, channels, values, switches)}, 0)


def from_pixels_row(trunk: nn.Module, net: Any, images: Tensor, name: str, count: int, promised: float) -> Row:
    """Times per 1000 projections: `count` of ours in a call, one per image of the plain ones."""
    rows, channels, places = units_of(net, name, count)
    few = len(images)
    plain = PlainDeconvnet(layers_of(trunk, net, name))
    first = tuple(part[:few].to(images.device) for part in (channels, places[:, 0], places[:, 1]))
    row = Row("from pixels", f"from pixels, {name}, ms per 1000", target=f">= {promised}x plain")

    def ours(some: slice) -> Any:
        return conelens.project(net, images, layer=name, channel=channels[some], position=places[some], image=rows[some])

    gate = {"gate": lambda: ours(slice(few)).pixels}
    row = compare(row, gate, {"plain": lambda: plain(images, first)}, 2e-3)
    row.ours.clear()
    row = compare(row, {"ours": lambda: ours(slice(count)).crops}, {}, 0)
    row.ours = {key: value / count * 1000 for key, value in row.ours.items()}
    row.others = {key: value / few * 1000 for key, value in row.others.items()}
    return row


def prepared() -> tuple[nn.Module, Any, Tensor]:
    trunk = model()
    net = conelens.trace(trunk, (3, 224, 224))
    images = torch.randn(32, 3, 224, 224, device=measure.DEVICE)
    return trunk, net, images.contiguous(memory_format=torch.channels_last)


def topdown(machine: Machine) -> Iterator[Row]:
    """Switches given: only the top-down pass, ours against stock operators on crops of the same size."""
    trunk, net, images = prepared()
    for name, (count, _) in LAYERS.items():
        with torch.inference_mode():
            yield topdown_row(trunk, net, images, name, count)


def from_pixels(machine: Machine) -> Iterator[Row]:
    """Cone forward and top-down, against plain whole images."""
    trunk, net, images = prepared()
    for name, (count, promised) in LAYERS.items():
        with torch.inference_mode():
            yield from_pixels_row(trunk, net, images, name, count, promised)
