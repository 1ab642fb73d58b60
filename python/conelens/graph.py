"""The traced network as data: nodes in topological order, each one operator."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from conelens.operators import Operator

T = TypeVar("T")


@dataclass(eq=False)
class Node:
    """One operator of the graph. ``shape`` is (channels, height, width) of one sample; a vector has 1x1 cells."""

    index: int
    op: Operator
    inputs: tuple[int, ...]
    shape: tuple[int, int, int]
    vector: bool = False
    name: str = ""
    aliases: list[str] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]


class Graph:
    """Nodes in topological order; node 0 is the input."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.outputs: list[int] = []
        self.output_leaves: list[int] = []  # where each of them stands among the tensors that the model returns
        self.output_shapes: list[tuple[int, ...]] = []  # of one sample, as the model returns it
        self._memo: dict[Hashable, Any] = {}

    def add(self, op: Operator, inputs: tuple[int, ...], shape: tuple[int, int, int], vector: bool = False) -> Node:
        node = Node(len(self.nodes), op, inputs, shape, vector)
        self.nodes.append(node)
        return node

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)

    def ancestors(self, targets: tuple[int, ...]) -> list[int]:
        """Indices of ``targets`` and all they depend on, in topological order (memoised: a graph never changes)."""

        def find() -> list[int]:
            needed = set(targets)
            for index in range(max(targets), -1, -1):
                if index in needed:
                    needed.update(self.nodes[index].inputs)
            return sorted(needed)

        return self.remember(("ancestors", targets), find)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """A value that depends on the finished graph alone, made once."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def consumers(self, targets: tuple[int, ...]) -> dict[int, list[int]]:
        """For each ancestor of ``targets``: the ancestors that read it, once per edge."""
        readers: dict[int, list[int]] = {index: [] for index in self.ancestors(targets)}
        for index in readers:
            for source in self.nodes[index].inputs:
                readers[source].append(index)
        return readers
