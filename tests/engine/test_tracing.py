"""Tracing: every spelling of an operator gives the same graph, layers get their names, and what has no rule
is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from conelens.errors import ArgumentError, LayerError, TraceError, UnsupportedOperatorError
from conelens.network import Network, trace
from tests.kit.oracle import deconvnet_by_autograd, relative


class Lambda(nn.Module):
    """conv → ``function`` → conv, the second one named ``last``."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        channels: int = 4,
        after: int | None = None,
        **modules: nn.Module,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.last = nn.Conv2d(after or channels, 5, 3)
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


IMAGES = torch.randn(2, 3, 13, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def kinds(net: Network) -> list[str]:
    return [layer.kind for layer in net.layers()]


def check(model: nn.Module, layer: str = "last", images: Tensor = IMAGES, policy: dict[str, str] | None = None) -> Network:
    """Trace, compare the forward pass, and project a few units of ``layer`` against the oracle."""
    model = model.double().eval()
    net = trace(model, images, policy)
    with torch.no_grad():
        expected = model(images.clone())
    assert relative(net(images), expected) < 1e-13
    channels, height, width = net[layer].shape
    units = [
        (0, 0, 0, 0),
        (1, channels - 1, height - 1, width - 1),
        (1, channels // 2, height // 2, width // 2),
    ]
    wanted, values = deconvnet_by_autograd(model, images, layer, units, policy)
    got = conelens.project(net, images, layer, [u[1] for u in units], [u[2:] for u in units], [u[0] for u in units])
    assert torch.allclose(got.values, values, rtol=1e-12, atol=1e-14)
    assert relative(got.pixels, wanted) < 1e-12
    return net


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


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("relu6", {"relu6": "clamp"}), ("silu", {"silu": "clamp"}), ("silu", {"silu": "gradient"}),
        ("swish by hand", {"silu": "clamp"}),
        ("hardswish by hand", {"hardswish": "clamp"}), ("leaky_relu", {"leaky_relu": "clamp"}),
        ("leaky_relu", {"leaky_relu": "gradient"}),
        ("gelu", {"gelu": "gradient"}), ("gate", {"gate": "hold"}), ("map gate", {"gate": "hold"}),
        ("instance_norm", {"instance_norm": "hold"}), ("group_norm", {"group_norm": "hold"}),
    ],
)  # fmt: skip
def test_a_stated_policy_is_followed(name: str, policy: dict[str, str]) -> None:
    model = WITHOUT_RULE[name][0]
    net = check(model, policy=policy)
    operator = WITHOUT_RULE[name][1]
    with pytest.raises(UnsupportedOperatorError, match=operator):
        trace(model, IMAGES)
    assert operator in str(net.layers())
    if operator == "gate" or operator.endswith("norm"):
        check(model, policy={operator: "hold"})
    else:
        check(model, policy={operator: "clamp"})


# --- refusals -----------------------------------------------------------------------------------------------


class _Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x * torch.sigmoid(self.down(F.adaptive_avg_pool2d(x, 1))))


class _Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.look(x))


WITHOUT_RULE: dict[str, tuple[nn.Module, str]] = {
    "relu6": (Lambda(nn.ReLU6(inplace=True)), "relu6"),
    "relu6 function": (Lambda(F.relu6), "relu6"),
    "relu6 by clamp": (Lambda(lambda x: x.clamp(0, 6)), "relu6"),
    "silu": (Lambda(nn.SiLU()), "silu"),
    "swish by hand": (Lambda(lambda x: x * torch.sigmoid(x)), "silu"),
    "hardswish": (Lambda(nn.Hardswish()), "hardswish"),
    "hardswish by hand": (Lambda(lambda x: x * F.relu6(x + 3.0) / 6.0), "hardswish"),
    "gelu": (Lambda(nn.GELU()), "gelu"),
    "leaky_relu": (Lambda(nn.LeakyReLU(0.1)), "leaky_relu"),
    "prelu": (Lambda(nn.PReLU(4)), "prelu"),
    "elu": (Lambda(nn.ELU()), "elu"),
    "tanh": (Lambda(torch.tanh), "tanh"),
    "instance_norm": (Lambda(nn.InstanceNorm2d(4, affine=True)), "instance_norm"),
    "group_norm": (
        Lambda(lambda x: F.relu(F.group_norm(x, 2, torch.tensor([1.0, -2, 0.5, 1], dtype=x.dtype)))),
        "group_norm",
    ),
    "gate": (Lambda(_Squeeze()), "gate"),
    "map gate": (Lambda(_Attend()), "gate"),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_operators_without_a_canonical_rule_ask_for_a_policy(name: str) -> None:
    model, operator = WITHOUT_RULE[name]
    with pytest.raises(UnsupportedOperatorError, match=rf"{operator}.*policy=\{{'{operator}'"):
        trace(model.double().eval(), IMAGES)


def test_an_operator_after_the_last_filter_is_no_obstacle() -> None:
    """A softmax at the output is never on a unit's way down, unless one projects from it."""
    model = (
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
            nn.Softmax(1),
        )
        .double()
        .eval()
    )
    net = trace(model, IMAGES)
    conelens.project(net, IMAGES, "4", 1, (0, 0))
    with pytest.raises(UnsupportedOperatorError, match="softmax"):
        conelens.project(net, IMAGES, "5", 1, (0, 0))


