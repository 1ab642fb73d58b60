"""What of conelens is usable on this machine, and why not the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch

import conelens
from conelens import _native


class Capabilities(dict[str, Any]):
    """A dict of plain values whose text is a small table."""

    def __str__(self) -> str:
        rows = []
        for part, values in self.items():
            if not isinstance(values, dict):
                rows.append((part, str(values)))
                continue
            said = [f"{key} {_text(value)}" for key, value in values.items() if key != "reason" and value is not None]
            if values["reason"]:
                said.append(f"not usable: {values['reason']}")
            rows.append((part, ", ".join(said)))
        width = max(len(part) for part, _ in rows)
        return "\n".join(f"{part:<{width}}  {said}" for part, said in rows)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def capabilities() -> Capabilities:
    """Versions, instruction set and threads of the CPU kernels, CUDA kernels, Triton; ``reason`` is None where usable."""
    return Capabilities(conelens=conelens.__version__, torch=torch.__version__, cpu=_cpu(), cuda=_cuda(), triton=_triton())


def _cpu() -> dict[str, Any]:
    native = _native.cpu()
    if native.module is None:
        return {"reason": native.reason}
    isa = native.module.isa()
    return {
        "isa": isa["active"],
        "available": isa["available"],
        "threads": torch.get_num_threads() if native.module.openmp else 1,
        "reason": None,
    }


def _cuda() -> dict[str, Any]:
    native = _native.cuda()
    toolkit, architectures = None, None
    if importlib.util.find_spec("conelens._build_info") is not None:
        build = importlib.import_module("conelens._build_info")
        toolkit, architectures = build.CUDA_TOOLKIT, build.CUDA_ARCHITECTURES
    return {
        "built": toolkit is not None,
        "toolkit": toolkit,
        "architectures": architectures,
        "devices": native.module.device_count() if native.module is not None else 0,
        "reason": native.reason if toolkit is not None else "built without CUDA kernels (no nvcc, or CONELENS_CUDA=OFF)",
    }


def _triton() -> dict[str, Any]:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return {"reason": "not installed: pip install 'conelens[triton]'"}
    reason = None if torch.cuda.is_available() else "Triton kernels need a CUDA device that torch can use"
    return {"version": version, "reason": reason}
