"""A small network around any function, and the check that its trace projects as autograd does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import conelens
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
