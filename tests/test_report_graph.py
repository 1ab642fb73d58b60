"""The page of an explanatory graph: tables, drawing, nodes, heat maps and learning, all inside one file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from conelens.errors import ArgumentError
from conelens.heatmaps import LABEL_COLOURS
from conelens.report import Figure, Page, Section, write_page
from conelens.report.graph import curves, graph_page
from tests.explanatory.scene import Coordinates, graph_of, small


def test_the_page_shows_all_of_a_graph_and_needs_no_other_file(tmp_path: Path) -> None:
    graph, placements = small()
    tables = [("Location <instability>", ("detector", "top"), [("nodes", "0.061"), ("filters", "0.140")])]
    page = graph_page("cats", graph, placements, Coordinates(2), tables=tables)
    titles = [section.title for section in page.sections]
    nodes = ["Nodes of top", "Nodes of middle", "Nodes of low"]
    assert titles == ["Location <instability>", "The graph", *nodes, "Heat maps", "Learning"]
    text = write_page(page, tmp_path).read_text(encoding="utf-8")
    assert "Location &lt;instability&gt;" in text and "<td>0.061</td>" in text
    assert text.count("<svg ") == 3  # the graph, and two nodes with what they are made of
    assert "-3.0000, -1.5000" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    figures = {figure.name for section in page.sections for figure in section.figures}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == figures
    assert len(figures) == 3 + 3 + 1 + 1


def test_a_drawing_of_an_older_page_is_removed_with_it(tmp_path: Path) -> None:
    graph, placements = small()
    write_page(graph_page("cats", graph, placements, Coordinates(2)), tmp_path)
    assert (tmp_path / "figures" / "graph.png").exists()
    only = Figure("other", curves({"top": [1.0]}))
    write_page(Page("new", sections=[Section("one", figures=[only])]), tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["other.png"]


def test_a_single_layer_and_a_graph_without_history_have_a_page(tmp_path: Path) -> None:
    graph, placements = small()
    graph.layers["top"].history = []
    page = graph_page("one", graph_of(graph.layers["top"]), {"top": placements["top"]}, Coordinates(2), images=[1])
    assert [section.title for section in page.sections] == ["The graph", "Nodes of top", "Heat maps", "Learning"]
    assert "none kept" in write_page(page, tmp_path).read_text(encoding="utf-8")


def test_placements_that_do_not_fit_are_named() -> None:
    graph, placements = small()
    with pytest.raises(ArgumentError, match="lack low"):
        graph_page("x", graph, {name: placements[name] for name in ("middle", "top")}, Coordinates(2))
    with pytest.raises(ArgumentError, match="lack top, middle, low"):
        graph_page("x", graph, {}, Coordinates(2))
    with pytest.raises(ArgumentError, match="but 2 were placed"):
        graph_page("x", graph, placements, Coordinates(1))


def test_a_curve_rises_where_its_values_do() -> None:
    values = [-3.0, -1.0, -2.0]
    picture = np.asarray(curves({"conv": values, "flat": [2.0]}))
    y, x = np.nonzero((picture == LABEL_COLOURS[0]).all(-1))
    ends = [y[np.abs(x - centre) <= 1].mean() for centre in (x.min() + 2, (x.min() + x.max()) / 2, x.max() - 2)]
    assert ends[0] > ends[2] > ends[1]
    assert (ends[0] - ends[2]) / (ends[0] - ends[1]) == pytest.approx(0.5, abs=0.05)
    assert (picture == LABEL_COLOURS[1]).all(-1).any()
    for empty in ({}, {"conv": []}):
        with pytest.raises(ArgumentError, match="at least one"):
            curves(empty)
