"""Tracing: every spelling of an operator gives the same graph, and layers get their names."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from conelens.errors import LayerError
from conelens.network import trace
from tests.kit.oracle import deconvnet_by_autograd, relative
from tests.kit.tracing import IMAGES, Lambda, check, kinds

# --- ReLU in every spelling ---------------------------------------------------------------------------------

RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp positional": lambda x: torch.clamp(x, 0),
    "clamp_": lambda x: x.clamp_(min=0.0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_min_": lambda x: x.clamp_min_(0),
    "torch.clip": lambda x: torch.clip(x, min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
    "maximum mirrored": lambda x: torch.maximum(torch.zeros_like(x), x),
    "torch.max": lambda x: torch.max(x, torch.zeros_like(x)),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "nn.Threshold": nn.Threshold(0, 0),
    "threshold_": lambda x: F.threshold_(x, 0, 0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where zeros": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "where method": lambda x: x.where(x > 0, torch.zeros_like(x)),
    "mask": lambda x: x * (x > 0),
    "mask float": lambda x: (x > 0).to(x.dtype) * x,
    "leaky without slope": lambda x: F.leaky_relu(x, 0.0),
    "nn.LeakyReLU(0)": nn.LeakyReLU(0.0),
}


@pytest.mark.parametrize("spelling", RELUS)
def test_every_spelling_of_relu_is_one_rectifier(spelling: str) -> None:
    images = IMAGES
    model = Lambda(RELUS[spelling]).double().eval()
    plain = Lambda(F.relu).double().eval()
    net = trace(model, images)
    assert kinds(net).count("relu") == 1
    assert set(kinds(net)) == {"input", "conv", "relu"}
    wanted, _ = deconvnet_by_autograd(plain, images, "last", [(0, 1, 4, 4), (1, 3, 0, 0)])
    got = conelens.project(net, images, "last", [1, 3], [(4, 4), (0, 0)], [0, 1])
    assert relative(got.pixels, wanted) < 1e-12


# --- names --------------------------------------------------------------------------------------------------


class Reuse(nn.Module):
    """One ReLU module called three times, and two functional calls beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()
        self.block = Lambda(lambda x: F.relu(F.relu(x) - 0.1), after=4)
        self.block.first = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv3(self.relu(self.conv2(self.relu(self.conv1(x))))))
        return F.relu(self.block(F.relu(x)))


def test_repeated_calls_are_numbered() -> None:
    net = check(Reuse(), "block.last")
    names = [layer.name for layer in net.layers()]
    for name in (
        "relu",
        "relu:1",
        "relu:2",
        "/relu",
        "/relu:1",
        "block/relu",
        "block/relu:1",
        "conv1",
        "block.first",
    ):
        assert name in names
    assert names.index("relu") < names.index("relu:1") < names.index("relu:2") < names.index("block/relu")
    assert net["relu:1"].shape == net["conv2"].shape


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = (
            nn.Conv2d(3, 8, 7, 2, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.layer1 = Residual(8)
        nn.init.uniform_(self.bn1.weight, -1, 1)
        nn.init.normal_(self.bn1.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x)))
        y += x
        return self.act(y)


def test_a_name_is_the_output_before_what_follows() -> None:
    """A ResNet's conv1 is the convolution's own output, although batch norm and an in-place ReLU follow."""
    model = Stem().double().eval()
    net = check(model, "layer1.b")
    out = net.forward(IMAGES, ["conv1", "bn1", "layer1.act", "layer1.act:1", "layer1"])
    with torch.no_grad():
        raw = model.conv1(IMAGES)
        normal = model.bn1(raw)
        assert relative(out["conv1"], raw) < 1e-14
        assert relative(out["bn1"], normal) < 1e-14
        assert relative(out["layer1"], model(IMAGES)) < 1e-14
    assert relative(out["layer1"], out["layer1.act:1"]) == 0
    assert (out["layer1.act"] >= 0).all()
    check(model, "conv1")


def _trunk(plan: list[int | str]) -> nn.Sequential:
    """Convolutions 3x3 of so many channels, "M" a pool 2/2: the features of VGG."""
    layers: list[nn.Module] = []
    channels = 3
    for item in plan:
        if item == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, int(item), 3, padding=1), nn.ReLU(inplace=True)]
            channels = int(item)
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """``features`` and three fully connected layers, as in torchvision."""

    def __init__(self, features: nn.Module, inputs: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(inputs, 8),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(8, 8),
            nn.ReLU(inplace=True),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


VGG16 = _trunk([1, 1, "M", 1, 1, "M", 1, 1, 1, "M", 1, 1, 1, "M", 1, 1, 1, "M"])
ALEXNET = nn.Sequential(
    nn.Conv2d(3, 2, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Conv2d(2, 2, 5, padding=2),
    nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
    nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, padding=1),
    nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, padding=1),
    nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
)  # fmt: skip
ZFNET = nn.Sequential(
    nn.Conv2d(3, 2, 7, 2, 1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.LocalResponseNorm(5), nn.Conv2d(2, 2, 5, 2), nn.ReLU(inplace=True),
    nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5), nn.Conv2d(2, 2, 3, padding=1),
    nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, padding=1),
    nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True),
    nn.MaxPool2d(3, 2, ceil_mode=True),
)  # fmt: skip


