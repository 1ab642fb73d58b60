"""edge_scores: how well the displacements of every candidate parent explain those of every node, over images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from conelens._native import Native
from conelens.kernels.edge_scores import reference
from conelens.ops import _arguments as arguments
from conelens.ops._dispatch import Implementations
from conelens.ops._register import Operator
from conelens.ops.collapse_parents import check_displacement, fresh

_REFERENCE_CELLS = 1 << 25  # of images x nodes x parents at once


@arguments.takes_arrays
def edge_scores(
    displacement: Tensor, weight: Tensor, parent: Tensor, *, bandwidth: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Sums over images I, for each of V nodes and U candidate parents, of how their displacements differ -> [V,U].

    displacement [I,V,2] says how far (y, x) a node is from its mean place in an image, parent [I,U,2] the same of the
    candidates, weight [I,V] how much the node's place in that image counts. With d and p one of each:

    * without ``bandwidth``: sum of ``weight * |d - p|^2``, small where they move alike; good to 1e-5 (float64: 1e-12) of itself
      on the CPU, and of the sum of ``weight * (|d - c|^2 + |p - c|^2)``, c the parents' mean, in CUDA's matrix products;
    * with ``bandwidth`` [V], the square of a length, positive: sum of ``weight * exp(-|d - p|^2 / (2 bandwidth))``, large where
      they move alike; the criterion of the release of Zhang et al. 2018, good to 1e-5 (1e-12) of the sum of the weights.

    Neither holds anything of I x V x U. Results over parts of the images add up to the result over all. float32 or float64, all
    of one dtype; lengths in any one unit. NaN stays, in the node's row or the parent's column; a bandwidth of 0 gives NaN where
    they agree exactly. TF32 is never used. Not differentiable. Raises ArgumentError for a wrong shape, dtype or device.
    """
    shape = _check(displacement, weight, parent, bandwidth)
    args = (displacement, weight, parent, bandwidth)
    if out is None:
        return _OPERATOR(*args)
    wanted = [("out", out, shape, displacement.dtype)]
    _OPERATOR.into(arguments.check_outs(wanted, displacement, "displacement"), *args)
    return out


def _check(displacement: Any, weight: Any, parent: Any, bandwidth: Any) -> tuple[int, int]:
    """-> shape of the result."""
    images, nodes = check_displacement(displacement, "displacement", "[I,V,2]")
    parents = check_displacement(parent, "parent", "[I,U,2]")[1]
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "parent": (parent, (images, parents, 2)),
        "weight": (weight, (images, nodes)),
    }
    if bandwidth is not None:
        wanted["bandwidth"] = (bandwidth, (nodes,))
    for name, (x, shape) in wanted.items():
        arguments.check_like(x, name, displacement, "displacement", shape=shape, dtype=displacement.dtype)
    return nodes, parents


def _fake(displacement: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None) -> Tensor:
    return displacement.new_empty((displacement.shape[1], parent.shape[1]))


def _reference(displacement: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None) -> Tensor:
    """The specification, so few images at a time that large problems still fit."""
    out = displacement.new_zeros((displacement.shape[1], parent.shape[1]))
    block = max(1, _REFERENCE_CELLS // max(1, out.numel()))
    for images in range(0, displacement.shape[0], block):
        here = slice(images, images + block)
        out += reference.edge_scores(displacement[here], weight[here], parent[here], bandwidth)
    return out


def _compiled(
    native: Native, displacement: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None, out: Tensor | None = None
) -> Tensor:
    if out is None or not out.is_contiguous():
        out = fresh(displacement, displacement.shape[1], parent.shape[1])
    packed = (None if x is None else x.resolve_neg().contiguous() for x in (displacement, weight, parent, bandwidth))
    native.module.edge_scores(*packed, out, native.context(displacement.device))  # type: ignore[union-attr]
    return out


_OPERATOR = Operator(
    "Tensor displacement, Tensor weight, Tensor parent, Tensor? bandwidth",
    ("out",),
    Implementations("edge_scores", compiled=_compiled, reference=_reference),
    _fake,
)
_OPERATOR.refuse_gradients()
