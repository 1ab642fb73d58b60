"""A module and its trace, which is made anew once the module or the size of its images has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conelens.errors import ConelensError
from conelens.execution import exact_dtype
from conelens.network import Network, trace

# of the traced graph on the user's images, relative: a new one, and one that was kept; halves: 5e-2
NEW = {torch.float64: 1e-9, torch.float32: 1e-3}
KEPT = {torch.float64: 1e-10, torch.float32: 2e-5}


class _State(NamedTuple):
    """What a trace depends on. The tensors are kept alive, so that no other one can take their address."""

    tensors: list[Tensor]
    versions: list[int]
    sums: list[Tensor]
    training: list[bool]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module, images: Tensor) -> _State:
        tensors = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        training = [part.training for part in module.modules()]
        sums = [part for tensor in tensors for part in _sums(tensor)]
        return cls(tensors, versions, sums, training, images.shape[1:], images.dtype, images.device)

    def same(self, other: _State) -> bool:
        def where(state: _State) -> list[tuple[int, torch.Size, torch.dtype]]:
            return [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in state.tensors]

        rest = (state._replace(tensors=[], sums=[]) for state in (self, other))
        same = next(rest) == next(rest) and where(self) == where(other)
        return same and all(torch.equal(a, b) for a, b in zip(self.sums, other.sums, strict=True))


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over either end of a tensor, which tell what edits through ``.data`` count no version of. Vectors stay whole."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    kind = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    return rows.sum(0, dtype=kind), rows.sum(1, dtype=kind)


class Traced:
    """Traces of one module, the last of which is kept."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._state: _State | None = None
        self._network: Network | None = None

    def network(self, images: Tensor, outputs: Tensor) -> Network:
        """The module as it is now, which returns ``outputs`` for ``images`` [N, C, H, W]; ConelensError if no trace does."""
        state = _State.of(self.module, images)
        kept, self._network = self._network, None
        if kept is not None and self._state is not None and self._state.same(state) and _agrees(kept, images, outputs, KEPT):
            self._network = kept  # compared, because attributes that are no tensors may have changed all the same
            return kept
        network = trace(self.module, images[:1].detach(), policy="gradient")  # the way down, which no one asks for here
        if not _agrees(network, images, outputs, NEW):
            raise ConelensError("the traced graph does not reproduce the model on these images")
        self._state, self._network = state, network
        return network


def _agrees(network: Network, images: Tensor, outputs: Tensor, tolerances: Mapping[torch.dtype, float]) -> bool:
    with exact_dtype(images.device):
        found = network(images)
    if found.numel() != outputs.numel():
        return False
    wanted = outputs.double()
    tolerance = tolerances.get(outputs.dtype, 5e-2)
    return bool((found.double().reshape(wanted.shape) - wanted).norm() <= tolerance * wanted.norm())
