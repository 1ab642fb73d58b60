"""What command line and demo start from: a loaded model, traced at its input size, with all its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


def open_workbench(model: LoadedModel, device: str = "cpu", policy: Mapping[str, str] | str | None = None) -> Workbench:
    """Move a model to a device and trace it at its input size; `policy` as in :func:`conelens.trace`.

    Raises:
        ArgumentError: no such device here, or a model that does not take RGB images.
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
    module = model.module.to(target)
    try:
        net = trace(module, (3, *model.preprocess.size), policy, names=model.layer_names)
    except RuntimeError as error:
        wanted = re.search(r"to have (\d+) channels, but got 3 channels", str(error))
        if wanted is None:
            raise
        raise ArgumentError(
            f"model: got one that takes {wanted[1]}-channel images, wanted 3 channels (images are read as RGB); "
            "give a factory that wraps it in a module converting from RGB"
        ) from error
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
