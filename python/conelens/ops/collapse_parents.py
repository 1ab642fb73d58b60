"""collapse_parents: what all parents of a node say of its place, as one Gaussian."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from conelens._native import Native
from conelens.errors import ArgumentError
from conelens.kernels.collapse_parents import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator


class CollapsedParents(NamedTuple):
    """shift [I,V,2], (y, x); sigma [V]; log_agreement [I,V], at most 0; lengths in the unit of the displacements."""

    shift: Tensor
    sigma: Tensor
    log_agreement: Tensor


@arguments.takes_arrays
def collapse_parents(
    displacement: Tensor, sigma: Tensor, edges: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> CollapsedParents:
    """The parents of each of V nodes as one Gaussian: where they move the node to, how surely, and how well they agree.

    displacement [I,U,2] says how far (y, x) each of U parents is from its mean place in an image, sigma [U], positive, how far
    its children scatter about it, edges [V,M], int32 or int64, which M of them, at least one, are a node's parents. The product
    of their isotropic Gaussians to the power 1/M is one Gaussian (Zhang et al. 2018; README of the kernel):

    * ``shift`` [I,V,2] = sum of w d / sum of w over the parents, w = 1 / sigma^2;
    * ``sigma`` [V] = mean(w)^(-1/2), for all images alike;
    * ``log_agreement`` [I,V] = -mean(w |d - shift|^2) / 2: the logarithm of the factor, in (0, 1], that remains.

    float32 or float64. Spreads are taken about the shift, so that large displacements cost no digits: parents who agree exactly
    give their displacement and 0, to the bit. NaN of a parent stays, in its children. What an image gives does not depend on
    the other images. ``out`` = (shift, sigma, log_agreement) is written. An edge to a parent that is not there raises
    ArgumentError on the CPU and gives NaN on CUDA. Not differentiable. Raises ArgumentError for a wrong shape, dtype or device.
    """
    images, parents = check_displacement(displacement, "displacement", "[I,U,2]")
    arguments.check_like(sigma, "sigma", displacement, "displacement", shape=(parents,), dtype=displacement.dtype)
    nodes = _check_edges(edges, displacement)
    if out is None:
        return CollapsedParents(*_OPERATOR(displacement, sigma, edges))
    if not isinstance(out, tuple | list) or len(out) != 3:
        raise ArgumentError(f"out must be (shift, sigma, log_agreement), got {type(out).__name__}")
    shapes = ((images, nodes, 2), (nodes,), (images, nodes))
    wanted = [(f"out[{i}]", x, shape, displacement.dtype) for i, (x, shape) in enumerate(zip(out, shapes, strict=True))]
    _OPERATOR.into(arguments.check_outs(wanted, displacement, "displacement"), displacement, sigma, edges)
    return CollapsedParents(*out)


def check_displacement(x: Any, name: str, axes: str) -> tuple[int, int]:
    """x is a float32 or float64 tensor of so many displacements (y, x) per image -> images, displacements."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name} must be a tensor or a DLPack array, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != 2:
        raise ArgumentError(f"{name} must be {axes}, (y, x) last, got shape {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"{name} must be float32 or float64, got {x.dtype}; convert it with {name}.float()")
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ArgumentError(f"{name} must be on the CPU or a CUDA device, got {x.device}")
    return x.shape[0], x.shape[1]


def fresh(like: Tensor, *shape: int) -> Tensor:
    """A packed result; a large one on the CPU asks for huge pages."""
    return arguments.empty(shape, like.new_empty((1, 1, 1, 1)))


def _check_edges(edges: Any, displacement: Tensor) -> int:
    if not isinstance(edges, Tensor) or edges.dtype not in (torch.int32, torch.int64) or edges.dim() != 2:
        got = f"{edges.dtype} {list(edges.shape)}" if isinstance(edges, Tensor) else type(edges).__name__
        raise ArgumentError(f"edges must be an int32 or int64 tensor [V,M], got {got}")
    if edges.shape[1] < 1:
        raise ArgumentError(f"edges has shape {list(edges.shape)}: every node needs at least one parent")
    arguments.check_like(edges, "edges", displacement, "displacement", shape=edges.shape, dtype=edges.dtype)
    return edges.shape[0]


def _refuse_missing_parent(edges: Tensor, parents: int) -> None:
    """Name the first edge to a parent that is not there, if there is one."""
    wrong = ((edges < 0) | (edges >= parents)).nonzero()
    if len(wrong):
        node, place = wrong[0].tolist()
        raise ArgumentError(f"edges[{node}, {place}] is {int(edges[node, place])}, but displacement has {parents} parents")


def _outputs(displacement: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, nodes = displacement.shape[0], edges.shape[0]
    return fresh(displacement, images, nodes, 2), fresh(displacement, nodes), fresh(displacement, images, nodes)


def _fake(displacement: Tensor, sigma: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(displacement, edges)


def _reference(displacement: Tensor, sigma: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if edges.device.type == "cpu":  # a CUDA device is not waited for
        _refuse_missing_parent(edges, displacement.shape[1])
    return reference.collapse_parents(displacement, sigma, edges)


def _compiled(
    native: Native, displacement: Tensor, sigma: Tensor, edges: Tensor, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    displacement, sigma, edges = (x.resolve_neg().contiguous() for x in (displacement, sigma, edges))
    if out is None or not all(x.is_contiguous() for x in out):
        out = _outputs(displacement, edges)
    module, context = native.module, native.context(displacement.device)
    if not module.collapse_parents(displacement, sigma, edges, *out, context):  # type: ignore[union-attr]
        _refuse_missing_parent(edges, displacement.shape[1])
    return out


_OPERATOR = Operator(
    "Tensor displacement, Tensor sigma, Tensor edges",
    ("shift", "sigma", "log_agreement"),
    Implementations("collapse_parents", compiled=_compiled, reference=_reference),
    _fake,
)
_OPERATOR.refuse_gradients()
