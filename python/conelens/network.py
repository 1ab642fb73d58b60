"""A traced network: what ``conelens.trace`` returns. Layer names, shapes, receptive fields, and forward passes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conelens.cone import cone_macs, whole_macs
from conelens.errors import ArgumentError, LayerError, TraceError, UnsupportedOperatorError
from conelens.execution import exact_dtype, forward_whole
from conelens.graph import Graph, Node
from conelens.names import add_conventional_aliases
from conelens.operators import Conv2d, Gate, Linear, MaxPool2d, Pair, require_rule
from conelens.tracing import lowering, record, tensors_in


@dataclass(frozen=True)
class Layer:
    """One named output of the network.

    ``shape`` (channels, height, width); ``receptive_field`` (height, width), ``stride`` and ``offset`` (y, x) in pixels: unit
    (y, x) sees the box of size ``receptive_field`` whose corner is at ``offset + stride * (y, x)``, unclipped.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, int, int]
    receptive_field: Pair
    stride: Pair
    offset: Pair
    index: int


class Cost(NamedTuple):
    """Multiply-accumulates of one forward pass."""

    cone: float
    whole: float


class LayerTable(Sequence[Layer]):
    """The layers of a network in order; prints as a table."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = list(layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __str__(self) -> str:
        rows = [["layer", "kind", "shape", "field", "stride", "offset", "also called"]]
        for layer in self._layers:
            sizes = ("x".join(map(str, size)) for size in (layer.shape, layer.receptive_field))
            steps = (",".join(map(str, step)) for step in (layer.stride, layer.offset))
            rows.append([layer.name, layer.kind, *sizes, *steps, ", ".join(layer.aliases)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    __repr__ = __str__


class Network:
    """A network as a graph of known operators. Made by :func:`trace`, with the weights of that moment."""

    def __init__(self, graph: Graph, dtype: torch.dtype, device: torch.device) -> None:
        self.graph = graph
        self.dtype = dtype
        self.device = device
        self.input_shape = graph[0].shape
        self._names: dict[str, int] = {}
        for node in graph.nodes:
            for name in (node.name, *node.aliases):
                self._names.setdefault(name, node.index)
        self._layers = _describe(graph)

    def layers(self) -> LayerTable:
        """All layers in order: name, aliases, kind, shape, receptive field, stride, offset."""
        return LayerTable(self._layers)

    def __getitem__(self, name: str) -> Layer:
        return self._layers[self.node(name).index]

    def node(self, name: str) -> Node:
        """The node of a layer name or alias; LayerError suggests the nearest names."""
        if name not in self._names:
            near = difflib.get_close_matches(str(name), self._names, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise LayerError(f"layer: got {name!r}, which this network does not have{hint} (net.layers() lists all)")
        return self.graph[self._names[name]]

    def cost(self, layer: str) -> Cost:
        """Multiply-accumulates of the forward pass to one unit of ``layer``: on its cone, and on the whole image."""
        index = self.node(layer).index
        return Cost(cone_macs(self.graph, index), whole_macs(self.graph, index))

    def check_images(self, images: Any) -> Tensor:
        """``images`` as [N, C, H, W] in the network's space, or an ArgumentError that says what differs."""
        if not isinstance(images, Tensor):
            raise ArgumentError(f"images: got {type(images).__name__}, wanted a torch.Tensor [N, C, H, W]")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_shape:
            wanted = "x".join(map(str, self.input_shape))
            raise ArgumentError(
                f"images: got shape {tuple(images.shape)}, wanted [N, {wanted.replace('x', ', ')}] as in the trace; "
                "resize the images or trace the model again at their size"
            )
        if images.dtype != self.dtype:
            raise ArgumentError(f"images: got {images.dtype}, wanted {self.dtype} as the model; use images.to({self.dtype})")
        if images.device != self.device:
            raise ArgumentError(f"images: got {images.device}, but the model is on {self.device}; move one of them")
        return images

    def __call__(self, images: Tensor) -> Tensor:
        """The network's (first) output for ``images`` [N, C, H, W]."""
        (value,) = self._run(images, [self.graph.outputs[0]])
        return self.as_returned(value)

    def as_returned(self, value: Tensor) -> Tensor:
        """Values [N, C, H, W] or [N, F] of the output node in the shape that the model itself returns."""
        return value.reshape(len(value), *self.graph.output_shapes[0])

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Raw outputs of ``layers`` for ``images`` [N, C, H, W]: {name: [N, C, H, W], or [N, F] for vectors}."""
        return dict(zip(layers, self._run(images, [self.node(name).index for name in layers]), strict=True))

    def _run(self, images: Tensor, targets: Sequence[int]) -> list[Tensor]:
        self.check_images(images)
        with torch.no_grad(), exact_dtype(self.device):
            values = forward_whole(self.graph, images, tuple(sorted(set(targets))))
        return [values[t].flatten(1) if self.graph[t].vector else values[t] for t in targets]

    def __repr__(self) -> str:
        return f"Network({len(self.graph)} layers, input {list(self.input_shape)}, {self.dtype}, {self.device})"


def trace(
    model: nn.Module,
    example: Tensor | Sequence[int],
    policy: Mapping[str, str] | str | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> Network:
    """Turn any module of the supported operators into a :class:`Network`.

    Args:
        model: in evaluation mode. Its weights count as they are now; trace again once they have changed.
        example: images [N, C, H, W] of the size to analyse, or their shape (C, H, W).
        policy: rules for operators that have no canonical one, e.g. ``{"relu6": "clamp", "silu": "gradient", "gate": "hold",
            "lrn": "jacobian"}``. "clamp" rectifies the top-down signal, "gradient" multiplies it by the slope, "hold" keeps a
            computed gate, or the statistics of an "instance_norm" or "group_norm", constant. One word applies to all
            non-linearities (gates and norms then hold).
        names: further names for layers, {alias: layer}, e.g. ``{"fire6": "features.9"}``.

    Raises:
        UnsupportedOperatorError: an operator without a rule, by name and place.
        TraceError: the graph does not reproduce the model on a second input (e.g. its path depends on the data).
        ArgumentError: a model in training mode, a wrong example.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    active = [name for name, m in model.named_modules() if m.training and isinstance(m, _TRAINING_MATTERS)]
    if active:
        raise ArgumentError(f"model: {active[0] or 'it'} is in training mode; call model.eval() first")
    rules = _policy(policy)
    with torch.inference_mode(False):
        probe = _example(model, example)
    with torch.inference_mode(False), exact_dtype(probe.device):  # autograd may need the graph's constants later
        graph, _output = record(model, probe, lowering.RULES, rules)
        add_conventional_aliases(graph)
        network = Network(graph, probe.dtype, probe.device)
        _require_rules(graph)
        _verify(network, model, probe)
    for alias, layer in (names or {}).items():
        if alias in network._names and network.node(alias) is not network.node(layer):
            raise ArgumentError(f"names: {alias!r} is already the layer {network.node(alias).name}; choose another alias")
        network.node(layer).aliases.append(alias)
    return Network(graph, probe.dtype, probe.device) if names else network


