"""The doors for users of Captum and MONAI: their calls, their numbers."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from conelens.compat import _traced
from conelens.compat.captum import Occlusion
from conelens.compat.monai import OcclusionSensitivity
from conelens.errors import ArgumentError
from conelens.occlusion import make_windows
from tests.kit.compare import relative

IMAGES = torch.randn(2, 3, 21, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
CALL: dict[str, Any] = {"sliding_window_shapes": (3, 5, 6), "strides": (3, 4, 5)}


class Squeeze(nn.Module):
    """A gate that depends on the whole map, and operators without a canonical way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * torch.sigmoid(self.down(F.adaptive_avg_pool2d(x, 1))))


def classifier(*between: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), *between, nn.Conv2d(8, 6, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).to(dtype).eval()


def captum(forward: Callable[..., Any]) -> Any:
    return pytest.importorskip("captum.attr", reason="needs the extra 'test': Captum to compare with").Occlusion(forward)


@pytest.fixture(autouse=True)
def _no_silent_reruns() -> Iterator[None]:
    """A warning that everything runs anew is an error, unless the test expects it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="every position runs everything anew")
        yield


def assert_equal(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert got.device == wanted.device
    assert wanted.norm() > 0
    assert relative(got, wanted) <= tolerance
    assert not got.requires_grad
    assert not got.is_inference()


# --- Captum, where the changed region alone is computed --------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"target": 1}, {"target": -1}, {"target": torch.tensor(2)}, {"target": [1, 2]}, {"target": torch.tensor([3, 0])},
        {"target": (2,)}, {"target": [(1,), (4,)]}, {"target": (slice(1, 3),)}, {},
        {"target": 1, "strides": None, "sliding_window_shapes": (3, 20, 22)}, {"target": 1, "strides": 2},
        {"target": 1, "strides": (1, 5, 6)}, {"target": 1, "strides": (7, 30, 4), "sliding_window_shapes": (3, 21, 5)},
        {"target": 1, "baselines": 0.3}, {"target": 1, "baselines": 1}, {"target": 1, "baselines": IMAGES.flip(0)},
        {"target": 1, "baselines": IMAGES[0].mean((1, 2), keepdim=True)}, {"target": 1, "baselines": IMAGES[0, 0, 0]},
        {"target": 1, "perturbations_per_eval": 7},
    ],
)  # fmt: skip
def test_captum_numbers(call: dict[str, Any]) -> None:
    model = classifier()
    call = CALL | call
    assert_equal(Occlusion(model).attribute(IMAGES, **call), captum(model).attribute(IMAGES, **call))


def test_captum_numbers_of_a_map_and_a_vector_of_one() -> None:
    model = classifier()[:5]
    for target in ((2, 3, 1), [(2, 3, 1), (0, 1, 1)], (2, 3)):
        call = CALL | {"target": target}
        assert_equal(Occlusion(model).attribute(IMAGES, **call), captum(model).attribute(IMAGES, **call))
    single = nn.Sequential(*classifier()[:-1], nn.Linear(24, 1).double())
    assert_equal(Occlusion(single).attribute(IMAGES, **CALL), captum(single).attribute(IMAGES, **CALL))


def test_captum_numbers_with_gates_and_operators_that_have_no_way_down() -> None:
    model = classifier(Squeeze(), nn.ReLU6(), nn.Hardswish())
    call = CALL | {"target": 3}
    assert_equal(Occlusion(model).attribute(IMAGES, **call), captum(model).attribute(IMAGES, **call))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_captum_numbers_in_single_and_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    model, images = classifier(dtype=dtype), IMAGES.to(dtype)
    call = {"target": 1, "sliding_window_shapes": (3, 9, 9), "strides": (3, 6, 6)}
    assert_equal(Occlusion(model).attribute(images, **call), captum(model).attribute(images, **call), tolerance)


def test_tuples_gradients_and_the_inputs_themselves_are_kept() -> None:
    model, images = classifier(), IMAGES.clone().requires_grad_()
    (got,) = Occlusion(model).attribute((images,), **CALL, target=1)
    assert_equal(got, captum(model).attribute(IMAGES, **CALL, target=1))
    assert torch.equal(images, IMAGES)
    assert images.grad is None
    got += 1  # an ordinary tensor, which its owner may write to


# --- one trace, until the model changes ------------------------------------------------------------------------------------


def test_traces_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    real = _traced.trace
    monkeypatch.setattr(_traced, "trace", lambda *a, **k: traces.append(1) or real(*a, **k))
    model = classifier()
    ours, theirs = Occlusion(model), captum(model)
    call = CALL | {"target": 1}

    def count() -> int:
        assert_equal(ours.attribute(IMAGES, **call), theirs.attribute(IMAGES, **call))
        return len(traces)

    assert [count(), count()] == [1, 1]
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-4  # what an optimiser does
    assert [count(), count()] == [2, 2]
    model[0].weight.data = model[0].weight.data * 1.0001
    assert [count(), count()] == [3, 3]
    model[7] = nn.Linear(24, 5).double().eval()
    assert [count(), count()] == [4, 4]
    model[2].stride = 3  # no tensor at all
    assert [count(), count()] == [5, 5]
    images = IMAGES[:, :, :18]
    assert_equal(ours.attribute(images, **call), theirs.attribute(images, **call))
    assert len(traces) == 6


def test_an_edit_that_the_output_hides_and_no_version_counts_is_seen() -> None:
    torch.manual_seed(7)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    model = nn.Sequential(*layers, nn.Softmax(1)).eval()  # batch norm is folded at the trace: no weight of its own is read
    with torch.no_grad():
        model[5].bias[1] = 15.0  # so sure of one class that nothing shows at the output of the clean images
    images, call = IMAGES.float(), {"sliding_window_shapes": (3, 9, 9), "strides": (3, 6, 6), "target": 2}
    ours, theirs = Occlusion(model), captum(model)
    assert_equal(ours.attribute(images, **call), theirs.attribute(images, **call), 1e-4)
    model[1].weight.data[2] = 1.5
    model[1].running_var.data[:2] = model[1].running_var.data[:2].flip(0) * torch.tensor([4.0, 0.25])
    assert_equal(ours.attribute(images, **call), theirs.attribute(images, **call), 1e-4)
    model[0].weight.data.mul_(1.01)  # read where it is, but the traces of it must not be trusted blindly either
    assert_equal(ours.attribute(images, **call), theirs.attribute(images, **call), 1e-4)


# --- Captum, where everything runs anew ------------------------------------------------------------------------------------


def two_inputs(x: Tensor, y: Tensor, scale: float, offset: Tensor) -> Tensor:
    assert len(x) == len(offset)
    return (x**2).flatten(1).cumsum(1)[:, ::40] * scale + y.sum(1, keepdim=True) * offset[:, None]


class Averaging(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x**2).mean()


PLAIN: dict[str, tuple[Callable[..., Any], Any, dict[str, Any], str]] = {
    "a function": (lambda x: classifier()(x), IMAGES, CALL | {"target": 1}, r"only a torch\.nn\.Module"),
    "batches": (lambda x: classifier()(x), IMAGES, CALL | {"target": [1, 2], "perturbations_per_eval": 7}, "only a torch"),
    "some channels": (
        classifier(), IMAGES, {"sliding_window_shapes": (2, 9, 9), "strides": (1, 6, 6), "target": 1}, "2 of 3 channels",
    ),
    "several inputs": (
        two_inputs, (IMAGES, torch.arange(10.0, dtype=torch.float64).reshape(2, 5)),
        {
            "sliding_window_shapes": ((3, 9, 9), (2,)), "strides": (5, (1,)), "baselines": (0.5, IMAGES[0, 0, 0, :5]),
            "target": 2, "additional_forward_args": (2.0, torch.tensor([1.0, 3.0])), "perturbations_per_eval": 4,
        },
        "only a torch",
    ),
    "volumes": (
        nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double().eval(), IMAGES[:, None],
        {"sliding_window_shapes": (1, 2, 9, 9), "strides": (1, 1, 6, 6), "target": 1}, "no images",
    ),
    "one value for the batch": (Averaging(), IMAGES, CALL, "because"),
    "a number": (lambda x: float(x.max()), IMAGES, CALL, "only a torch"),
    "the data decide": (
        nn.Sequential(classifier(), type("Flip", (nn.Module,), {"forward": lambda self, x: -x if x.mean() > -0.1 else x})()),
        IMAGES, CALL | {"target": 1}, "because",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_captum_numbers_where_everything_runs_anew(case: str) -> None:
    forward, inputs, call, reason = PLAIN[case]
    wanted = captum(forward).attribute(inputs, **call)
    with pytest.warns(UserWarning, match=f"runs everything anew.*{reason}"):
        got = Occlusion(forward).attribute(inputs, **call)
    for one, other in zip(got, wanted, strict=True) if isinstance(inputs, tuple) else [(got, wanted)]:
        assert_equal(one, other)


def test_values_that_are_not_finite_are_named() -> None:
    with pytest.warns(UserWarning, match="anew.*hold NaN or infinity"):
        got = Occlusion(nn.Sequential(nn.Hardtanh(), classifier())).attribute(IMAGES, **CALL, target=1, baselines=torch.inf)
    wanted = Occlusion(nn.Sequential(nn.Hardtanh(), classifier())).attribute(IMAGES, **CALL, target=1, baselines=9)
    assert_equal(got, wanted)


def test_a_model_in_training_mode_runs_as_in_captum() -> None:
    ours, theirs = (nn.Sequential(nn.BatchNorm2d(3), classifier()).double().train() for _ in range(2))
    call = CALL | {"target": 1}
    wanted = captum(theirs).attribute(IMAGES, **call)
    with pytest.warns(UserWarning, match=r"anew.*training mode; call model\.eval\(\) first"):
        got = Occlusion(ours).attribute(IMAGES, **call)
    assert_equal(got, wanted)
    assert_equal(ours[0].running_mean, theirs[0].running_mean)  # the same batches in the same order
    assert ours.training


# --- what does not fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sliding_window_shapes": (3, 22, 5)}, r"sliding_window_shapes: got \(3, 22, 5\), larger than"),
        ({"sliding_window_shapes": (5, 5)}, r"sliding_window_shapes.*wanted 3 positive numbers"),
        ({"sliding_window_shapes": (3, 0, 5)}, "sliding_window_shapes"),
        ({"sliding_window_shapes": ((3, 5, 5), (3, 5, 5))}, r"sliding_window_shapes.*each of the 1 input"),
        ({"strides": (3, 6, 5)}, r"strides.*leave values uncovered"),
        ({"strides": 0}, "strides: got 0"),
        ({"strides": (3, 2)}, r"strides: got \(3, 2\)"),
        ({"baselines": torch.zeros(7)}, r"baselines: got shape \[7\]"),
        ({"baselines": "mean"}, "baselines: got str"),
        ({"baselines": (0, 0)}, "baselines"),
        ({"target": 5}, r"target: got 5.*0 to 4"),
        ({"target": [1]}, "one target for each of the 2"),
        ({"target": (1, 1)}, "at most 1 numbers"),
        ({"target": 1.0}, r"target: got 1\.0"),
        ({"target": torch.tensor([0.5, 1])}, r"target: got tensor.*whole numbers"),
        ({"perturbations_per_eval": 0}, "perturbations_per_eval: got 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Occlusion(classifier()).attribute(IMAGES, **(CALL | {"target": 1} | call))


def test_inputs_and_functions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match="forward_func: got int"):
        Occlusion(3)  # type: ignore[arg-type]
    for inputs in (IMAGES[:0], [IMAGES], (), torch.tensor(1.0)):
        with pytest.raises(ArgumentError, match="inputs: wanted a tensor with the batch first"):
            Occlusion(classifier()).attribute(inputs, **CALL, target=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="forward_func: returned tuple"):
        Occlusion(lambda x: (x, x)).attribute(IMAGES, **CALL)
    with pytest.raises(ArgumentError, match="one value for the whole batch"):
        Occlusion(Averaging()).attribute(IMAGES, **CALL, target=1)
    with pytest.warns(UserWarning, match="anew"), pytest.raises(ArgumentError, match="does not grow with the batch"):
        Occlusion(Averaging()).attribute(IMAGES, **CALL, perturbations_per_eval=2)


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    console = pytest.importorskip("conelens.cli.console", reason="needs the extra 'cli'")
    model = classifier()
    seen = Occlusion(model).attribute(IMAGES, **CALL, target=1, show_progress=True)
    assert torch.equal(seen, Occlusion(model).attribute(IMAGES, **CALL, target=1))
    monkeypatch.setattr(console, "ERR", console.Console(stderr=True, force_terminal=True))
    capsys.readouterr()
    Occlusion(model).attribute(IMAGES, **CALL, target=1, show_progress=True)
    output = capsys.readouterr()
    assert "Occlusion attribution" in output.err
    assert not output.out


# --- MONAI -----------------------------------------------------------------------------------------------------------------


def sensitivity(
    model: nn.Module, x: Tensor, mask: tuple[int, ...], step: tuple[int, ...], box: list[tuple[int, int]],
    show: Callable[[Tensor], Tensor], activate: Callable[[Tensor], Tensor], weight: Tensor,
) -> Tensor:  # fmt: skip
    """MONAI's map, window by window and pixel by pixel, for a sweep inside ``box``, whose last window is moved inwards."""
    starts = []
    for (low, high), size, stride in zip(box, mask, step):
        row = [low]
        while row[-1] + size < high:
            row.append(min(row[-1] + stride, high - size))
        starts.append(row)
    total: Any = 0
    count = torch.zeros(x.shape[2:], dtype=x.dtype)
    for corner in itertools.product(*starts):
        cut = tuple(slice(a, a + size) for a, size in zip(corner, mask))
        covered = x.clone()
        covered[(slice(None), slice(None), *cut)] = show(x[(slice(None), slice(None), *cut)])
        with torch.no_grad():
            values = activate(model(covered))[0]
        here = torch.zeros_like(count)
        here[cut] = weight
        total = total + values.reshape(-1, *[1] * here.ndim) * here
        count += here
    return (total / count)[None]


