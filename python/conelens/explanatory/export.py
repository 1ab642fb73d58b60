"""An explanatory graph for other tools: NetworkX in memory, GraphML on disk.

Edges point from the upper node to the lower one, from a part to what it is made of, so that ``networkx.descendants`` gives the
parts of a part. Nodes are called "layer/filter/node".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from conelens.errors import ArgumentError, ConelensError
from conelens.files import replacing

if TYPE_CHECKING:
    from conelens.explanatory.graph import ExplanatoryGraph

_KEYS = (
    ("node", "layer", "string"),
    ("node", "filter", "long"),
    ("node", "node", "long"),
    ("node", "y", "double"),
    ("node", "x", "double"),
    ("node", "sigma", "double"),
    ("edge", "strength", "double"),
)


def to_networkx(graph: ExplanatoryGraph) -> Any:
    """The graph as a ``networkx.DiGraph``, upper node -> lower node.

    Node attributes: ``layer``, ``filter``, ``node`` (numbers from 0), ``y``, ``x`` (prior position) and ``sigma``, in pixels of
    the network's input. Edge attribute: ``strength``, larger is stronger.

    Raises:
        ConelensError: NetworkX is not installed.
    """
    try:
        import networkx
    except ImportError as error:
        raise ConelensError("to_networkx needs NetworkX: pip install 'conelens[graph]'") from error
    result = networkx.DiGraph()
    result.add_nodes_from(_nodes(graph))
    result.add_edges_from((upper, lower, {"strength": strength}) for upper, lower, strength in _edges(graph))
    return result


def write_graphml(graph: ExplanatoryGraph, path: str | Path) -> Path:
    """Write the graph of :func:`to_networkx` as GraphML, which networkx, igraph, Gephi and yEd read; needs none of them.

    The text streams to disk (some 130 bytes an edge); an old file stays whole until the new one is complete.
    """
    target = Path(path)
    with replacing(target) as (part,), part.open("w", encoding="utf-8") as file:
        file.writelines(_graphml(graph))
    return target


def _graphml(graph: ExplanatoryGraph) -> Iterator[str]:
    yield '<?xml version="1.0" encoding="UTF-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n'
    for owner, name, kind in _KEYS:
        yield f'<key id="{name}" for="{owner}" attr.name="{name}" attr.type="{kind}"/>\n'
    yield '<graph edgedefault="directed">\n'
    for name, values in _nodes(graph):
        data = "".join(f'<data key="{key}">{_text(value)}</data>' for key, value in values.items())
        yield f"<node id={quoteattr(name)}>{data}</node>\n"
    quoted = {name: quoteattr(name) for name, _ in _nodes(graph)}
    for upper, lower, strength in _edges(graph):
        yield f'<edge source={quoted[upper]} target={quoted[lower]}><data key="strength">{strength!r}</data></edge>\n'
    yield "</graph>\n</graphml>\n"


def _nodes(graph: ExplanatoryGraph) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and attributes, bottom layer first, then by filter and node."""
    for layer in graph.layers.values():
        per_filter = layer.mean.shape[1]
        values = zip(layer.mean.flatten(0, 1).tolist(), layer.sigma.flatten().tolist(), strict=True)
        for flat, ((y, x), sigma) in enumerate(values):
            number, node = divmod(flat, per_filter)
            attributes = {"layer": layer.name, "filter": number, "node": node, "y": y, "x": x, "sigma": sigma}
            yield f"{layer.name}/{number}/{node}", attributes


def _edges(graph: ExplanatoryGraph) -> Iterator[tuple[str, str, float]]:
    """Upper node, lower node, strength; lower nodes in order, bottom layer first."""
    layers = list(graph.layers.values())
    for layer, above in pairwise(layers):
        if layer.edges is None or layer.strength is None:
            raise ArgumentError(f"graph: layer {layer.name} has no edges though {above.name} is above it; fit the graph first")
        uppers = [f"{above.name}/{d}/{k}" for d in range(above.mean.shape[0]) for k in range(above.mean.shape[1])]
        lowers = (f"{layer.name}/{d}/{k}" for d in range(layer.mean.shape[0]) for k in range(layer.mean.shape[1]))
        rows = zip(lowers, layer.edges.flatten(0, 1).tolist(), layer.strength.flatten(0, 1).tolist(), strict=True)
        for lower, parents, strengths in rows:
            for parent, strength in zip(parents, strengths, strict=True):
                yield uppers[parent], lower, strength


def _text(value: str | int | float) -> str:
    return escape(value) if isinstance(value, str) else repr(value)