class _Rectify(torch.autograd.Function):
    """A hand-made ReLU: its forward pass is seen, and its own backward pass plays no part in a deconvnet."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 7


class _Hidden(torch.autograd.Function):
    """A function whose calls cannot be seen."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x.data.abs() + x * 0


class _Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(4, 36)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean((2, 3)))[:1].view(4, 1, 3, 3)
        return F.conv2d(x, weight, padding=1, groups=4)


def _depends_on_data(x: Tensor) -> Tensor:
    return F.relu(x) if x.sum() > 0 else x


def _reads_values(x: Tensor) -> Tensor:
    return F.relu(x * x.max().item())


def _stale_view(x: Tensor) -> Tensor:
    part = x[:, :2]
    x.relu_()
    return torch.cat([part, part], 1)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "unknown operator": (lambda x: torch.cumsum(x, 1), "cumsum in"),
    "fft": (lambda x: torch.fft.rfft2(x).abs(), "fft_rfft2 in"),
    "einsum": (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(4, dtype=x.dtype)), "einsum in"),
    "hidden calls": (_Hidden.apply, "without a tensor that depends on its input"),
    "values carried through NumPy": (
        lambda x: torch.from_numpy(x.numpy().copy()),
        "numpy.*depends on the data",
    ),
    "control flow on data": (_depends_on_data, "sum in .*depends on the data"),
    "control flow on a comparison": (lambda x: F.relu(x) if (x > 0).any() else x, "any in"),
    "values read into Python": (_reads_values, "max in .*depends on the data"),
    "dynamic filters": (_Dynamic(), "mixes or drops samples"),
    "samples mixed by the mean": (lambda x: x - x.mean(0, keepdim=True), "mean in"),
    "samples rolled": (lambda x: x.roll(1, 0), "roll in"),
    "samples reversed": (lambda x: x.flip(0), "flip in"),
    "samples concatenated": (lambda x: torch.cat([x[:1], x[:1]]), "in"),
    "batch statistics": (nn.BatchNorm2d(4, track_running_stats=False), "batch_norm.*batch statistics"),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm in"),
    "view used after its base changed in place": (_stale_view, "in place"),
    "product of two maps": (lambda x: F.max_pool2d(x * x.roll(1, 3), 2), "product of two maps"),
    "softmax over space": (lambda x: x.flatten(2).softmax(2), "softmax in"),
    "matrix product": (lambda x: x @ x.transpose(2, 3), "matmul in"),
    "space as channels": (lambda x: F.relu(x.transpose(1, 2)), "relu in .*mixes channels and space"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    model = Lambda(function).double().eval()
    model.last = nn.Identity()  # type: ignore[assignment]
    with pytest.raises((UnsupportedOperatorError, TraceError), match=message):
        trace(model, IMAGES, policy="clamp")


def test_a_hand_made_relu_is_seen_through() -> None:
    model = Lambda(_Rectify.apply).double().eval()
    net = trace(model, IMAGES)
    assert kinds(net) == ["input", "conv", "relu", "conv"]
    assert relative(net(IMAGES), Lambda(F.relu).double()(IMAGES)) < 1e-14


def test_the_place_of_an_unknown_operator_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Lambda(lambda x: x.cumsum(1))))
    model[1][1].first = nn.Identity()
    with pytest.raises(UnsupportedOperatorError, match=r"cumsum in 1\.1"):
        trace(model.double().eval(), IMAGES)