ONE = IMAGES[:1]
WHOLE = [(0, 21), (0, 23)]
ones = torch.ones(())
ANEW = "every position runs everything anew"


def softmax(x: Tensor) -> Tensor:
    return x.softmax(1)


@pytest.mark.parametrize(("mode", "shown"), [(0.5, 0.5), (-1, -1.0), ("mean_img", float(ONE.mean()))])
def test_monai_numbers_where_the_changed_region_alone_is_computed(mode: Any, shown: float) -> None:
    model = classifier()
    wanted = sensitivity(model, ONE, (8, 8), (3, 3), WHOLE, lambda part: torch.full_like(part, shown), softmax, ones)
    found, label = OcclusionSensitivity(model, 8, mode=mode)(ONE)
    assert_equal(found, wanted, 1e-12)
    assert torch.equal(label, wanted.argmax(1, keepdim=True))
    assert found.shape == (1, 5, 21, 23)
    assert label.shape == (1, 1, 21, 23)


def test_monai_numbers_of_masks_overlaps_activations_and_images_of_one_channel() -> None:
    model = classifier()
    zero = torch.zeros_like
    found, _ = OcclusionSensitivity(model, (21, 6), mode=0, overlap=0, activate=False)(ONE)
    assert_equal(found, sensitivity(model, ONE, (21, 6), (21, 6), WHOLE, zero, lambda y: y, ones), 1e-12)
    found, _ = OcclusionSensitivity(model, (9, 16), mode=0, overlap=0.99, activate=torch.tanh)(ONE)
    assert_equal(found, sensitivity(model, ONE, (9, 16), (1, 1), WHOLE, zero, torch.tanh, ones), 1e-12)
    grey = nn.Sequential(nn.Conv2d(1, 3, 1).double(), model).eval()
    found, _ = OcclusionSensitivity(grey, 10, mode=0)(ONE[:, :1])
    assert_equal(found, sensitivity(grey, ONE[:, :1], (10, 10), (4, 4), WHOLE, zero, torch.sigmoid, ones), 1e-12)


