"""A module and its trace, which is made anew once the module or the size of its images has changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from conelens.errors import ConelensError
from conelens.execution import exact_dtype
from conelens.network import Network, trace

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the traced graph on the user's images; halves: 5e-2


class _State(NamedTuple):
    """What a trace depends on. The tensors are kept alive, so that no other one can take their address."""

    tensors: list[Tensor]
    versions: list[int]
    training: list[bool]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module, images: Tensor) -> _State:
        tensors = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        training = [part.training for part in module.modules()]
        return cls(tensors, versions, training, images.shape[1:], images.dtype, images.device)

    def same(self, other: _State) -> bool:
        def where(state: _State) -> list[tuple[int, torch.Size, torch.dtype]]:
            return [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in state.tensors]

        return self[1:] == other[1:] and where(self) == where(other)


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
        if kept is not None and self._state is not None and self._state.same(state) and _agrees(kept, images, outputs):
            self._network = kept  # compared, because attributes that are no tensors may have changed all the same
            return kept
        network = trace(self.module, images[:1].detach(), policy="gradient")  # the way down, which no one asks for here
        if not _agrees(network, images, outputs):
            raise ConelensError("the traced graph does not reproduce the model on these images")
        self._state, self._network = state, network
        return network


def _agrees(network: Network, images: Tensor, outputs: Tensor) -> bool:
    with exact_dtype(images.device):
        found = network(images)
    if found.numel() != outputs.numel():
        return False
    wanted = outputs.double()
    tolerance = TOLERANCE.get(outputs.dtype, 5e-2)
    return bool((found.double().reshape(wanted.shape) - wanted).norm() <= tolerance * wanted.norm())
