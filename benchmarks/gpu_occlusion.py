"""Occlusion sweeps on a GPU: positions per second, each behind a correctness gate, next to what else there is.

First the sweeps of all networks with plain batches and Captum, then the convolutions of VGG-16's patches by both backends, then
the compiled forward pass, whose compilation takes longest; every row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conelens
from benchmarks import gpu_measure as measure
from benchmarks.gpu_measure import CL, NCHW, compare, random
from benchmarks.networks import build
from conelens import ops
from conelens.occlusion import Windows, make_windows, plan_occlusion
from conelens.occlusion.windows import occluded

WINDOW, STRIDE = 16, 4
IMAGES = 8  # of the larger sweep: its calls are as many as those of a sweep over one
SAMPLES = 64  # positions of the gate
GATE_FLOAT32 = 5e-6
MEMORY = 48 * 2**30  # bytes: many positions at once
PRECISIONS = ("bfloat16", "tf32")
# positions per second that were promised
TARGETS = {
    ("VGG-16", "bfloat16"): 100_000, ("VGG-16", "tf32"): 50_000, ("ResNet-18", "bfloat16"): 130_000,
    ("AlexNet", "bfloat16"): 350_000,
}  # fmt: skip
NETWORKS = ("VGG-16", "ResNet-18", "AlexNet")


@dataclass
class Rates:
    """One network in one precision. Rates are positions per second; ``share`` = planned operations / matrix peak."""

    network: str
    precision: str
    ours: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    share: float = float("nan")
    target: int | None = None
    problem: str = ""

    def __str__(self) -> str:
        best, other = (max(rates.values(), default=float("nan")) for rates in (self.ours, self.others))
        aim = f"target {self.target:,} ({'met' if best >= self.target else 'MISSED'})" if self.target else ""
        rates = "  ".join(f"{name} {rate:,.0f}" for name, rate in (self.ours | self.others).items())
        errors = "  ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        share = f"{100 * self.share:.0f} % of peak"
        head = f"{self.network:10} {self.precision:9} {best:>10,.0f}/s  x{best / other:5.2f}  {share}"
        return f"{head}  {aim}  [{rates}]  [{errors}] {self.problem}"


@dataclass
class Subject:
    """A network in one precision: traced, in either layout, with the images of its sweeps."""

    net: conelens.Network
    layouts: dict[str, nn.Module]
    images: Tensor
    windows: Windows

    @property
    def positions(self) -> int:
        return self.windows.shape[0] * self.windows.shape[1]

    def batch(self, size: int, layout: str) -> Tensor:
        """Occluded copies of the first image, spread over the grid."""
        return _copies(self.images[:1], self.windows, spread(self.windows, size)).contiguous(
            memory_format=CL if layout == "cl" else NCHW
        )


def spread(windows: Windows, count: int) -> np.ndarray:
    """``count`` units [U, 3] of the first image, evenly over the grid."""
    index = np.linspace(0, windows.shape[0] * windows.shape[1] - 1, count).astype(np.int64)
    return np.stack([index * 0, *np.divmod(index, windows.shape[1])], 1)


def _copies(images: Tensor, windows: Windows, units: np.ndarray) -> Tensor:
    return occluded(images, torch.zeros_like(images), windows, units)


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def subject(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Subject:
    model = copy.deepcopy(model).to(images.device, dtype).requires_grad_(False)
    images = images.to(dtype)
    last = copy.deepcopy(model).to(memory_format=CL)
    windows = make_windows((images.shape[2], images.shape[3]), WINDOW, STRIDE)
    net = conelens.trace(last, images[:1], policy="clamp")
    return Subject(net, {"nchw": model, "cl": last}, images, windows)


def sweep(of: Subject, count: int) -> conelens.Sweep:
    return conelens.occlude(of.net, of.images[:count], of.windows, memory=MEMORY)


def seconds(run: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """Median wall time of a run, after one that compiles and allocates: a sweep is calls as well as kernels."""
    times: list[float] = []
    for _ in range(25):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
        if len(times) > 3 and sum(times[1:]) > least:
            break
    return float(np.median(times[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _error(got: Tensor, wanted: Tensor) -> float:
    return measure.relative_error(got.double(), wanted)


def gate(row: Rates, model: nn.Module, images: Tensor, of: Subject) -> None:
    """float32 equals running anew; the row's own precision loses no more than twice what plain PyTorch loses in it."""
    index = tuple(torch.from_numpy(spread(of.windows, SAMPLES).T))
    units = spread(of.windows, SAMPLES)
    allow_tf32(False)
    exact = subject(model, images[:1], torch.float32)
    again = exact.layouts["nchw"](_copies(exact.images, of.windows, units)).double()
    row.errors["float32"] = _error(sweep(exact, 1).outputs[index], again)
    allow_tf32(row.precision == "tf32")
    row.errors["plain"] = _error(of.layouts["nchw"](_copies(of.images[:1], of.windows, units)), again)
    row.errors["ours"] = _error(sweep(of, 1).outputs[index], again)
    if not row.errors["float32"] <= GATE_FLOAT32:
        row.problem += f"float32 is wrong ({row.errors['float32']:.1e}) "
    if not row.errors["ours"] <= max(2 * row.errors["plain"], GATE_FLOAT32):
        row.problem += f"{row.precision} is wrong ({row.errors['ours']:.1e}, plain {row.errors['plain']:.1e}) "


