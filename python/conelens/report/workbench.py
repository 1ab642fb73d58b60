"""What command line and demo start from: a loaded model, traced at its input size, with all its names."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conelens.diagram import DiagramNode
from conelens.errors import ArgumentError
from conelens.models import LoadedModel
from conelens.network import Network, trace


@dataclass(frozen=True)
class Workbench:
    """A model and its network, on one device."""

    model: LoadedModel
    net: Network


def open_workbench(model: LoadedModel, device: str = "cpu") -> Workbench:
    """Move a model to a device and trace it at its input size.

    Raises:
        ArgumentError: no such device here.
        UnsupportedOperatorError: the network has an operator without a rule.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device is {device!r}, wanted cpu or cuda[:index]") from error
    if target.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device is {device!r}, wanted cpu or cuda[:index]")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    net = trace(model.module.to(target), (3, *model.preprocess.size), names=model.layer_names)
    return Workbench(model, net)


def diagram_nodes(net: Network) -> list[DiagramNode]:
    """The network's graph for `conelens.diagram`, each layer under its shortest name."""
    return [
        DiagramNode(
            min((layer.name, *layer.aliases), key=len),
            layer.kind,
            layer.shape,
            layer.receptive_field,
            net.graph[layer.index].inputs,
        )
        for layer in net.layers()
    ]
