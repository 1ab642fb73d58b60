"""Running everything anew for every position, in batches: for functions that cannot be traced, and as the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.execution import exact_dtype, forward_whole
from conelens.network import Network
from conelens.occlusion.engine import Visited
from conelens.occlusion.records import Record, activity, run_clean
from conelens.occlusion.windows import Windows, occluded

BATCH = 64  # images at once; larger batches do not run faster on any device measured


class Rerun:
    """The engine that has no idea of the network but calling it."""

    form = "rerun"

    def __init__(
        self,
        net: Network | Callable[[Tensor], Tensor],
        images: Tensor,
        filled: Tensor,
        windows: Windows,
        records: list[Record],
        memory: int,
    ) -> None:
        self.net, self.images, self.filled, self.windows, self.records = net, images, filled, windows, records
        per_image = images[0].numel()
        if isinstance(net, Network):
            per_image = max(math.prod(node.shape) for node in net.graph.nodes)
        self.batch = max(1, min(BATCH, memory // (4 * per_image * images.element_size())))

    def clean(self) -> tuple[Tensor, list[Record]]:
        parts = (images if isinstance(self.net, Network) else images.clone() for images in self.images.split(self.batch))
        outputs, self.records = run_clean(self.records, map(self._forward, parts))
        return outputs, self.records

    def visit(self, units: np.ndarray) -> Iterator[Visited]:
        for start in range(0, len(units), self.batch):
            some = units[start : start + self.batch]
            output, maps = self._forward(occluded(self.images, self.filled, self.windows, some))
            image = torch.from_numpy(some[:, 0]).to(output.device)
            found = {record.name: activity(record.pick(maps[record.node], image)) for record in self.records}
            yield Visited(some, output, found)

    def _forward(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """``images`` are this call's own: a function may work in place."""
        if not isinstance(self.net, Network):
            output = self.net(images)
            if not isinstance(output, Tensor) or output.shape[:1] != images.shape[:1]:
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ArgumentError(f"net: returned {got} for {len(images)} images, wanted a tensor with a row for each")
            if not output.is_floating_point():
                raise ArgumentError(f"net: returned {output.dtype}, wanted floating point; return output.float()")
            return output.detach(), {}
        graph = self.net.graph
        target = graph.outputs[0]
        with exact_dtype(images.device):
            maps = forward_whole(graph, images, tuple(sorted({target, *(record.node for record in self.records)})))
        return self.net.as_returned(maps[target]), maps