def test_random_numbers_are_found_by_verification() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + torch.rand(1, dtype=x.dtype))

    with pytest.raises(TraceError, match="second input"):
        trace(Noisy(), IMAGES)


def test_a_network_that_amplifies_rounding_is_not_mistaken_for_another() -> None:
    """Its output moves more by one unit in the last place of the image than by the order of the additions."""

    class Chaos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.pool, self.last = nn.AvgPool2d(3, 1), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.pool(x))
            for _ in range(60):  # the logistic map: every step doubles an error
                x = x * (1 - x) * 3.99
            return self.last(x)

    trace(Chaos().double().eval(), IMAGES, policy="clamp")


def test_torchscript_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))))
    with pytest.raises(UnsupportedOperatorError, match="1 is a TorchScript module"):
        trace(model.double().eval(), IMAGES)


@pytest.mark.parametrize("module", [nn.BatchNorm2d(4), nn.Dropout()])
def test_training_mode_is_refused(module: nn.Module) -> None:
    model = Lambda(module, inner=module).double().train()
    with pytest.raises(ArgumentError, match=r"training mode; call model.eval\(\)"):
        trace(model, IMAGES)


def test_functional_dropout_in_training_is_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match="dropout is active"):
        trace(Lambda(lambda x: F.dropout(x, 0.5, True)).double().eval(), IMAGES)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda x: x, (3, 8, 8), "wanted a torch.nn.Module"),
        (nn.Conv2d(3, 4, 3), (3, 8), "shape"),
        (nn.Conv2d(3, 4, 3), torch.zeros(3, 8, 8), "wanted"),
        (nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8, dtype=torch.float64), "model is torch.float32"),
    ],
)
def test_wrong_arguments(model: nn.Module, example: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        trace(model, example)  # type: ignore[arg-type]


def test_wrong_policy() -> None:
    with pytest.raises(ArgumentError, match="wanted one of clamp, gradient"):
        trace(nn.Conv2d(3, 4, 3), (3, 8, 8), {"relu6": "ignore"})


def test_a_model_without_a_tensor_to_trace_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "nothing"

    with pytest.raises(TraceError, match="returned str"):
        trace(Nothing(), (3, 8, 8))


def test_the_model_and_the_example_stay_as_they_were() -> None:
    model = Stem().double().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    example = IMAGES.clone()
    trace(model, example)
    assert torch.equal(example, IMAGES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_further_names_are_aliases() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    net = conelens.trace(model, (1, 5, 5), names={"edges": "0"})
    assert net["edges"].index == net["0"].index
    with pytest.raises(conelens.LayerError, match="got '7'"):
        conelens.trace(model, (1, 5, 5), names={"edges": "7"})


def test_a_failed_trace_leaves_no_hooks_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.ReLU())).eval()
    with pytest.raises(conelens.UnsupportedOperatorError, match="TorchScript"):
        conelens.trace(model, (3, 5, 5))
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_writing_into_a_part_is_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            y[:, 0] = 0
            return y

    with pytest.raises(conelens.UnsupportedOperatorError, match="writes into a part"):
        conelens.trace(Net(), (3, 5, 5))


def test_a_constant_beside_the_map_is_no_output() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(3), torch.relu(x)

    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(conelens.trace(Net(), (2, 4, 4))(x), x.clamp_min(0))


def test_a_name_in_use_is_no_alias_of_another_layer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    with pytest.raises(conelens.ArgumentError, match="'1' is already the layer"):
        conelens.trace(model, (1, 5, 5), names={"1": "0"})


def test_large_maps_are_probed_in_parts() -> None:
    net = conelens.trace(nn.AvgPool2d(3, 2, 1).eval(), (1, 700, 900))
    x = torch.randn(1, 1, 700, 900)
    assert torch.allclose(net(x), nn.functional.avg_pool2d(x, 3, 2, 1), atol=1e-6)
