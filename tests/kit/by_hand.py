"""A deconvnet for chains written out layer by layer, which can be told to make each of the mistakes that
others have made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MISTAKES = (
    "random biases", "forward biases", "no rectifier", "guided", "replicated unpooling",
    "overwriting unpooling", "last tie", "switches of another image",
    "identity batch norm", "rectified pixels",
)  # fmt: skip


@dataclass
class Record:
    """What the forward pass leaves for the way down."""

    inputs: list[Tensor] = field(default_factory=list)
    switches: dict[int, Tensor] = field(default_factory=dict)  # flat index into the map, as max_pool2d gives it


def forward(layers: nn.Sequential, image: Tensor) -> tuple[Tensor, Record]:
    record, x = Record(), image
    for index, layer in enumerate(layers):
        record.inputs.append(x.clone())
        if isinstance(layer, nn.MaxPool2d):
            x, record.switches[index] = F.max_pool2d(
                x,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.ceil_mode,
                return_indices=True,
            )
        else:
            x = layer(x)
    return x, record


@torch.no_grad()
def deconvnet(
    layers: nn.Sequential,
    image: Tensor,
    unit: tuple[int, int, int],
    mistake: str | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """Projection [C, H, W] of unit (channel, y, x) of the last layer for ``image`` [1, C, H, W]; ``other`` is
    another image.
    """
    assert mistake is None or mistake in MISTAKES
    out, record = forward(layers, image)
    switches = (
        forward(layers, other)[1].switches if mistake == "switches of another image" and other is not None else record.switches
    )
    y = torch.zeros_like(out)
    y[0][unit] = out[0][unit].clamp(min=0)
    for index in reversed(range(len(layers))):
        layer, x = layers[index], record.inputs[index]
        if isinstance(layer, nn.Conv2d):
            y = _filter(layer, y, x, mistake)
        elif isinstance(layer, nn.ReLU):
            y = {"no rectifier": y, "guided": y.clamp(min=0) * (x > 0)}.get(str(mistake), y.clamp(min=0))
        elif isinstance(layer, nn.MaxPool2d):
            y = _unpool(layer, y, x, switches[index], mistake)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.running_var is not None
            scale = layer.weight / (layer.running_var + layer.eps).sqrt()
            y = y if mistake == "identity batch norm" else y * scale[:, None, None]
        else:
            raise AssertionError(f"no rule for {layer}")
    return y[0].clamp(min=0) if mistake == "rectified pixels" else y[0]


def _filter(conv: nn.Conv2d, y: Tensor, x: Tensor, mistake: str | None) -> Tensor:
    remainder = [
        (x.shape[2 + a] + 2 * int(conv.padding[a]) - conv.dilation[a] * (conv.kernel_size[a] - 1) - 1) % conv.stride[a]
        for a in (0, 1)
    ]
    if mistake == "forward biases":
        assert conv.bias is not None
        y = y + conv.bias[:, None, None]
    down = F.conv_transpose2d(y, conv.weight, None, conv.stride, conv.padding, remainder, conv.groups, conv.dilation)  # type: ignore[arg-type]
    if mistake == "random biases":
        down = down + 0.1 * torch.randn(down.shape[1], 1, 1, dtype=down.dtype)
    return down


def _unpool(pool: nn.MaxPool2d, y: Tensor, x: Tensor, switches: Tensor, mistake: str | None) -> Tensor:
    if mistake == "replicated unpooling":
        return F.interpolate(y, size=x.shape[2:])
    if mistake == "last tie":
        mirrored = F.max_pool2d(x.flip(2, 3), pool.kernel_size, pool.stride, return_indices=True)[1].flip(2, 3)
        switches = x.shape[2] * x.shape[3] - 1 - mirrored
    down = torch.zeros_like(x).flatten(2)
    if mistake == "overwriting unpooling":
        return down.scatter(2, switches.flatten(2), y.flatten(2)).reshape(x.shape)
    return down.scatter_add(2, switches.flatten(2), y.flatten(2)).reshape(x.shape)
