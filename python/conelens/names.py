"""Conventional names for the layers of plain chains, as in the literature: ``conv3_3``, ``block3_conv3``, ``conv4``."""

from __future__ import annotations

from conelens.graph import Graph
from conelens.operators import Add, Concat, Conv2d, Linear, LocalResponseNorm, MaxPool2d, Rectify


def add_conventional_aliases(graph: Graph) -> None:
    """Name convolutions, ReLUs, pools and fully connected layers of a chain, AlexNet's way and VGG's way.

    VGG's ``convB_I`` counts within blocks that max pools separate; AlexNet's ``convN`` counts through. Networks with branches
    keep their module names alone, since no convention holds for them. A name that the model itself uses is left to it.
    """
    if any(isinstance(node.op, Add | Concat) for node in graph.nodes):
        return
    taken = {name for node in graph.nodes for name in (node.name, *node.aliases)}

    def give(index: int, *names: str) -> None:
        node = graph[index]
        node.aliases.extend(name for name in names if name not in taken and name not in node.aliases)
        taken.update(names)

    block, inside, convolution, connected = 1, 0, 0, 0
    last = ""
    for node in graph.nodes:
        if isinstance(node.op, Conv2d):
            inside, convolution = inside + 1, convolution + 1
            last = f"{block}_{inside}"
            give(node.index, f"conv{last}", f"block{block}_conv{inside}", f"conv{convolution}")
        elif isinstance(node.op, Linear):
            connected += 1
            last = ""
            if 5 in (convolution, block - (inside == 0)):  # fc6 follows five convolutions (AlexNet) or five blocks (VGG)
                give(node.index, f"fc{5 + connected}")
        elif isinstance(node.op, Rectify) and last:
            give(node.index, f"relu{last}", f"relu{convolution}")
        elif isinstance(node.op, LocalResponseNorm):
            give(node.index, f"norm{block}")
        elif isinstance(node.op, MaxPool2d) and inside:
            give(node.index, f"pool{block}")
            block, inside = block + 1, 0
