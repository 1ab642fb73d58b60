"""The GPU table: each measurement behind a correctness gate, next to the best of eager and torch.compile.

Sections run in order of importance until the time is used up; every row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_graph, gpu_projections
from benchmarks import gpu_measure as measure
from benchmarks.gpu_measure import BF16, CL, NCHW, Machine, Row, Run, compare, compiled, random
from conelens import ops
from conelens.errors import DeadUnitWarning

Size = tuple[int, int]
Window = tuple[int, int, int]  # kernel, stride, padding


def layout_name(layout: torch.memory_format) -> str:
    return "cl" if layout is CL else "nchw"


# --- pool, unpool, peaks: bytes -----------------------------------------------------------------------------

SHAPES = [  # shape, window
    ((32, 64, 224, 224), (2, 2, 0)),
    ((64, 64, 112, 112), (3, 2, 1)),
    ((32, 256, 56, 56), (2, 2, 0)),
    ((64, 64, 112, 112), (3, 2, 0)),
    ((128, 64, 55, 55), (3, 2, 0)),
]


def eager_pool(x: Tensor, window: Window) -> Tensor:
    return F.max_pool2d(F.relu(x), *window, return_indices=True)[0]


def eager_unpool(pooled: Tensor, indices: Tensor, window: Window, size: Size) -> Tensor:
    return F.relu(F.max_unpool2d(pooled, indices, *window, output_size=size))


def pool_and_unpool(machine: Machine, x: Tensor, window: Window, label: str) -> Iterator[Row]:
    pooled, switches = ops.max_pool2d_with_switches(x, *window, relu=True)
    floor = (x.nbytes + pooled.nbytes + switches.nbytes) / machine.copy
    out = (torch.empty_like(pooled), torch.empty_like(switches))
    yield compare(
        Row("pool", f"pool   {label}", floor=floor, target=">= 90 % of copy"),
        {"ours": lambda: ops.max_pool2d_with_switches(x, *window, relu=True, out=out)[0]},
        {"eager": lambda: eager_pool(x, window), "compile": compiled(eager_pool, x, window)},
        0,
    )
    size, written = (x.shape[2], x.shape[3]), torch.empty_like(x)
    others: dict[str, Run] = {}
    if window[0] == 2:  # torch overwrites where windows overlap: other numbers
        _, indices = F.max_pool2d(F.relu(x), *window, return_indices=True)
        args = (pooled, indices, window, size)
        others = {"eager": lambda: eager_unpool(*args), "compile": compiled(eager_unpool, *args)}
    yield compare(
        Row("unpool", f"unpool {label}", floor=floor, target=">= 90 % of copy"),
        {"ours": lambda: ops.max_unpool2d(pooled, switches, *window, output_size=size, relu=True, out=written)},
        others,
        0,
    )


def pools(machine: Machine) -> Iterator[Row]:
    for (shape, window), dtype, layout in itertools.product(SHAPES, (BF16, torch.float32), (NCHW, CL)):
        label = f"{shape} {window} {str(dtype)[6:]} {layout_name(layout)}"
        yield from pool_and_unpool(machine, random(shape, dtype, layout), window, label)


def peaks_row(machine: Machine, x: Tensor, label: str) -> Row:
    return compare(
        Row("peaks", f"peaks {label}", floor=x.nbytes / machine.copy),
        {"ours": lambda: ops.channel_peaks(x)[0]},
        {"eager": lambda: x.flatten(2).max(2)[0]},
        0,
    )


def peaks(machine: Machine) -> Iterator[Row]:
    shapes = ((32, 64, 224, 224), (32, 512, 28, 28), (1, 64, 224, 224))
    for shape, dtype, layout in itertools.product(shapes, (BF16, torch.float32), (NCHW, CL)):
        label = f"{shape} {str(dtype)[6:]} {layout_name(layout)}"
        yield peaks_row(machine, random(shape, dtype, layout), label)


def indexed_windows(base: Tensor, patch: Tensor, place: Tensor, side: int) -> Tensor:
    y, x = (place[:, axis, None] - 1 + torch.arange(side, device=base.device) for axis in (0, 1))
    inside = ((y >= 0) & (y < base.shape[2]))[:, :, None] & ((x >= 0) & (x < base.shape[3]))[:, None, :]
    y, x = y.clamp(0, base.shape[2] - 1), x.clamp(0, base.shape[3] - 1)
    windows = base[0].permute(1, 2, 0)[y[:, :, None], x[:, None, :]].masked_fill_(~inside[..., None], 0).permute(0, 3, 1, 2)
    windows[:, :, 1:-1, 1:-1] = patch
    return windows


def windows_row(machine: Machine, base: Tensor, patch: Tensor, label: str) -> Row:
    units, _, side, _ = patch.shape
    place = torch.randint(0, base.shape[2] - side + 1, (units, 2), device="cuda")
    window, args = place - 1, (base, patch, place, side + 2)
    out = ops.gather_windows(base, patch, place, window, side + 2)
    return compare(
        Row("windows", f"windows {label}", floor=2 * out.nbytes / machine.copy),
        {"ours": lambda: ops.gather_windows(base, patch, place, window, side + 2, out=out)},
        {"eager": lambda: indexed_windows(*args), "compile": compiled(indexed_windows, *args)},
        0,
    )


def windows(machine: Machine) -> Iterator[Row]:
    shapes = ((512, 512, 28, 10), (512, 256, 56, 16), (512, 64, 112, 18), (2048, 3, 224, 16))
    for (units, channels, size, side), dtype, layout in itertools.product(shapes, (BF16, torch.float32), (CL, NCHW)):
        base, patch = random((1, channels, size, size), dtype, layout), random((units, channels, side, side), dtype, layout)
        label = f"{units} of {channels}x{side + 2}x{side + 2} from {size} {str(dtype)[6:]} {layout_name(layout)}"
        yield windows_row(machine, base, patch, label)


def five_passes(change: Tensor, base: Tensor, origin: Tensor) -> Tensor:
    clean = ops.gather_windows(base, None, None, origin, tuple(change.shape[2:]))
    below = (-clean).clamp_max_(0)
    return torch.maximum(clean.clamp_max_(0).add_(change), below)


def relu_row(machine: Machine, base: Tensor, change: Tensor, label: str) -> Row:
    origin = torch.randint(0, base.shape[2] - change.shape[2] + 1, (len(change), 2), device="cuda")
    out = ops.relu_change(change, base, origin)
    return compare(
        Row("relu", f"relu {label}", floor=3 * out.nbytes / machine.copy),
        {"ours": lambda: ops.relu_change(change, base, origin, out=out)},
        {"eager": lambda: five_passes(change, base, origin)},
        0,
    )


def relus(machine: Machine) -> Iterator[Row]:
    shapes = ((512, 512, 28, 10), (512, 64, 112, 18))
    for (units, channels, size, side), dtype, layout in itertools.product(shapes, (BF16, torch.float32), (CL, NCHW)):
        base, change = (random(s, dtype, layout) for s in ((1, channels, size, size), (units, channels, side, side)))
        label = f"{units} of {channels}x{side}x{side} over {size} {str(dtype)[6:]} {layout_name(layout)}"
        yield relu_row(machine, base, change, label)


# --- filters ------------------------------------------------------------------------------------------------


def on_backends(run: Run) -> dict[str, Run]:
    def on(name: str) -> Run:
        def forced() -> Tensor:
            with ops.use_backend(name):
                return run()

        return forced

    return {name: on(name) for name in ("auto", "triton", "compiled")}


def pixels_row(machine: Machine, y: Tensor, weight: Tensor, label: str) -> Row:
    return compare(
        Row("pixels", label, floor=(y.nbytes * 67 / 64) / machine.copy, target="<= 0.10 ms"),
        on_backends(lambda: ops.deconv2d(y, weight, padding=1)),
        {"cudnn": lambda: F.conv_transpose2d(y, weight, padding=1)},
        1e-2,
    )


def pixels(machine: Machine) -> Iterator[Row]:
    for layout in (CL, NCHW):
        y, weight = random((32, 64, 224, 224), BF16, layout), random((64, 3, 3, 3), BF16, NCHW)
        yield pixels_row(machine, y, weight, f"64->3 at 224, batch 32, bf16, {layout_name(layout)}")


def eager_chain(y: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(F.relu(F.max_unpool2d(y, indices, 2, 2)), weight, padding=1)


def chain_row(machine: Machine, name: str, channels: int, side: int, dtype: torch.dtype) -> Row:
    x = random((32, channels, side, side), dtype, CL)
    weight = random((channels, channels, 3, 3), dtype, NCHW) / channels**0.5
    switches = ops.max_pool2d_with_switches(x, 2).switches
    indices = F.max_pool2d(x, 2, return_indices=True)[1]
    y = random(tuple(switches.shape), dtype, CL)
    plain = (y.contiguous(), indices.contiguous(), weight)
    moved = x.nbytes + y.nbytes + switches.nbytes
    floor = max(2 * 9 * channels * x.numel() / machine.matmul, moved / machine.copy)
    return compare(
        Row("chain", f"unpool, ReLU, deconv {name} {str(dtype)[6:]}", floor=floor, target=">= 1.3x best"),
        on_backends(
            lambda: ops.deconv2d(
                y,
                weight,
                padding=1,
                pool=(2, 2, 0, 1),
                switches=switches,
                relu=True,
                output_size=(side, side),
            )
        ),
        {
            "eager cl": lambda: eager_chain(y, indices, weight),
            "eager nchw": lambda: eager_chain(*plain),
            "compile": compiled(eager_chain, y, indices, weight),
        },
        1e-2,
    )


def chains(machine: Machine) -> Iterator[Row]:
    layers = (("conv1_2", 64, 224), ("conv2_2", 128, 112), ("conv3_3", 256, 56), ("conv4_3", 512, 28))
    for dtype, (name, channels, side) in itertools.product((BF16, torch.float32), layers):
        yield chain_row(machine, name, channels, side, dtype)


SECTIONS = (
    pixels,
    chains,
    gpu_projections.topdown,
    gpu_projections.from_pixels,
    pools,
    peaks,
    windows,
    relus,
    gpu_graph.e_steps,
    gpu_graph.collapses,
    gpu_graph.edges,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--seconds", type=float, default=400, help="stop before this much time has gone")
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeadUnitWarning)  # random weights: some of the units are dead

    deadline = time.monotonic() + options.seconds
    machine = measure.measure_machine()
    name = torch.cuda.get_device_name()
    print(f"{name}: copy {machine.copy / 1e9:.2f} TB/s, bf16 matrices {machine.matmul / 1e9:.0f} TFLOP/s")
    with options.out.open("a") as file:
        about = {"device": name, "torch": torch.__version__, **asdict(machine)}
        file.write(json.dumps(about) + "\n")
        rows = itertools.chain.from_iterable(section(machine) for section in SECTIONS)
        return measure.write_rows(rows, file, deadline)


if __name__ == "__main__":
    raise SystemExit(main())
