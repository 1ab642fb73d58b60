"""What other tools get is the graph: nodes, edges, their numbers and their direction."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from conelens.errors import ArgumentError, ConelensError
from conelens.explanatory.export import to_networkx, write_graphml
from tests.explanatory.scene import graph_of, layer, small

networkx = pytest.importorskip("networkx")


def test_networkx_holds_every_node_and_edge_of_the_graph() -> None:
    graph, _ = small()
    made = to_networkx(graph)
    nodes, edges = {}, {}
    order = list(graph.layers.values())
    for number, held in enumerate(order):
        for d in range(held.mean.shape[0]):
            for k in range(held.mean.shape[1]):
                y, x = held.mean[d, k].tolist()
                place = {"y": y, "x": x, "sigma": float(held.sigma[d, k])}
                nodes[f"{held.name}/{d}/{k}"] = {"layer": held.name, "filter": d, "node": k, **place}
                if held.edges is None:
                    continue
                above = order[number + 1]
                for m in range(held.edges.shape[2]):
                    upper, width = int(held.edges[d, k, m]), above.mean.shape[1]
                    name = f"{above.name}/{upper // width}/{upper % width}"
                    edges[name, f"{held.name}/{d}/{k}"] = float(held.strength[d, k, m])  # type: ignore[index]
    assert dict(made.nodes(data=True)) == nodes
    assert {(a, b): data["strength"] for a, b, data in made.edges(data=True)} == edges
    assert made.number_of_edges() == 2 * 4 + 2 * 6


def test_the_graph_and_its_placements_tell_of_themselves(tmp_path: Path) -> None:
    graph, placements = small()
    assert networkx.utils.graphs_equal(graph.to_networkx(), to_networkx(graph))
    written = graph.write_graphml(tmp_path / "a.graphml")
    assert written.read_text() == write_graphml(graph, tmp_path / "b.graphml").read_text()
    shape = list(placements["top"].scores.shape)
    assert repr(placements["top"]) == f"Placement(positions {[*shape, 2]}, scores {shape}, activations {shape})"


def test_edges_point_to_what_a_part_is_made_of() -> None:
    graph, _ = small()
    made = to_networkx(graph)
    below = networkx.descendants(made, "top/1/0")
    assert {"middle/0/1", "middle/1/0", "low/1/0"} <= below
    assert not any(name.startswith("top") for name in below)
    assert not made.out_degree("low/0/0")


def test_graphml_is_read_back_as_the_same_graph(tmp_path: Path) -> None:
    odd = 'conv "5" <3> & é'
    generator = torch.Generator().manual_seed(0)
    strength = torch.randn(4, 3, 2, generator=generator)
    low = layer("low", 4, 3, torch.randperm(24, generator=generator).view(4, 3, 2).tolist(), strength.tolist())
    low.mean = low.mean + torch.rand(low.mean.shape, generator=generator)
    graph = graph_of(low, layer(odd, 8, 3))
    path = write_graphml(graph, tmp_path / "graph.graphml")
    read, made = networkx.read_graphml(path), to_networkx(graph)
    assert read.is_directed()
    assert dict(read.nodes(data=True)) == dict(made.nodes(data=True))
    held, wanted = ({(a, b): data for a, b, data in net.edges(data=True)} for net in (read, made))
    assert held == wanted and len(held) == 24
    first = path.read_bytes()
    assert write_graphml(graph, path).read_bytes() == first


def test_a_graph_of_one_layer_has_nodes_alone(tmp_path: Path) -> None:
    read = networkx.read_graphml(write_graphml(graph_of(layer("top", 2, 3)), tmp_path / "one.graphml"))
    assert (read.number_of_nodes(), read.number_of_edges()) == (6, 0)


def test_what_goes_wrong_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "graph.graphml"
    path.write_text("old")
    with pytest.raises(ArgumentError, match="layer low has no edges"):
        write_graphml(graph_of(layer("low", 2, 2), layer("top", 2, 2)), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_graphml_needs_no_networkx_and_networkx_is_asked_for_by_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, _ = small()
    monkeypatch.setitem(sys.modules, "networkx", None)
    assert write_graphml(graph, tmp_path / "graph.graphml").stat().st_size > 1000
    with pytest.raises(ConelensError, match=r"conelens\[graph\]"):
        to_networkx(graph)
