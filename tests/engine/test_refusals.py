"""What has no rule is refused by name, and a trace that fails or succeeds leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from conelens.errors import ArgumentError, TraceError, UnsupportedOperatorError
from conelens.network import trace
from tests.kit.oracle import relative
from tests.kit.tracing import IMAGES, Lambda, check, kinds

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
    model = Lambda(lambda x: F.relu(x, inplace=True)).double().eval()
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
