"""The operators a traced network is made of; see ``base`` for what each of them can do."""

from conelens.operators.base import Bound, Edge, Input, Offset, Operator, Pair, Place, Step, inside, require_rule
from conelens.operators.filters import Conv2d, Linear
from conelens.operators.joins import Add, Concat, Gate, Product, SelectChannels
from conelens.operators.pointwise import Activation, Affine, GroupNorm, LocalResponseNorm, Opaque, Rectify
from conelens.operators.space import Flatten, MaxPool2d, Pad, Spatial

__all__ = [
    "Activation", "Add", "Affine", "Bound", "Concat", "Conv2d", "Edge", "Flatten", "Gate", "GroupNorm", "Input", "Linear",
    "LocalResponseNorm", "MaxPool2d", "Offset", "Opaque", "Operator", "Pad", "Pair", "Place", "Product", "Rectify",
    "SelectChannels", "Spatial", "Step", "inside", "require_rule",
]  # fmt: skip
