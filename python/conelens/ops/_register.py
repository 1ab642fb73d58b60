"""Registration of an operation with torch.library: schema, fake, autograd and the choice of implementation.

`Library.define/impl` is used instead of the `custom_op` decorator because it costs a fifth per call.
Each operation gets a functional overload `conelens::<name>` and a writing one `conelens::<name>.out`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from conelens.errors import ArgumentError
from conelens.ops import _arguments, _dispatch

LIBRARY = torch.library.Library("conelens", "DEF")
OPERATORS: dict[str, Operator] = {}

Outputs = Tensor | tuple[Tensor, ...]


def _watched() -> bool:
    """Does a compiler, a dispatch mode (fake tensors, tracing) or a function transform (vmap) want to see operations?"""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _plain(x: Any) -> bool:
    """A tensor that is what its memory says: no subclass, and no negation still to be done."""
    return type(x) is Tensor and not x.is_neg()


def _unrecorded(first: Tensor, *out: Tensor) -> bool:
    """Does nobody want to know that a call wrote into ``out``? Tensors of inference mode do not count their versions."""
    inference = torch.is_inference_mode_enabled() and all(x.is_inference() for x in out)
    return inference and not _watched() and all(map(_plain, (first, *out)))


def _has_memory(x: Any) -> bool:
    return type(x) in (Tensor, Parameter) and x.device.type in ("cpu", "cuda")


class Operator:
    """One registered operation; call it with the schema's arguments in order."""

    def __init__(
        self,
        arguments: str,
        returns: tuple[str, ...],
        implementations: _dispatch.Implementations,
        fake: Callable[..., Outputs],
        in_place: str | None = None,
    ) -> None:
        """`arguments` as in a torch schema, `returns` the names of the results, `in_place` the argument that out= may be."""
        self.implementations, self._in_place = implementations, in_place
        self.name = implementations.name
        result = "Tensor" if len(returns) == 1 else f"({', '.join(f'Tensor {r}' for r in returns)})"
        writes = ", ".join(f"Tensor({chr(97 + i)}!) out_{r}" for i, r in enumerate(returns))
        LIBRARY.define(f"{self.name}({arguments}) -> {result}")
        LIBRARY.define(f"{self.name}.out({arguments}, *, {writes}) -> ()")
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self._run, key)
            LIBRARY.impl(f"{self.name}.out", self._run_out, key)
        torch.library.register_fake(f"conelens::{self.name}", fake, lib=LIBRARY)
        torch.library.register_fake(f"conelens::{self.name}.out", lambda *_, **__: None, lib=LIBRARY)
        packet = getattr(torch.ops.conelens, self.name)
        self._functional, self._writing = packet.default, packet.out
        self._argument_names = [argument.split()[-1] for argument in arguments.split(", ")]
        self._out_names = [f"out_{r}" for r in returns]
        OPERATORS[self.name] = self

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        torch.library.register_autograd(f"conelens::{self.name}", backward, setup_context=setup_context, lib=LIBRARY)

    def refuse_gradients(self) -> None:
        """Let a backward pass raise, which torch would otherwise let through with a wrong gradient."""

        def refuse(ctx: Any, *grads: Tensor) -> None:
            raise NotImplementedError(f"{self.name} has no gradient: detach its results, or differentiate its reference")

        self.register_autograd(refuse, lambda ctx, inputs, output: None)

    def __call__(self, *args: Any) -> Any:
        if not _watched() and not torch.is_grad_enabled() and _plain(args[0]):
            return self._run(*args)  # nobody records this call: spare the dispatcher's ten microseconds
        return self._functional(*args)

    def into(self, out: tuple[Tensor, ...], *args: Any) -> None:
        """Write the results into `out`; no gradients flow through it, so none may be asked for."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise ArgumentError(f"{self.name}: out= cannot be differentiated; leave it out, or use torch.no_grad()")
        self._refuse_shared(out, args)
        write = self._run_out if _unrecorded(args[0], *out) else self._writing
        write(*args, **dict(zip(self._out_names, out, strict=True)))

    def _refuse_shared(self, out: tuple[Tensor, ...], args: tuple[Any, ...]) -> None:
        """A kernel would read what it has written. Tensors without memory of their own, as in a compiler, have no say."""
        if _watched():
            return
        names = [f"out[{i}]" for i in range(len(out))] if len(out) > 1 else ["out"]
        named = [*zip(names, out, strict=True), *zip(self._argument_names, args, strict=True)]
        named = [(name, x) for name, x in named if _has_memory(x)]
        for i, (name, mine) in enumerate(named):
            for other, x in named[i + 1 :] if name in names else []:
                if other == self._in_place and _arguments.same_memory(mine, x):
                    continue
                if _arguments.share_memory(mine, x):
                    raise ArgumentError(f"{self.name}: {name} shares memory with {other}; give it memory of its own")

    def _run(self, *args: Any) -> Any:
        device = args[0].device
        backend = _dispatch.choose(self.implementations, device, args)
        return self.implementations.run(backend, device, args, None)

    def _run_out(self, *args: Any, **outs: Tensor) -> None:
        device = args[0].device
        out = tuple(outs[name] for name in self._out_names)
        backend = _dispatch.choose(self.implementations, device, args)
        results = self.implementations.run(backend, device, args, out if len(out) > 1 else out[0])
        for target, result in zip(out, results if isinstance(results, tuple) else (results,), strict=True):
            if result is not target:
                target.copy_(result)


def backends(name: str, *args: Any) -> dict[str, str | None]:
    """Backends of an operation for these arguments -> None where it can run, else the reason why it cannot.

    `args` are the operation's own arguments; the tensors alone are enough for a first answer.
    """
    if name not in OPERATORS:
        raise ArgumentError(f"operation is {name!r}; wanted one of {', '.join(sorted(OPERATORS))}")
    op = OPERATORS[name].implementations
    if not args or not isinstance(args[0], Tensor):
        raise ArgumentError(f"backends({name!r}, x, ...) wants the operation's tensors, got {args!r}")
    return {backend: op.reason(backend, args[0].device, args) for backend in op.candidates(args)}
