"""Watching a model run: which tensor is which node of the graph, and what each module call is named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from conelens.errors import ArgumentError, TraceError, UnsupportedOperatorError
from conelens.graph import Graph, Node
from conelens.operators import Input, Operator, SelectChannels

Policy = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Meaning:
    """What a tensor of the model's run stands for.

    layout "map": [N, C, H, W] of ``node``; "vector": [N, F]; "view": [N, *cells.shape], any arrangement of
    the node's cells, which are numbered in row-major order of (channel, y, x); "positive": the mask node > 0;
    "stale": overwritten through another view.
    """

    node: int
    layout: str = "map"
    cells: Tensor | None = None


class Recorder(TorchFunctionMode):
    """Records one forward pass into ``graph``; rules live in ``lowering.RULES``, keyed by the name of the
    torch function.
    """

    def __init__(self, rules: Mapping[str, Callable[..., Any]], policy: Policy) -> None:
        super().__init__()
        self.rules = rules
        self.policy = policy
        self.graph = Graph()
        self.batch = 0
        self.meanings: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.stack: list[str] = [""]
        self.calls: Counter[str] = Counter()
        self._labels: dict[int, list[str]] = {}
        self._hooks: list[Any] = []

    # --- what tensors mean ----------------------------------------------------------------------------------

    def start(self, example: Tensor) -> Tensor:
        """Declare the network input; returns a private copy, since the model may work in place."""
        x = example.clone()
        self.batch = x.shape[0]
        node = self.graph.add(Input(), (), (x.shape[1], x.shape[2], x.shape[3]))
        node.name = "input"
        self.meanings[x] = Meaning(node.index)
        return x

    def meaning(self, tensor: Any) -> Meaning | None:
        """The meaning of a tensor, or None when it does not depend on the input."""
        if not isinstance(tensor, Tensor):
            return None
        found = self.meanings.get(tensor)
        if found is not None and found.layout == "stale":
            raise UnsupportedOperatorError(
                f"{self.here}: a tensor is used after it was changed in place through another view of its "
                "memory; "
                "write that step out of place"
            )
        return found

    def map_of(self, tensor: Any, what: str = "input") -> Node:
        """The node whose map [N, C, H, W] or vector [N, F] this tensor is."""
        found = self.meaning(tensor)
        if found is None:
            raise UnsupportedOperatorError(f"{self.here}: {what} does not depend on the network's input as a map")
        if found.layout not in ("map", "vector"):
            raise UnsupportedOperatorError(
                f"{self.here}: {what} of shape {tuple(tensor.shape)} is a view that mixes channels and space, "
                "which only calls that move cells can take"
            )
        return self.graph[found.node]

    def flat_of(self, tensor: Any) -> Node:
        """The same for an element-wise reader, which also takes views [N, ..., H, W] that split the channels
        into several dimensions.
        """
        found = self.meaning(tensor)
        if found is None or found.layout != "view":
            return self.map_of(tensor)
        assert found.cells is not None
        node = self.graph[found.node]
        height, width = node.size
        area = height * width
        corners = found.cells.reshape(-1) if area == 1 else found.cells.reshape(-1, area)[:, 0]
        whole = corners[:, None] + torch.arange(area)
        if (area > 1 and tuple(found.cells.shape[-2:]) != (height, width)) or not torch.equal(
            whole.reshape(-1), found.cells.reshape(-1)
        ):
            raise UnsupportedOperatorError(
                f"{self.here}: no rule for a tensor of shape {tuple(tensor.shape)} that mixes channels and space"
            )
        return self.select(node, corners // area)

    def cells_of(self, meaning: Meaning, shape: tuple[int, ...]) -> Tensor:
        """Cell numbers of a tensor [N, *shape]."""
        if meaning.cells is not None:
            return meaning.cells
        node = self.graph[meaning.node]
        numbers = torch.arange(node.shape[0] * node.size[0] * node.size[1])
        return numbers.reshape(shape) if numbers.numel() == math.prod(shape) else numbers.reshape(node.shape).expand(shape)

    def select(self, node: Node, channels: Tensor) -> Node:
        """``channels`` of ``node`` in that order (-1: a channel of zeros)."""
        if torch.equal(channels, torch.arange(node.shape[0])):
            return node
        return self.emit(
            SelectChannels(channels.to(self.device), node.shape[0]),
            (node,),
            (len(channels), *node.size),
            node.vector,
        )

    def without_meaning(self, tree: Any) -> Any:
        """Arguments of a call that moves cells; tensors among them stand for their shapes alone, or are
        constants.
        """
        if isinstance(tree, Tensor):
            return torch.empty(tree.shape, dtype=torch.int64) if self.meaning(tree) is not None else tree.cpu()
        if isinstance(tree, (tuple, list)):
            return type(tree)(self.without_meaning(value) for value in tree)
        return {k: self.without_meaning(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    def emit(self, op: Operator, inputs: Iterable[Node], shape: tuple[int, int, int], vector: bool = False) -> Node:
        """Add a node, named after the innermost module call and the torch function."""
        node = self.graph.add(op, tuple(n.index for n in inputs), shape, vector)
        base = f"{self.stack[-1]}/{self._function}"
        count = self.calls[base]
        self.calls[base] += 1
        node.name = f"{base}:{count}" if count else base
        return node

    def rule_for(self, operator: str) -> str | None:
        """The user's policy for an operator without a canonical rule."""
        return self.policy.get(operator)

    @property
    def here(self) -> str:
        """The place in the model that is running, for error messages."""
        return f"{self._function} in {self.stack[-1] or 'the model itself'}"

    # --- watching -------------------------------------------------------------------------------------------

    _function = "input"
    function: Callable[..., Any] = torch.relu  # the torch function of the call in progress
    device = torch.device("cpu")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        known = [t for t in tensors if t in self.meanings]
        if not known:
            return func(*args, **kwargs)
        name = _name(func)
        before = self._function
        self._function = name.strip("_")
        self.device = known[0].device
        self.function = func
        try:
            if name in _LEAKS:
                raise UnsupportedOperatorError(
                    f"{self.here}: the model reads values of an activation into Python ({name}), so its "
                    "graph depends on the data"
                )
            if name == "__setitem__":
                raise UnsupportedOperatorError(f"{self.here}: writes into a part of a tensor; build the result out of place")
            result = func(*args, **kwargs)
            if not any(True for _ in tensors_in(result)):
                return result
            rule = self.rules.get(name) or self.rules.get(self._function)
            if rule is None:
                raise UnsupportedOperatorError(f"{self.here}: no rule for this operator (torch function '{name}')")
            try:
                self._assign(result, rule(self, result, *args, **kwargs))
            except TypeError as error:
                raise UnsupportedOperatorError(f"{self.here}: arguments without a rule ({error})") from error
            return result
        finally:
            self._function = before

    def _assign(self, result: Any, meanings: Any) -> None:
        if isinstance(result, Tensor):
            if isinstance(meanings, Node):
                meanings = Meaning(meanings.index, "vector" if meanings.vector else "map")
            if meanings is None:
                return
            old = self.meanings.get(result)
            if old is not None and old is not meanings:
                self._overwritten(result, meanings)
            self.meanings[result] = meanings
            return
        for one, meaning in zip(result, meanings, strict=False):
            self._assign(one, meaning)

    def _overwritten(self, tensor: Tensor, meaning: Meaning) -> None:
        """After an in-place call: same-shaped aliases follow, other views of that memory become unusable."""
        storage = tensor.untyped_storage().data_ptr()
        for other in list(self.meanings.keys()):
            if other is tensor or other.untyped_storage().data_ptr() != storage:
                continue
            same = (other.data_ptr(), other.shape, other.stride()) == (
                tensor.data_ptr(),
                tensor.shape,
                tensor.stride(),
            )
            self.meanings[other] = meaning if same else Meaning(-1, "stale")

    # --- names ----------------------------------------------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """Hook every module, until :meth:`unwatch`."""
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedOperatorError(
                    f"{path or 'the model'} is a TorchScript module, whose calls cannot be seen; pass the original nn.Module"
                )
            self._hooks.append(module.register_forward_pre_hook(self._enter(path)))
            self._hooks.append(module.register_forward_hook(self._leave(not any(module.children()))))

    def unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            count = self.calls[f"module {path}"]
            self.calls[f"module {path}"] += 1
            self.stack.append(f"{path}:{count}" if count else path)

        return hook

    def _leave(self, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            label = self.stack.pop()
            meaning = self.meanings.get(output) if isinstance(output, Tensor) else None
            if meaning is None or meaning.node < 0 or not label:
                return
            if meaning.layout not in ("map", "vector"):
                return
            node = self.graph[meaning.node]
            if leaf and node.name.startswith(label + "/"):
                self._labels.setdefault(node.index, []).insert(0, label)
            else:
                self._labels.setdefault(node.index, []).append(label)

        return hook

    def finish(self, output: Any) -> Graph:
        """Settle names and outputs."""
        for index, labels in self._labels.items():
            node = self.graph[index]
            parent = node.name.rsplit("/", 1)[0]
            if labels[0] == parent:
                node.name, labels = labels[0], labels[1:]
            node.aliases = [label for label in dict.fromkeys(labels) if label != node.name]
        for leaf, tensor in enumerate(tensors_in(output)):
            if self.meaning(tensor) is not None:
                self.graph.output_leaves.append(leaf)
                self.graph.output_shapes.append(tuple(tensor.shape[1:]))
                self.graph.outputs.append(self.map_of(tensor, "the model's output").index)
        if not self.graph.outputs:
            raise TraceError(
                f"the model returned {type(output).__name__} without a tensor that depends on its input; nothing can be traced"
            )
        return self.graph


def record(model: nn.Module, example: Tensor, rules: Mapping[str, Callable[..., Any]], policy: Policy) -> tuple[Graph, Any]:
    """Run ``model`` on ``example`` [N >= 2, C, H, W] and return (graph, model output)."""
    if example.ndim != 4 or example.shape[0] < 2:
        raise ArgumentError(f"example: got shape {tuple(example.shape)}, wanted [N >= 2, C, H, W]")
    recorder = Recorder(rules, policy)
    try:
        recorder.watch(model)
        with torch.no_grad():
            x = recorder.start(example)
            with recorder:
                output = model(x)
            return recorder.finish(output), output
    finally:
        recorder.unwatch()


# Calls that carry values of a tensor into Python, where they could decide anything.
_LEAKS = frozenset(
    {
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__array__",
        "equal",
        "allclose",
    }
)

# Other names of the same function.
_SYNONYMS = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add", "__sub__": "sub", "__isub__": "sub",
    "subtract": "sub", "__rsub__": "rsub", "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul",
    "multiply": "mul", "__truediv__": "div", "__itruediv__": "div", "true_divide": "div", "divide": "div",
    "concat": "cat", "concatenate": "cat", "__gt__": "gt", "greater": "gt", "__ge__": "ge",
    "greater_equal": "ge",
}  # fmt: skip


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)
    if name in _SYNONYMS:
        return _SYNONYMS[name]
    return name


def tensors_in(tree: Any) -> Iterable[Tensor]:
    """All tensors of nested tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)
