"""The compiled modules, imported softly: what is missing is remembered as a reason, not raised at import."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch


class Native(NamedTuple):
    """A compiled module, or the reason why there is none."""

    module: ModuleType | None
    reason: str | None

    def context(self, device: torch.device) -> int:
        """What every native call takes last: the thread count on the CPU, the current stream on CUDA."""
        if device.type == "cpu":
            return torch.get_num_threads()
        return torch.cuda.current_stream(device).cuda_stream


def _load(name: str) -> Native:
    try:
        return Native(importlib.import_module(f"conelens.{name}"), None)
    except ImportError as error:
        return Native(None, f"conelens.{name} cannot be imported: {error}")


@functools.cache
def cpu() -> Native:
    """The CPU kernels, `conelens._core`."""
    return _load("_core")


@functools.cache
def cuda() -> Native:
    """The CUDA kernels, `conelens._cuda`; unusable without a device, or with a driver older than the toolkit."""
    native = _load("_cuda")
    if native.module is None:
        return native
    reason = native.module.unusable_reason()
    return Native(None, reason) if reason else native


def for_device(device_type: str) -> Native:
    if device_type == "cpu":
        return cpu()
    if device_type == "cuda":
        return cuda()
    return Native(None, f"no compiled kernels for device type {device_type!r}")
