"""Cases of whole projections: VGG-16 on photographs, forward pass included, positions given."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import conelens
from benchmarks.cases import Case, Floor, Target, compiled
from benchmarks.plain_deconvnet import PlainDeconvnet, Units
from conelens.assets import photographs
from conelens.cone import cone_macs
from conelens.data import ImageFolder
from conelens.models.registry import IMAGENET
from conelens.models.trunks import vgg16_features
from conelens.models.weights import load_weights

CL = torch.channels_last
WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "weights" / "vgg16_features_fp16.safetensors"
LAYERS = ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")
PROMISED = {"conv2_2": 150.0, "conv3_3": 33.0, "conv4_3": 9.0, "conv5_3": 2.0}
PLAIN = ("plain NCHW", "plain channels_last")
IMAGES, UNITS_PER_IMAGE = 8, 4
# Over many cones of photographs a near-tied switch falls differently with the order of additions: the memory formats
# of plain PyTorch alone differ by 2.6e-5 on one of the conv5_3 units.
MANY_TOLERANCE = 1e-4


@functools.cache
def model() -> nn.Module:
    """VGG-16 with its ImageNet weights where they lie beside the checkout, else He-random ones."""
    trunk = vgg16_features().eval().requires_grad_(False)
    if WEIGHTS.exists():
        return load_weights(trunk, WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for layer in trunk.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return trunk


def weights_note() -> str:
    return "ImageNet weights" if WEIGHTS.exists() else "random weights (no weight file beside the checkout)"


@functools.cache
def network() -> Any:
    return conelens.trace(model(), (3, 224, 224))


@functools.cache
def images() -> Tensor:
    folder = ImageFolder(photographs(), IMAGENET)
    return torch.stack([folder[i] for i in range(IMAGES)])


@dataclass
class ProjectionInputs:
    layer: str
    images: Tensor
    images_last: Tensor
    rows: Tensor
    units: Units
    values: Tensor
    plain: PlainDeconvnet
    plain_last: PlainDeconvnet
    truncated: nn.Sequential


def _layers(name: str, last: bool) -> list[nn.Module]:
    """The trunk up to layer `name`, a copy of its own."""
    stop = network()[name].name.rpartition(".")[2]
    layers = []
    for layer in list(model().features)[: int(stop) + 1]:
        if isinstance(layer, nn.Conv2d):
            copy = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
            copy.load_state_dict(layer.state_dict())
            layer = copy.requires_grad_(False).to(memory_format=CL if last else torch.contiguous_format)
        layers.append(layer)
    return layers


def _inputs(name: str, some: Tensor, rows: Tensor, units: Units) -> ProjectionInputs:
    layers, maps = _layers(name, last=False), network().forward(some, layers=[name])[name]
    channel, y, x = units
    return ProjectionInputs(
        name, some, some.to(memory_format=CL), rows, units, maps[rows, channel, y, x].clamp_min(0),
        PlainDeconvnet(layers), PlainDeconvnet(_layers(name, last=True)), nn.Sequential(*layers),
    )  # fmt: skip


def _one(name: str) -> ProjectionInputs:
    """The unit in the middle of the map of the first photograph that is most active there."""
    some = images()[:1]
    maps = network().forward(some, layers=[name])[name]
    y, x = maps.shape[2] // 2, maps.shape[3] // 2
    channel = int(maps[0, :, y, x].argmax())
    units = (torch.tensor([channel]), torch.tensor([y]), torch.tensor([x]))
    return _inputs(name, some, torch.zeros(1, dtype=torch.int64), units)


def _many(name: str, count: int) -> ProjectionInputs:
    """For each of `count` photographs the four most active channels, each at its peak."""
    some = images()[:count]
    flat = network().forward(some, layers=[name])[name]
    width = flat.shape[3]
    values, positions = flat.flatten(2).max(2)
    channels = values.topk(UNITS_PER_IMAGE, 1).indices
    places = positions.gather(1, channels).flatten()
    rows = torch.arange(count).repeat_interleave(UNITS_PER_IMAGE)
    return _inputs(name, some, rows, (channels.flatten(), places // width, places % width))


def _ours(inputs: ProjectionInputs) -> Any:
    channel, y, x = inputs.units
    return conelens.project(network(), inputs.images, inputs.layer, channel, torch.stack([y, x], 1), image=inputs.rows)


def _without_gradients(run: Callable[[ProjectionInputs], Tensor]) -> Callable[[ProjectionInputs], Tensor]:
    return torch.inference_mode()(run)


def _captum(inputs: ProjectionInputs) -> Tensor:
    """Captum seeds with one, the deconvnet with the activation; the rest is positively homogeneous."""
    from captum.attr import NeuronDeconvolution

    method = NeuronDeconvolution(inputs.truncated, inputs.truncated[-1])
    unit = tuple(int(part) for part in inputs.units)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its hooks on every call
        return method.attribute(inputs.images, unit).detach() * inputs.values


def _read(_: ProjectionInputs, result: Any) -> tuple[Tensor]:
    """Every result on whole images."""
    return ((result if isinstance(result, Tensor) else result.pixels),)


def _floor(inputs: ProjectionInputs) -> Floor:
    """Dense multiply-adds of the cones, once up and once down."""
    index = network().node(inputs.layer).index
    return Floor("flops", 2 * 2 * cone_macs(network().graph, index) * len(inputs.rows))


def one_unit(name: str) -> Case:
    compiled_plain = compiled(lambda plain, some, *units: plain(some, units))
    return Case(
        section="VGG-16, one unit of one photograph, forward included",
        name=name,
        inputs=lambda: _one(name),
        ours={"conelens": _ours},
        others={
            "plain NCHW": _without_gradients(lambda i: i.plain(i.images, i.units)),
            "plain channels_last": _without_gradients(lambda i: i.plain_last(i.images_last, i.units)),
            "torch.compile": _without_gradients(lambda i: compiled_plain(i.plain, i.images, *i.units)),
            "Captum": _captum,
        },
        read=_read,
        floor=_floor,
        tolerance=1e-5,
        targets=(Target("conelens", PROMISED[name], PLAIN),) if name in PROMISED else (),
    )


def many_units(name: str) -> Case:
    return Case(
        section=f"VGG-16, {IMAGES * UNITS_PER_IMAGE} units of {IMAGES} photographs, forward included",
        name=name,
        inputs=lambda: _many(name, IMAGES),
        check_inputs=lambda: _many(name, 1),
        check_part=1 / IMAGES,
        ours={"conelens": _ours},
        others={
            "plain one by one": _without_gradients(lambda i: i.plain.many_one_by_one(i.images, i.rows, i.units)),
            "plain batched NCHW": _without_gradients(lambda i: i.plain.many_at_once(i.images, i.rows, i.units)),
            "plain batched channels_last": _without_gradients(
                lambda i: i.plain_last.many_at_once(i.images_last, i.rows, i.units)
            ),
        },
        read=_read,
        floor=_floor,
        tolerance=MANY_TOLERANCE,
    )


def cases() -> list[Case]:
    return [*map(one_unit, LAYERS), *map(many_units, LAYERS)]
