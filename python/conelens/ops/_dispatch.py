"""Which implementation of an operation runs: compiled kernel, Triton kernel or reference, and why not the others.

An operation's implementations are found by convention:

* ``compiled``: the function named after the operation (or ``native``) in ``conelens._core`` (CPU) or ``conelens._cuda`` (CUDA);
* ``triton``: ``conelens.kernels.<operation>.triton_kernel`` with ``supports(*args) -> reason or None`` and
  ``run(*args, out=None)``, both taking the arguments of the torch.library schema in order;
* ``reference``: plain PyTorch, always able to run.

Automatic choice takes the first that can run, in the operation's order. An explicit choice is honoured or raises.
The two context managers hold for the whole process, so that they also reach autograd's own threads.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from conelens import _native
from conelens.errors import ArgumentError, BackendError

BACKENDS = ("compiled", "triton", "reference")
_log = logging.getLogger("conelens.ops")


@dataclass
class _Choices:
    """Blocks that are open now. Threads may leave theirs in any order: each takes away its own, the latest one counts."""

    backends: list[list[str]] = field(default_factory=list)
    requiring: list[None] = field(default_factory=list)


_choices = _Choices()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation on one backend: "auto", "compiled", "triton" or "reference"; process-wide.

    Raises BackendError with the reason when an operation inside cannot run there.
    """
    if name not in ("auto", *BACKENDS):
        raise ArgumentError(f"backend is {name!r}; wanted one of 'auto', {', '.join(map(repr, BACKENDS))}")
    mine = [name]
    _choices.backends.append(mine)
    try:
        yield
    finally:
        _choices.backends[:] = [other for other in _choices.backends if other is not mine]


@contextmanager
def require_kernels() -> Iterator[None]:
    """Raise BackendError wherever a reference implementation would run inside; process-wide."""
    _choices.requiring.append(None)
    try:
        yield
    finally:
        _choices.requiring.pop()


@dataclass(frozen=True)
class Implementations:
    """What an operation offers. All callables take the schema's arguments in order; `out` holds the result tensors."""

    name: str
    compiled: Callable[..., Any]  # (Native, *args, out=None)
    reference: Callable[..., Any]  # (*args)
    order: tuple[str, ...] | Callable[..., tuple[str, ...]] = BACKENDS  # or what the arguments make of it
    native: str = ""  # the native function behind ``compiled``, where it is another operation's

    def candidates(self, args: tuple[Any, ...]) -> tuple[str, ...]:
        """Backends in the order of automatic choice; the reference comes last."""
        return self.order(*args) if callable(self.order) else self.order

    def reason(self, backend: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
        """Why `backend` cannot run these arguments, or None."""
        if backend == "reference":
            return None
        if backend == "triton":
            return _triton_reason(self.name, device, args)
        native = _native.for_device(device.type)
        if native.module is None:
            return native.reason
        if not hasattr(native.module, self.native or self.name):
            return f"conelens has no compiled {device.type} kernel for {self.name}"
        return None

    def run(self, backend: str, device: torch.device, args: tuple[Any, ...], out: Any) -> Any:
        if backend == "reference":
            return self.reference(*args)
        if backend == "triton":
            return triton_module(self.name).run(*args, out=out)
        return self.compiled(_native.for_device(device.type), *args, out=out)


@functools.cache
def _triton_module_or_reason(name: str) -> ModuleType | str:
    module_name = f"conelens.kernels.{name}.triton_kernel"
    if importlib.util.find_spec(module_name) is None:
        return f"conelens has no Triton kernel for {name}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'conelens[triton]'"
    return importlib.import_module(module_name)


def triton_module(name: str) -> ModuleType:
    found = _triton_module_or_reason(name)
    if isinstance(found, str):
        raise BackendError(found)
    return found


def _triton_reason(name: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"Triton kernels run on CUDA tensors (or in the interpreter), got {device.type}"
    found = _triton_module_or_reason(name)
    return found if isinstance(found, str) else found.supports(*args)


def choose(op: Implementations, device: torch.device, args: tuple[Any, ...]) -> str:
    """Name of the backend that runs these arguments."""
    open_blocks = _choices.backends
    asked = open_blocks[-1][0] if open_blocks else "auto"
    if asked == "auto":
        # the interpreter is for tests that ask for it: the CPU's own kernel goes first
        order = ("compiled", "reference") if device.type == "cpu" else op.candidates(args)
        for backend in order:
            if op.reason(backend, device, args) is None:
                break
    else:
        backend = asked
        reason = op.reason(backend, device, args)
        if reason is not None:
            raise BackendError(f"{op.name}: backend {backend!r} was asked for but cannot run: {reason}")
    if backend == "reference" and _choices.requiring:
        reasons = "; ".join(f"{name}: {op.reason(name, device, args)}" for name in op.candidates(args)[:-1])
        raise BackendError(f"{op.name} would run its reference although kernels are required ({reasons})")
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s on %s runs %s", op.name, device, backend)
    return backend
