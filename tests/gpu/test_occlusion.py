"""Occlusion sweeps on a GPU against the network itself, and the convolution of windows on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens import ops
from conelens.kernels.conv2d_windows import reference

DEVICE = "cuda"


class _Residual(nn.Module):
    """A residual block with batch norms and a stride."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1),
        )  # fmt: skip
        self.down = nn.Conv2d(channels, out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.down(x))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(32, 64, 3, 1, 2, dilation=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1, groups=4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 7 * 7, 10),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), _Residual(32, 64), _Residual(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


NETWORKS = {"plain": plain, "residual": residual}


def prepared(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
    return model.to(DEVICE, dtype), torch.randn(2, 3, 64, 64).to(DEVICE, dtype)


def run_anew(model: nn.Module, images: Tensor, windows: conelens.occlusion.Windows, fill: float) -> Tensor:
    """[N, rows, columns, classes], window by window."""
    rows = []
    for top, bottom in zip(windows.tops, windows.bottoms):
        row = []
        for left, right in zip(windows.lefts, windows.rights):
            x = images.clone()
            x[:, :, top:bottom, left:right] = fill
            row.append(model(x))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = False
    yield
    for one, value in zip(settings, before, strict=True):
        one.allow_tf32 = value


@pytest.mark.parametrize("form", ["auto", "delta"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_running_anew(name: str, dtype: torch.dtype, limit: float, form: str) -> None:
    model, images = prepared(name, dtype)
    first, again = (conelens.occlude(model, images, (9, 13), (11, 7), fill=0.3, form=form) for _ in range(2))
    assert distance(first.outputs, run_anew(model, images, first.windows, 0.3)) <= limit
    assert torch.equal(first.outputs, again.outputs), "the same input gave other bits"


@pytest.mark.parametrize("name", NETWORKS)
def test_16_bits_lose_no_more_than_running_anew_in_16_bits(name: str) -> None:
    exact, images = prepared(name, torch.float32)
    model, small = prepared(name, torch.bfloat16)
    sweep = conelens.occlude(model, small, 12, 13, fill=0.25)
    assert sweep.about["form"] == "gather"
    wanted = run_anew(exact, images, sweep.windows, 0.25)
    assert distance(sweep.outputs, wanted) <= 2 * distance(run_anew(model, small, sweep.windows, 0.25), wanted)


def test_both_backends_of_the_convolution_give_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = prepared("residual", torch.float32)
    real, sweeps = ops.conv2d_windows, {}
    for backend in ("compiled", "triton"):

        def forced(*args: object, backend: str = backend, **keywords: object) -> Tensor:
            with ops.use_backend(backend):
                return real(*args, **keywords)  # type: ignore[arg-type]

        monkeypatch.setattr(ops, "conv2d_windows", forced)
        sweeps[backend] = conelens.occlude(model, images, 12, 13, form="gather").outputs
    assert distance(sweeps["triton"], sweeps["compiled"]) <= 5e-6


def test_filling_with_the_image_changes_no_bit() -> None:
    model, images = prepared("residual", torch.float32)
    sweep = conelens.occlude(model, images, 12, 13, fill=images)
    assert torch.equal(sweep.outputs, sweep.clean[:, None, None].expand_as(sweep.outputs))


WINDOWS = {  # c_in, c_out, kernel, stride, dilation, out, patch
    "vgg": (64, 64, 3, 1, 1, 16, 14),
    "wide": (128, 320, 3, 1, 1, 9, 7),
    "stem": (3, 64, 7, 2, 1, 11, 16),
    "ragged": (30, 50, 3, 1, 2, 8, 5),
    "one_tap": (64, 96, 1, 2, 1, 7, 9),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["triton", "compiled", "auto"])
@pytest.mark.parametrize("name", WINDOWS)
def test_convolution_of_windows(name: str, backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    c_in, c_out, k, s, d, out, held = WINDOWS[name]
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    base, patch, weight, bias = noise(2, c_in, 28, 30), noise(33, c_in, held, held), noise(c_out, c_in, k, k), noise(c_out)
    places = [torch.randint(-8, 30, (33, 2), generator=generator) for _ in range(2)]
    rows = torch.randint(0, 2, (33,), generator=generator)
    wide = (x.double() for x in (weight, bias))
    window = ((s, s), (d, d), (out, out), rows, True)
    wanted = reference.conv2d_windows(base.double(), patch.double(), *places, *wide, *window)
    maps = (x.to(DEVICE).contiguous(memory_format=layout) for x in (base, patch))
    moved = [*maps, *(x.to(DEVICE) for x in (*places, weight, bias))]
    with ops.use_backend(backend):
        got = ops.conv2d_windows(*moved, s, d, out_size=out, rows=rows.to(DEVICE), relu=True)
        again = ops.conv2d_windows(*moved, s, d, out_size=out, rows=rows.to(DEVICE), relu=True)
    assert torch.equal(got, again), "the same input gave other bits"
    assert got.is_contiguous(memory_format=layout)
    assert distance(got.cpu(), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["triton", "compiled"])
def test_tf32_where_torch_allows_it(backend: str) -> None:
    torch.backends.cudnn.allow_tf32 = True
    base, patch = torch.randn(1, 64, 20, 20), torch.randn(9, 64, 6, 6)
    place, weight = torch.randint(0, 14, (9, 2)), torch.randn(64, 64, 3, 3)
    window = ((1, 1), (1, 1), (8, 8), None, False)
    wanted = reference.conv2d_windows(base.double(), patch.double(), place, place - 1, weight.double(), None, *window)
    with ops.use_backend(backend):
        got = ops.conv2d_windows(*(x.to(DEVICE) for x in (base, patch, place, place - 1, weight)), out_size=8)
    assert distance(got.cpu(), wanted) < 2e-3