@pytest.mark.parametrize(
    ("b_box", "inner", "swept"),
    [
        ([5, 15, 2, 20], [(5, 15), (2, 20)], [(2, 18), (0, 23)]),
        ([-1, -1, 12, -1], [(0, 21), (12, 23)], [(0, 21), (9, 23)]),
        ([10, 12, 0, 99], [(10, 12), (0, 23)], [(7, 15), (0, 23)]),
    ],
)
def test_monai_numbers_in_a_box(b_box: list[int], inner: list[tuple[int, int]], swept: list[tuple[int, int]]) -> None:
    model = classifier()
    wanted = sensitivity(model, ONE, (8, 8), (3, 3), swept, torch.zeros_like, softmax, ones)
    wanted = wanted[:, :, slice(*inner[0]), slice(*inner[1])]
    found, label = OcclusionSensitivity(model, 8, mode=0.0)(ONE, b_box)
    assert_equal(found, wanted, 1e-12)
    assert label.shape == (1, 1, *wanted.shape[2:])
    with pytest.warns(UserWarning, match=ANEW):
        assert_equal(OcclusionSensitivity(model, 8, mode=lambda x, part: 0 * part)(ONE, b_box)[0], wanted, 1e-12)


def test_monai_numbers_where_everything_runs_anew() -> None:
    model = classifier()
    bell = [0.5 * (math.erf((k + 0.5) / (2**0.5 * 2)) - math.erf((k - 0.5) / (2**0.5 * 2))) for k in range(-4, 4)]
    both = torch.tensor(bell, dtype=torch.float64)[:, None] * torch.tensor(bell, dtype=torch.float64)
    fade = (both.max() - both) / (both.max() - both.min())
    edge = torch.exp(-0.5 * (torch.arange(8) - 3.5) ** 2).double()
    weight = (edge[:, None] * edge).clamp_min(1e-3)
    cases: list[tuple[Any, Callable[[Tensor], Tensor], Tensor, float]] = [
        ("gaussian", lambda part: part * fade, weight, 1e-6),
        ("mean_patch", lambda part: part.mean() * torch.ones_like(part), ones, 1e-12),
        (lambda x, part: part.flip(3) + x.mean(), lambda part: part.flip(3) + ONE.mean(), ones, 1e-12),
    ]
    for mode, show, weights, tolerance in cases:
        with pytest.warns(UserWarning, match=f"{ANEW}.*(gaussian|mean_patch|function).*a number or 'mean_img'"):
            found, _ = OcclusionSensitivity(model, 8, n_batch=5, mode=mode)(ONE)
        assert_equal(found, sensitivity(model, ONE, (8, 8), (3, 3), WHOLE, show, softmax, weights), tolerance)


