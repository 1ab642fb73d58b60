"""The GPU benchmark of occlusion sweeps, on the CPU with a small network: its gate and its columns, not its figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs conelens[triton]: the benchmark times with it")

import conelens
from benchmarks import gpu_measure, gpu_occlusion
from benchmarks.gpu_measure import CL
from conelens import ops
from conelens.occlusion import make_windows
from conelens.occlusion.regions import sweep_regions


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, 1, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 16 * 16, 10),
    ).eval()  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr(gpu_occlusion, "build", lambda name: network())
    monkeypatch.setattr(gpu_occlusion, "NETWORKS", ("small",))
    monkeypatch.setattr(gpu_occlusion, "layers", lambda: iter(()))
    monkeypatch.setattr(gpu_occlusion, "seconds", lambda run, device, least=0.0: float(run() is not None) * 1e-3)
    monkeypatch.setattr(gpu_occlusion, "peak", lambda device, dtype: 1e15)
    monkeypatch.setattr(gpu_measure, "compiled", lambda function, *args: lambda: function(*args))
    return torch.randn(2, 3, 32, 32)


def test_every_column_is_there_and_the_gate_opens(small: torch.Tensor) -> None:
    with torch.inference_mode():
        first, second, *again = gpu_occlusion.table(small)
    assert [row.precision for row in (first, second)] == ["bfloat16", "tf32"]
    for row in (first, second):
        assert row.problem == "" and set(row.ours) == {"1 images", "2 images"}
        assert {"plain nchw 64", "plain cl 256", "compiled forward"} < set(row.others)
        assert row.errors["float32"] < 5e-6 and 0 < row.share < 1
        assert "of peak" in str(row)
    assert again == [first, second]
    assert first.errors["plain"] > 1e-3 > second.errors["plain"]


def test_a_wrong_sweep_loses_its_columns(small: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.conv2d_windows
    monkeypatch.setattr(ops, "conv2d_windows", lambda *args, **keywords: real(*args, **keywords) * 1.02)
    with torch.inference_mode():
        row, _ = gpu_occlusion.sweep_row("small", network(), "bfloat16", small)
    assert "bfloat16 is wrong" in row.problem and row.ours == {}


def test_layers_compare_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure, "milliseconds", lambda run, rep=60: float(run() is not None))
    base, patch, weight = (
        torch.randn(shape).to(memory_format=CL) for shape in ((1, 16, 12, 12), (5, 16, 4, 4), (24, 16, 3, 3))
    )
    row = gpu_occlusion.layer_row("small", base, patch, torch.randint(-1, 6, (5, 2)), weight, torch.randn(24), 6, matrix=64)
    assert row.others.keys() >= {"gather, conv2d"} and row.ours.keys() >= {"auto", "compiled"}
    assert "wrong" not in row.problem and "triton: BackendError" in row.problem


def test_the_script_names_its_files() -> None:
    script = (Path(__file__).parents[1] / "benchmarks" / "gpu.sh").read_text()
    assert "-m benchmarks.gpu_occlusion --out" in script


def test_a_second_sweep_does_not_repeat_the_algebra_of_the_first() -> None:
    net = conelens.trace(network(), (3, 32, 32))
    first, other = (make_windows((32, 32), 8, stride) for stride in (8, 4))
    settings = ((net.graph.outputs[0],), first, "cpu", False)
    regions = sweep_regions(net.graph, *settings)
    again = (settings[0], make_windows((32, 32), 8, 8), *settings[2:])
    assert sweep_regions(net.graph, *again) is regions
    for changed in ((settings[0], other, "cpu", False), (*settings[:3], True)):
        assert sweep_regions(net.graph, *changed) is not regions