def peak(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations per second of a large matrix product under the present settings."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 0.1)


def _try(
    row: Rates, rates: dict[str, float], name: str, positions: int, run: Callable[[], object], device: torch.device
) -> None:
    try:
        rates[name] = positions / seconds(run, device)
    except Exception as failure:  # a column is lost, the table is not
        row.problem += f"{name}: {type(failure).__name__} {str(failure).splitlines()[:1]} "


def sweep_row(name: str, model: nn.Module, precision: str, images: Tensor) -> tuple[Rates, Subject]:
    """All but the compiled pass, for one network in one precision."""
    device, dtype = images.device, torch.bfloat16 if precision == "bfloat16" else torch.float32
    row = Rates(name, precision, target=TARGETS.get((name, precision)))
    of = subject(model, images, dtype)
    gate(row, model, images, of)
    if not row.problem:
        for count in (1, len(images)):
            _try(row, row.ours, f"{count} images", count * of.positions, lambda count=count: sweep(of, count), device)
    for layout, module in of.layouts.items():
        for size in (64, 256):
            x = of.batch(size, layout)
            _try(row, row.others, f"plain {layout} {size}", size, lambda x=x, module=module: module(x), device)
    if importlib.util.find_spec("captum") is not None:
        _try(row, row.others, "Captum", of.positions, lambda: _captum(of), device)
    planned = 2 * sum(layer.planned for layer in plan_occlusion(of.net, WINDOW, STRIDE).layers)
    row.share = max(row.ours.values(), default=float("nan")) * planned / peak(device, dtype)
    return row, of


def _captum(of: Subject) -> Tensor:
    from captum.attr import Occlusion

    shape, steps = ((of.images.shape[1], side, side) for side in (WINDOW, STRIDE))
    return Occlusion(of.layouts["cl"]).attribute(of.images[:1], shape, steps, target=0, perturbations_per_eval=64)


def compiled_row(row: Rates, of: Subject) -> Rates:
    """The same forward pass through torch.compile, batch 256, occluded copies given: what no plain loop can beat."""
    allow_tf32(row.precision == "tf32")
    run = measure.compiled(of.layouts["cl"], of.batch(256, "cl"))
    _try(row, row.others, "compiled forward", 256, run, of.images.device)
    return row


def table(images: Tensor) -> Iterator[Rates | measure.Row]:
    """All rows; those of the compiled pass repeat the first ones with a column more."""
    kept = []
    for precision, name in itertools.product(PRECISIONS, NETWORKS):
        row, of = sweep_row(name, build(name), precision, images)
        yield row
        kept.append((row, of))
    yield from layers()
    for row, of in kept:
        yield compiled_row(row, of)


# --- the two ways of one convolution: what the choice table should say ----------------------------------------

# of VGG-16: channels in and out, map, outputs and patch of a unit in the middle
LAYERS = {
    "conv1_2": (64, 64, 224, 20, 18), "conv2_1": (64, 128, 112, 12, 10), "conv2_2": (128, 128, 112, 14, 12),
    "conv3_1": (128, 256, 56, 9, 7), "conv3_2": (256, 256, 56, 11, 9), "conv3_3": (256, 256, 56, 13, 11),
    "conv4_1": (256, 512, 28, 9, 7), "conv4_2": (512, 512, 28, 11, 9), "conv5_1": (512, 512, 14, 8, 6),
}  # fmt: skip


def layers(units: int = 1024) -> Iterator[measure.Row]:
    for dtype in (torch.bfloat16, torch.float32):
        allow_tf32(True)
        for name, (c_in, c_out, size, side, held) in LAYERS.items():
            base, patch = random((1, c_in, size, size), dtype, CL), random((units, c_in, held, held), dtype, CL)
            weight = random((c_out, c_in, 3, 3), dtype, CL) / (9 * c_in) ** 0.5
            bias = torch.randn(c_out, device=measure.DEVICE, dtype=dtype)
            window = torch.randint(-1, size - side, (units, 2), device=measure.DEVICE)
            yield layer_row(f"{name} {str(dtype)[6:]}, {units} of {side}x{side}", base, patch, window, weight, bias, side)


def layer_row(
    label: str, base: Tensor, patch: Tensor, window: Tensor, weight: Tensor, bias: Tensor, side: int, matrix: int = 8192
) -> measure.Row:
    def ours(backend: str) -> Tensor:
        with ops.use_backend(backend):
            return ops.conv2d_windows(base, patch, window + 1, window, weight, bias, out_size=side, relu=True)

    def gathered() -> Tensor:
        return ops.gather_windows(base, patch, window + 1, window, side + 2)

    operations = 2 * 9 * weight.shape[0] * weight.shape[1] * len(patch) * side**2
    a, b = (torch.randn(matrix, matrix, device=base.device, dtype=base.dtype) for _ in range(2))
    reached = 2 * matrix**3 / measure.milliseconds(lambda: a @ b, 20)
    return compare(
        measure.Row("windows", label, floor=operations / reached, target="which backend?"),
        {name: lambda name=name: ours(name) for name in ("auto", "triton", "compiled")},
        {
            "gather, conv2d": lambda: F.relu_(F.conv2d(gathered(), weight, bias)),
            "gather, fused": lambda: torch.cudnn_convolution_relu(gathered(), weight, bias, (1, 1), (0, 0), (1, 1), 1),
        },
        1e-2,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--seconds", type=float, default=150, help="stop before this much time has gone")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    images = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(measure.DEVICE)
    with options.out.open("a") as file, torch.inference_mode():
        return measure.write_rows(table(images), file, deadline)


if __name__ == "__main__":
    raise SystemExit(main())