def test_monai_volumes_further_arguments_and_training_mode() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Dropout(), nn.Flatten(), nn.LazyLinear(3)).double()

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.layers(x * scale)

    model = Scaled()
    model(ONE[:, None])
    assert model.training
    with pytest.warns(UserWarning, match=ANEW):
        found, label = OcclusionSensitivity(model, (2, 9, 9), mode=0.0)(ONE[:, None], [-1, -1, 3, 12, -1, -1], scale=2.0)
    assert all(part.training for part in model.modules())
    model.eval()
    swept = [(0, 3), (0, 16), (0, 23)]
    wanted = sensitivity(
        lambda x: model(x, scale=2.0), ONE[:, None], (2, 9, 9), (1, 3, 3), swept, torch.zeros_like, torch.sigmoid, ones  # type: ignore[arg-type]
    )  # fmt: skip
    assert_equal(found, wanted[:, :, :, 3:12], 1e-12)
    assert label.shape == (1, 1, 3, 9, 23)


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        ({"mode": "blur"}, {}, "mode: got 'blur', wanted .*mean_img"),
        ({"mode": None}, {}, "mode: got None, wanted a finite number"),
        ({"mode": math.nan}, {}, "mode: got nan"),
        ({"mode": -math.inf}, {}, "mode: got -inf"),
        ({"overlap": 1}, {}, "overlap: got 1"),
        ({"overlap": "a"}, {}, "overlap: got 'a', wanted a number"),
        ({"n_batch": 0}, {}, "n_batch: got 0"),
        ({"nn_module": len}, {}, "nn_module: got builtin"),
        ({"mask_size": 22}, {}, r"mask_size: got \(22, 22\), larger than the image"),
        ({"mask_size": (3, 3, 3)}, {}, "mask_size"),
        ({"mask_size": 2.5}, {}, "mask_size: got 2.5"),
        ({"mask_size": (3, "a")}, {}, "mask_size: got"),
        ({"nn_module": classifier()[:3]}, {}, r"nn_module: returned \[\d+, 8, "),
        ({}, {"x": IMAGES}, "x: got 2 images, wanted 1"),
        ({}, {"x": ONE.long()}, "x: wanted an image"),
        ({}, {"b_box": [1, 2]}, "b_box.*wanted 4 whole numbers"),
        ({}, {"b_box": [1, 2.5, 3, 9]}, "b_box.*wanted 4 whole numbers"),
        ({}, {"b_box": [5, 5, 0, 9]}, "b_box: .*empty"),
    ],
)
def test_what_monai_would_not_take_is_refused(make: dict[str, Any], call: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        OcclusionSensitivity(**({"nn_module": classifier(), "mode": 0.0, "mask_size": 8} | make))(**({"x": ONE} | call))


def test_monai_takes_numbers_and_lists_of_numpy() -> None:
    model = classifier()
    wanted = OcclusionSensitivity(model, (5, 6), mode=0.5, overlap=0.25)(ONE, b_box=(2, 15, 1, 20))
    for mask, mode, overlap in ((np.array([5, 6]), np.float32(0.5), np.float64(0.25)), ([np.int64(5), 6], 0.5, 0.25)):
        got = OcclusionSensitivity(model, mask, mode=mode, overlap=overlap)(ONE, b_box=np.array([2, 15, 1, 20]))
        assert torch.equal(got[0], wanted[0])
    same = (OcclusionSensitivity(model, size, mode=0)(ONE)[0] for size in (np.int64(5), 5))
    assert torch.equal(next(same), next(same))


def test_a_grid_of_ones_own_has_to_fit_the_images() -> None:
    with pytest.raises(ArgumentError, match=r"grid for images of \(20, 23\)"):
        conelens.occlude(classifier(), IMAGES, make_windows((20, 23), 5, 5))
    partial = conelens.occlude(classifier(), IMAGES, make_windows((21, 23), 5, 8))
    assert torch.equal(partial.outputs, conelens.occlude(classifier(), IMAGES, 5, 8).outputs)
    shifted = make_windows((21, 23), 5, 8)
    with pytest.raises(ArgumentError, match="resume: that sweep has another grid"):
        conelens.occlude(
            classifier(),
            IMAGES,
            replace(shifted, tops=shifted.tops[::-1].copy(), bottoms=shifted.bottoms[::-1].copy()),
            resume=partial,
        )
