"""The drawing shows the strongest nodes that hang together, their edges as wide as they are strong, the same in SVG and PNG."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from conelens.errors import ArgumentError
from conelens.explanatory.drawing import PATCH, Drawing, Link, Selection, draw_graph, select
from conelens.explanatory.pictures import Node, marked, top_patches
from conelens.heatmaps import LABEL_COLOURS
from tests.explanatory.scene import Coordinates, graph_of, layer, place, small

SVG = "{http://www.w3.org/2000/svg}"


def names(selection: Selection) -> list[list[str]]:
    return [[f"{node.filter}/{node.node}" for node in row] for row in selection.rows]


def test_the_top_row_holds_the_best_parents_and_those_above_take_turns_below() -> None:
    graph, placements = small()
    top, middle, low = names(select(graph, placements))
    # best parent of each filter, 4 before 3; 1/1 ranks highest (9) but has nothing below it
    assert top == ["0/0", "1/0"]
    # 0/0 takes 0/0 (rank 5 x share 8/8 before 6 x 6/8); 1/0 takes 1/0 (2 x 7/8), as the filter of 0/1 (6 x 5/8) is there
    assert middle == ["0/0", "1/0"]
    # 0/0 takes 1/1 (4 x 7/12), 1/0 takes 2/0 (5 x 7/12 before 3 x 11/12), then 0/0 takes 0/0 (1 x 11/12 before 2 x 2/12)
    assert low == ["1/1", "2/0", "0/0"]
    assert names(select(graph, placements, nodes=2)) == [top, middle, low[:2]]
    assert names(select(graph, placements, nodes=1)) == [["0/0"], ["0/0"], ["1/1"]]


def test_links_are_the_strongest_of_the_graph_between_drawn_nodes() -> None:
    graph, placements = small()
    for most in (1, 2):
        chosen = select(graph, placements, links=most)
        expected = []
        for upper_row, row in zip(chosen.rows, chosen.rows[1:]):
            for node in row:
                held = graph.layers[node.layer]
                ends = zip(held.edges[node.filter, node.node].tolist(), held.strength[node.filter, node.node].tolist())
                known = [Link(Node(upper_row[0].layer, *divmod(end, 2)), node, value) for end, value in ends]
                expected += sorted((link for link in known if link.upper in upper_row), key=lambda link: -link.strength)[:most]
        assert chosen.links == expected
        assert len(expected) == 4 + most


def test_a_root_shows_what_it_is_made_of() -> None:
    graph, placements = small()
    chosen = select(graph, placements, root=Node("top", 1, 0))
    assert names(chosen)[:2] == [["1/0"], ["0/1", "1/0"]]
    assert {link.upper for link in chosen.links if link.lower.layer == "middle"} == {Node("top", 1, 0)}
    middle = select(graph, placements, root=Node("middle", 1, 0))
    assert [row[0].layer for row in middle.rows] == ["middle", "low"]
    assert sorted(names(middle)[1]) == ["1/0", "2/0"]
    assert names(select(graph, placements, root=Node("top", 1, 1))) == [["1/1"]]
    assert names(select(graph, placements, root=Node("low", 0, 1))) == [["0/1"]]


def test_the_svg_is_whole_in_itself_and_shows_each_node_and_edge() -> None:
    graph, placements = small()
    drawing = draw_graph(graph, placements, Coordinates(2))
    svg = drawing.svg("a <title> & more")
    root = ElementTree.fromstring(svg)
    assert root.find(f"{SVG}title").text == "a <title> & more"  # type: ignore[union-attr]
    nodes = [node for row in drawing.selection.rows for node in row]
    tiles = root.findall(f"{SVG}image")
    assert len(tiles) == len(nodes) and len(root.findall(f"{SVG}path")) == len(drawing.selection.links)
    shown = set()
    for tile in tiles:
        kind, data = tile.attrib["href"].split(",")
        assert kind == "data:image/png;base64"
        square = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        shown.add(square[:55, :55].tobytes() + square[:55, 56:111].tobytes())
        assert np.ptp(square[56:].reshape(-1, 3), 0).max() == 0  # room for two more images
    patches = top_patches(Coordinates(2), placements, nodes, count=4)
    assert shown == {b"".join(marked(patch, 55).tobytes() for patch in row.patches) for row in patches}
    words = [text.text for text in root.findall(f"{SVG}text")]
    assert [words.count(name) for name in ("top", "middle", "low")] == [1, 1, 1]
    assert sum(word.startswith("filter ") for word in words if word) == len(nodes)
    assert svg == draw_graph(graph, placements, Coordinates(2)).svg("a <title> & more")


def test_long_layer_names_have_room_and_edges_tell_their_strength() -> None:
    graph, placements = small()
    name = "encoder.layer4.2.residual.convolution"
    graph.layers["top"].name = name
    named = graph_of(*graph.layers.values())
    drawing = draw_graph(named, {**placements, name: placements["top"]}, Coordinates(2))
    root = ElementTree.fromstring(drawing.svg())
    (text,) = (text for text in root.findall(f"{SVG}text") if text.text == name)
    first = min(float(tile.attrib["x"]) for tile in root.findall(f"{SVG}image"))
    end = float(text.attrib["x"]) + ImageFont.load_default(14).getlength(name)
    assert first - 40 < end < first
    notes = {note.text for note in root.findall(f"{SVG}path/{SVG}title")}
    assert f"{name} filter 0 node 0 to middle filter 0 node 0: strength 0.9" in notes
    assert len(notes) == len(drawing.selection.links)


def test_edges_are_as_wide_as_they_are_strong_and_end_at_their_nodes() -> None:
    low = layer("low", 4, 1, [[[0]]] * 4, [[[0.5]], [[0.25]], [[1.0]], [[-0.5]]])
    graph = graph_of(low, layer("top", 1, 1))
    placements = {"low": place(torch.tensor([3.0, 2.0, 1.5, 1.0]).view(1, 4, 1)), "top": place(torch.ones(1, 1, 1))}
    drawing = draw_graph(graph, placements, Coordinates(1), nodes=4, patches=1)
    assert sorted(link.strength for link in drawing.selection.links) == [-0.5, 0.25, 0.5, 1.0]
    assert [curve.width for curve in drawing.curves] == pytest.approx([1, 2, 2 + 4 / 3, 6])
    colours = [curve.colour for curve in drawing.curves]
    assert len(set(colours[1:])) == 1 and colours[1] not in LABEL_COLOURS and np.ptp(colours[0]) < 20
    assert len({tile.frame for tile in drawing.tiles}) == 5, "a root is grey, each node below it has a colour of its own"
    tops = {tile.at for tile in drawing.tiles}
    for curve in drawing.curves:
        (x0, y0), *_, (x3, y3) = curve.points
        assert (x0 - PATCH / 2, y0 - PATCH - 30) in tops and (x3 - PATCH / 2, y3) in tops
    picture = np.asarray(drawing.image())
    assert picture.shape == (drawing.height, drawing.width, 3)
    for curve in drawing.curves:
        (x, y), width = curve.points[3], curve.width
        if width > 3:
            assert tuple(picture[round(y) - 4, round(x)]) == curve.colour
    for tile in drawing.tiles:
        x, y = (round(value) for value in tile.at)
        inside = slice(2, PATCH - 2)
        assert (picture[y : y + PATCH, x : x + PATCH][inside, inside] == np.asarray(tile.image)[inside, inside]).all()
    assert drawing.image().tobytes() == picture.tobytes()


def test_close_strengths_are_told_apart_and_equal_ones_are_all_wide() -> None:
    placements = {"low": place(torch.tensor([3.0, 2.0, 1.0]).view(1, 3, 1)), "top": place(torch.ones(1, 1, 1))}
    for strengths, widths in (((0.91, 0.9, 0.92), [2, 4, 6]), ((0.5, 0.5, 0.5), [6, 6, 6])):
        low = layer("low", 3, 1, [[[0]]] * 3, [[[value]] for value in strengths])
        drawing = draw_graph(graph_of(low, layer("top", 1, 1)), placements, Coordinates(1), root=Node("top", 0, 0), patches=1)
        assert [curve.width for curve in drawing.curves] == pytest.approx(widths, rel=1e-5)


def test_frames_below_have_the_colour_of_their_strongest_edge() -> None:
    graph, placements = small()
    drawing = draw_graph(graph, placements, Coordinates(2))
    frames = {node: tile.frame for tile, node in zip(drawing.tiles, _by_place(drawing), strict=True)}
    top = drawing.selection.rows[0]
    assert len(top) > 1 and len({frames[node] for node in top}) == len(top)
    for row in drawing.selection.rows[1:]:
        for node in row:
            best = max((link for link in drawing.selection.links if link.lower == node), key=lambda link: link.strength)
            assert frames[node] == frames[best.upper]


def _by_place(drawing: Drawing) -> list[Node]:
    """The node of each tile, by the names below it."""
    heights = sorted({tile.at[1] for tile in drawing.tiles})
    said = {(words.at[0], words.at[1]): words.text.split()[-1] for words in drawing.words}
    return [
        Node(drawing.selection.rows[heights.index(y)][0].layer, int(said[x, y + PATCH + 2]), int(said[x, y + PATCH + 15]))
        for x, y in (tile.at for tile in drawing.tiles)
    ]


def test_one_image_for_all_nodes_leaves_those_blank_that_it_does_not_show() -> None:
    graph, placements = small()
    scores = placements["top"].scores.clone()
    scores[0, 0, 0] = 0
    placements["top"] = placements["top"]._replace(scores=scores)
    dataset = Coordinates(2)
    drawing = draw_graph(graph, placements, dataset, image=0, root=Node("top", 0, 0))
    assert dataset.read == [0]
    blank = [np.ptp(np.asarray(tile.image).reshape(-1, 3), 0).max() == 0 for tile in drawing.tiles]
    assert blank == [True] + [False] * (len(blank) - 1)


def test_wrong_input_is_named() -> None:
    graph, placements = small()
    dataset = Coordinates(2)
    with pytest.raises(ArgumentError, match=r"'conv9'.*top, middle, low"):
        select(graph, placements, root=Node("conv9", 0, 0))
    with pytest.raises(ArgumentError, match=r"filter 0\.\.1"):
        select(graph, placements, root=Node("top", 7, 0))
    with pytest.raises(ArgumentError, match="lack middle"):
        select(graph, {name: placements[name] for name in ("top", "low")})
    with pytest.raises(ArgumentError, match="at least 1"):
        select(graph, placements, nodes=0)
    with pytest.raises(ArgumentError, match="but 2 were placed"):
        draw_graph(graph, placements, Coordinates(1))
    with pytest.raises(ArgumentError, match=r"wanted 0\.\.1"):
        draw_graph(graph, placements, dataset, image=2)
    dark = {**placements, "top": place(torch.zeros(2, 2, 2))}
    with pytest.raises(ArgumentError, match="no image shows any node of top"):
        select(graph, dark)
    graph.layers["middle"].edges = None
    with pytest.raises(ArgumentError, match="middle has no edges"):
        select(graph, placements)
