"""A small classifier and two images, for tests that have none of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens.network import Network


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    trunk = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(*trunk, nn.Flatten(), nn.Linear(400, 4)).double().eval()


@pytest.fixture
def net(model: nn.Module) -> Network:
    return conelens.trace(model, (3, 24, 20))