_TRAINING_MATTERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_RULES = ("clamp", "gradient", "hold", "jacobian")


class _EveryPolicy(dict[str, str]):
    def get(self, key: str, default: Any = None) -> Any:
        return {"gate": "hold", "instance_norm": "hold", "group_norm": "hold", "lrn": default}.get(key, self["*"])


def _policy(policy: Mapping[str, str] | str | None) -> Mapping[str, str]:
    for rule in [policy] if isinstance(policy, str) else (policy or {}).values():
        if rule not in _RULES:
            raise ArgumentError(f"policy: got rule {rule!r}, wanted one of {', '.join(_RULES)}")
    return _EveryPolicy({"*": policy}) if isinstance(policy, str) else policy or {}


def _example(model: nn.Module, example: Tensor | Sequence[int]) -> Tensor:
    """Two random images shaped like the example, where the model lives."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if isinstance(example, Tensor):
        if example.ndim != 4 or 0 in example.shape:
            raise ArgumentError(f"example: got shape {tuple(example.shape)}, wanted [N, C, H, W] with at least one image")
        if parameter is not None and parameter.device != example.device:
            raise ArgumentError(f"example: got {example.device}, but the model is on {parameter.device}; move one of them")
        if parameter is not None and parameter.dtype != example.dtype:
            raise ArgumentError(f"example: got {example.dtype}, but the model is {parameter.dtype}; convert one of them")
        shape, dtype, device = tuple(example.shape[1:]), example.dtype, example.device
        spread = example.float().std().item() or 1.0 if example.numel() > 1 else 1.0
        middle = example.float().mean().item()
    else:
        shape = tuple(int(s) for s in example)
        if len(shape) != 3 or min(shape) < 1:
            raise ArgumentError(f"example: got {tuple(example)}, wanted a tensor [N, C, H, W] or a shape (C, H, W)")
        dtype = torch.float32 if parameter is None else parameter.dtype
        device = torch.device("cpu") if parameter is None else parameter.device
        spread, middle = 1.0, 0.0
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, *shape, generator=generator) * spread + middle).to(dtype).to(device)


def _verify(network: Network, model: nn.Module, probe: Tensor) -> None:
    """The graph has to reproduce the model on another input, layer by layer if it does not."""
    other = (probe.flip(0, 3) * 0.75).contiguous()
    seen: dict[str, Tensor] = {}
    handles = []
    calls: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            count = calls.get(path, 0)
            calls[path] = count + 1
            name = f"{path}:{count}" if count else path
            if isinstance(output, Tensor) and name in network._names:
                seen[name] = output.detach().clone()

        return hook

    with torch.no_grad():
        leaf = network.graph.output_leaves[0]
        expected, found = _output(model, other, leaf), network(other)
        if _close(found, expected) or _chaotic(model, other, leaf, found, expected):
            return
        for path, module in model.named_modules():
            handles.append(module.register_forward_hook(watch(path)))
        try:
            model(other.clone())
        finally:
            for handle in handles:
                handle.remove()
        ours = network.forward(other, list(seen)) if seen else {}
    wrong = [name for name, value in seen.items() if not _close(ours[name], value)]
    where = f"first at {wrong[0]}" if wrong else "after the last module"
    raise TraceError(
        f"the traced graph does not reproduce the model on a second input ({where}); its computation depends on the data, "
        "on random numbers, or hides in a custom autograd.Function"
    )


def _output(model: nn.Module, images: Tensor, leaf: int) -> Tensor:
    return list(tensors_in(model(images.clone())))[leaf]


def _chaotic(model: nn.Module, images: Tensor, leaf: int, found: Tensor, expected: Tensor) -> bool:
    """Does the difference vanish beside what one unit in the last place of the images does? Random deep networks can be so."""
    if found.numel() != expected.numel() or not torch.equal(_output(model, images, leaf), expected):
        return False
    moved = _output(model, images * (1 + torch.finfo(images.dtype).eps), leaf)
    difference = (found.reshape(expected.shape).double() - expected.double()).norm()
    return bool(difference <= 100 * (moved.double() - expected.double()).norm())


def _close(got: Tensor, wanted: Tensor) -> bool:
    if got.numel() != wanted.numel():
        return False
    got = got.reshape(wanted.shape)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(got.dtype, 5e-2)
    difference = (got.double() - wanted.double()).norm()
    return bool(difference <= tolerance * wanted.double().norm()) or not bool(torch.isfinite(wanted).all())


def _require_rules(graph: Graph) -> None:
    """Refuse operators without a rule that the network's own signal meets below a later layer; the last operators may stay.

    What only computes a gate is left out: no signal comes from there, unless one projects from a layer inside it.
    """
    reached, passed = set(graph.outputs), set[int]()
    for node in reversed(graph.nodes):
        if node.index not in reached:
            continue
        if node.index in passed and node.op.refusal():
            raise UnsupportedOperatorError(f"{node.name}: {node.op.refusal()}; {node.op.advice()}")
        below = node.inputs[:1] if isinstance(node.op, Gate) else node.inputs
        reached.update(below)
        if node.index in passed or isinstance(node.op, Conv2d | Linear | MaxPool2d):
            passed.update(below)


def check_projectable(graph: Graph, target: int) -> None:
    """Raise UnsupportedOperatorError where the signal from ``target`` cannot pass."""

    def check() -> bool:
        passed = {target}
        for index in reversed(graph.ancestors((target,))):
            node = graph[index]
            if index in passed:
                require_rule(node.op, node.name)
                passed.update(node.inputs[:1] if isinstance(node.op, Gate) else node.inputs)
        return True

    graph.remember(("projectable", target), check)


def _describe(graph: Graph) -> list[Layer]:
    """Receptive fields by the affine recurrence of intervals: unit p sees [p * stride + first, p * stride + last]."""
    fields: list[np.ndarray] = []  # per node [axis, (stride, first, last)]
    layers = []
    for node in graph.nodes:
        field = np.array([[1, 0, 0], [1, 0, 0]])
        for edge, source in enumerate(node.inputs):
            below = fields[source]
            seen = np.empty_like(field)
            for axis in (0, 1):
                cells = graph[source].size[axis]
                low, high = node.op.reach(edge, axis, 0, 1, cells)
                step = node.op.scale(axis)
                stride, first, last = below[axis]
                seen[axis] = stride * step, low * stride + first, (high - 1) * stride + last
            if edge == 0:
                field = seen
            else:
                field[:, 1] = np.minimum(field[:, 1], seen[:, 1])
                field[:, 2] = np.maximum(field[:, 2], seen[:, 2])
        fields.append(field)
        stride, first, last = (tuple(int(v) for v in field[:, k]) for k in range(3))
        size = (last[0] - first[0] + 1, last[1] - first[1] + 1)
        about = (node.name, tuple(node.aliases), node.op.kind, node.shape)
        layers.append(Layer(*about, size, (stride[0], stride[1]), (first[0], first[1]), node.index))
    return layers
