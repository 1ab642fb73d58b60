"""A whole occlusion sweep whose convolutions run in the interpreted Triton kernel, against the network itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens import ops

pytest.importorskip("triton", reason="needs conelens[triton]")


class _Residual(nn.Module):
    """Two convolutions, the first with a batch norm, the second with a stride, beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 20, 3, 2, 1),
        )  # fmt: skip
        self.down = nn.Conv2d(8, 20, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.down(x))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 2, dilation=2), nn.ReLU(), nn.MaxPool2d(2), _Residual(),
        nn.Flatten(), nn.Linear(20 * 6 * 6, 5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
    return model.eval()


def test_a_sweep_through_triton_equals_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    real = ops.conv2d_windows

    def through_triton(*args: Any, **keywords: Any) -> Tensor:
        calls.append(keywords["relu"])
        with ops.use_backend("triton"):
            return real(*args, **keywords)

    monkeypatch.setattr(ops, "conv2d_windows", through_triton)
    model, images = network(), torch.randn(2, 3, 24, 24)
    with torch.inference_mode():
        sweep = conelens.occlude(model, images, 6, 9, fill=0.3, form="gather")
        (rows, columns), clean = sweep.outputs.shape[1:3], images
        for row in range(rows):
            for column in range(columns):
                x = clean.clone()
                x[:, :, sweep.windows.tops[row] : sweep.windows.bottoms[row],
                  sweep.windows.lefts[column] : sweep.windows.rights[column]] = 0.3  # fmt: skip
                error = (sweep.outputs[:, row, column] - model(x)).norm() / model(x).norm()
                assert error < 2e-6
    assert True in calls and False in calls  # ReLUs in the epilogue, and results that go to a sum