def test_vgg_names_and_aliases() -> None:
    net = trace(Classifier(VGG16, 49).eval(), (3, 224, 224))
    conv5_3 = net["conv5_3"]
    assert conv5_3.name == "features.28"
    assert net["block5_conv3"] == net["features.28"] == net["conv13"] == conv5_3
    assert net["features.29"] == net["relu5_3"]
    assert net["pool5"] == net["features.30"]
    assert (net["fc6"].name, net["fc7"].name, net["fc8"].name) == (
        "classifier.1",
        "classifier.4",
        "classifier.6",
    )
    with pytest.raises(LayerError, match=r"conv3_4.*did you mean .*conv3_"):
        net["conv3_4"]


def test_alexnet_names() -> None:
    net = trace(Classifier(ALEXNET, 72).eval(), (3, 224, 224))
    assert net["conv5"].name == "features.10"
    assert net["conv1"].name == "features.0"
    assert net["fc6"].name == "classifier.1"


# Zeiler & Fergus' tables: field / stride @ offset; offsets that a source leaves out are not asked for.
FIELDS: dict[str, tuple[nn.Module, str]] = {
    "zfnet": (
        ZFNET,
        "conv1 7/2@-1 pool1 11/4@-1 conv2 27/8@-1 pool2 43/16@-1 conv3 75/16@-17 conv4 107/16@-33 conv5 "
        "139/16@-49 pool5 171/32@-49",
    ),
    "alexnet": (
        ALEXNET,
        "conv1 11/4@-2 pool1 19/8 conv2 51/8@-18 pool2 67/16 conv3 99/16 conv4 131/16 conv5 163/16@-66 pool5 195/32",
    ),
    "vgg16": (
        VGG16,
        "conv1_1 3 conv1_2 5 pool1 6 conv2_1 10 conv2_2 14 pool2 16 conv3_1 24 conv3_2 32 conv3_3 40 pool3 "
        "44 conv4_1 60 conv4_2 76 conv4_3 92 pool4 100 "
        "conv5_1 132 conv5_2 164 conv5_3 196/16@-90 pool5 212/32",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_receptive_fields_of_the_literature(name: str) -> None:
    features, text = FIELDS[name]
    net = trace(features.eval(), (3, 224, 224))
    found = re.findall(r"(\w+) (\d+)(?:/(\d+))?(?:@(-?\d+))?", text)
    assert len(found) >= 8
    pools = {f"pool{i + 1}": layer for i, layer in enumerate(layer for layer in net.layers() if layer.kind == "max_pool")}
    if len(pools) == 3:  # the literature calls the pool after conv5 "pool5"
        pools["pool5"] = pools.pop("pool3")
    for layer_name, field, stride, offset in found:
        layer = pools.get(layer_name) or net[layer_name]
        assert layer.receptive_field == (int(field), int(field)), layer_name
        if stride:
            assert layer.stride == (int(stride), int(stride)), layer_name
        if offset:
            assert layer.offset == (int(offset), int(offset)), layer_name
    text = str(net.layers())
    assert text.splitlines()[0].split() == [
        "layer",
        "kind",
        "shape",
        "field",
        "stride",
        "offset",
        "also",
        "called",
    ]
    assert len(text.splitlines()) == len(net.layers()) + 1


# --- graphs -------------------------------------------------------------------------------------------------


def _shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def _in_place_add(x: Tensor) -> Tensor:
    y = F.relu(x)
    y += x
    return F.relu_(y)


def _alias(x: Tensor) -> Tensor:
    view = x.view(x.shape)
    x.relu_()
    return view * 2


def _half_in_place(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([F.relu(b), a], 1)


GRAPHS: dict[str, nn.Module] = {
    "residual with an in-place sum": Lambda(_in_place_add),
    "a view follows its base in place": Lambda(_alias),
    "chunk": Lambda(_half_in_place),
    "split": Lambda(lambda x: torch.cat([F.relu(p) for p in x.split([1, 3], 1)][::-1], 1)),
    "slices of channels": Lambda(lambda x: torch.cat([x[:, 2:], F.relu(x[:, :2])], 1)),
    "every other channel": Lambda(lambda x: F.relu(x[:, ::2]), after=2),
    "concatenation": Lambda(lambda x: torch.cat([F.relu(x), x, F.max_pool2d(x, 3, 1, 1)], 1), after=12),
    "channels of zeros": Lambda(lambda x: F.pad(F.relu(x), (0, 0, 0, 0, 1, 2)), after=7),
    "concatenation with zeros": Lambda(lambda x: torch.cat([x[:, :1], torch.zeros_like(x), F.relu(x)], 1), after=9),
    "stacked and summed": Lambda(lambda x: F.relu(torch.stack([x, F.relu(x)], 1).sum(1))),
    "broadcast sum": Lambda(lambda x: F.relu(x - x.mean((2, 3), keepdim=True))),
    "mean of channels": Lambda(lambda x: F.relu(x - x.mean(1, keepdim=True))),
    "mean by a view": Lambda(lambda x: F.relu(x - x.view(*x.shape[:2], -1).mean(-1)[:, :, None, None])),
    "flip and roll": Lambda(lambda x: F.relu(x.flip(3).roll(1, 2)[:, [2, 0, 1, 3]])),
    "maximum over space": Lambda(lambda x: F.relu(x - x.amax((2, 3), keepdim=True))),
    "channel shuffle by views": Lambda(lambda x: F.relu(_shuffle(x, 2))),
    "F.channel_shuffle": Lambda(lambda x: F.relu(F.channel_shuffle(x, 2))),
    "nn.ChannelShuffle": Lambda(nn.ChannelShuffle(2)),
    "unbound split": Lambda(lambda x: sum(F.relu(p) for p in x.view(x.shape[0], 2, 2, *x.shape[2:]).unbind(1)), after=2),
    "groups": Lambda(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2)), after=8),
    "depthwise": Lambda(nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.ReLU())),
    "dilation": Lambda(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, dilation=2, padding=2))),
    "stride that does not divide": Lambda(nn.Sequential(nn.Conv2d(4, 4, 2, 3), nn.ReLU())),
    "ceil mode": Lambda(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True))),
    "ceil mode with padding": Lambda(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True))),
    "overlapping pool": Lambda(nn.Sequential(nn.MaxPool2d(3, 2), nn.ReLU())),
    "dilated pool": Lambda(nn.Sequential(nn.MaxPool2d(2, 1, dilation=2), nn.ReLU())),
    "same padding, even kernel": Lambda(nn.Sequential(nn.Conv2d(4, 4, (4, 2), padding="same"), nn.ReLU())),
    "asymmetric F.pad": Lambda(lambda x: F.relu(F.pad(x, (0, 2, 1, 0)))),
    "padding with a value": Lambda(lambda x: F.relu(F.pad(x, (1, 1, 1, 1), value=0.7))),
    "negative padding crops": Lambda(lambda x: F.relu(F.pad(x, (-1, 0, -2, 1)))),
    "nn.ZeroPad2d": Lambda(nn.ZeroPad2d((1, 0, 2, 1))),
    "reflecting convolution": Lambda(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU())),
    "circular convolution": Lambda(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.ReLU())),
    "LRN module": Lambda(nn.Sequential(nn.ReLU(), nn.LocalResponseNorm(3, 0.1, 0.75, 2.0))),
    "LRN function": Lambda(lambda x: F.local_response_norm(F.relu(x), 3, alpha=0.1, beta=0.75, k=2.0)),
    "batch norm": Lambda(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())),
    "average pool": Lambda(nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False))),
    "average pool, ceil": Lambda(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, 2, ceil_mode=True))),
    "adaptive pools": Lambda(nn.Sequential(nn.AdaptiveAvgPool2d((7, 5)), nn.ReLU(), nn.AdaptiveAvgPool2d(4))),
    "upsampling": Lambda(nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReLU())),
    "crop": Lambda(lambda x: F.relu(x[:, :, 1:-1, 2:])),
    "dropout": Lambda(nn.Sequential(nn.Dropout2d(), nn.ReLU(), nn.Dropout())),
    "constants": Lambda(lambda x: F.relu(1 - 2 * (x + 0.25) / 3)),
    "per-channel constants": Lambda(lambda x: F.relu(x * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=x.dtype).view(1, 4, 1, 1))),
    "weighted sum": Lambda(lambda x: torch.add(F.relu(x), x, alpha=-0.5)),
    "difference": Lambda(lambda x: F.relu(F.relu(x) - x)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_equal_the_oracle(name: str) -> None:
    model = GRAPHS[name]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
            module.running_mean.normal_()  # type: ignore[union-attr]
    check(model)


def test_lrn_is_one_layer_in_both_spellings() -> None:
    for name in ("LRN module", "LRN function"):
        net = trace(GRAPHS[name].double().eval(), IMAGES)
        assert kinds(net) == ["input", "conv", "relu", "lrn", "conv"]


def test_shuffle_by_views_is_one_permutation() -> None:
    net = trace(GRAPHS["channel shuffle by views"].double().eval(), IMAGES)
    assert kinds(net) == ["input", "conv", "select", "relu", "conv"]
