"""The whole of experiments 2 and 3 on photographs with planted parts: every control beside the nodes, numbers as by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import conelens
from conelens.data import Preprocess
from conelens.errors import ArgumentError
from conelens.explanatory import ExplanatoryGraph, Features
from conelens.explanatory.evaluate.study import Study, Table, evaluate
from conelens.landmarks import Mark, PartImage, PartSet
from tests.explanatory.evaluate import by_loops
from tests.kit.planted import LOWER, SIZE, UPPER, PlantedNet, planted

pytest.importorskip("sklearn")

RECIPE = Preprocess(size=(SIZE, SIZE))
NAMES = ("head", "tail")
TITLES = [
    "Location instability, crops as annotated", "Part interpretability", "Few-shot localisation, crops as annotated",
    "Location instability, random views", "Few-shot localisation, random views",
]  # fmt: skip


class Coloured(nn.Module):
    """PlantedNet without its fourth channel, which photographs have not; or with weights as they come."""

    def __init__(self, planted_weights: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower = nn.Conv2d(3, 3, 5, stride=2, padding=2)
        self.pool = nn.MaxPool2d(2)
        self.upper = nn.Conv2d(3, 2, 5, padding=2)
        whole = PlantedNet()
        with torch.no_grad():
            for conv, other in ((self.lower, whole.lower), (self.upper, whole.upper)) if planted_weights else ():
                conv.weight.copy_(other.weight[: len(conv.weight), :3])
                assert conv.bias is not None and other.bias is not None
                conv.bias.copy_(other.bias[: len(conv.bias)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.upper(self.pool(torch.relu(self.lower(images)))))


@pytest.fixture(scope="module")
def nets() -> list[conelens.Network]:
    return [conelens.trace(Coloured(weights).eval(), (3, SIZE, SIZE)) for weights in (True, False)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> PartSet:
    """Forty photographs; the first two planted parts are marked with boxes of 40 pixels, where they are seen."""
    folder, items = tmp_path_factory.mktemp("photographs"), []
    scene = planted(40)
    for number, (image, places) in enumerate(zip(scene.images, scene.parts, strict=True)):
        pixels = (image[:3].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        marks = [
            Mark(name, (float(y) + 0.5) / SIZE, (float(x) + 0.5) / SIZE, 40 / SIZE, 40 / SIZE)
            for name, (y, x) in zip(NAMES, places, strict=False)
        ]
        items.append(PartImage(folder / f"{number:02}.png", tuple(marks[: 1 if number % 7 == 3 else 2])))
    return PartSet(items, NAMES, RECIPE)


@pytest.fixture(scope="module")
def graph(nets: list[conelens.Network], parts: PartSet) -> ExplanatoryGraph:
    return ExplanatoryGraph.fit(nets[0], parts, [LOWER, UPPER], [3, 5], edges=3, scale="channel")


@pytest.fixture(scope="module")
def study(nets: list[conelens.Network], graph: ExplanatoryGraph, parts: PartSet) -> Study:
    return evaluate(nets[0], graph, parts, random_net=nets[1], resamples=60, repeats=3)


def column(table: Table, head: str, *start: str) -> float:
    """A number of the row that begins like this."""
    (row,) = [row for row in table.rows if row[: len(start)] == list(start)]
    return float(row[table.header.index(head)].rstrip(" %"))


def test_every_control_stands_beside_the_nodes(study: Study) -> None:
    assert [table.title for table in study.tables] == TITLES
    detectors = [
        "nodes", "raw filters", "k-means of units", "strongest units, clustered", "random weights: filters",
        "random weights: nodes", "nodes, another image's evidence", "nodes, each at its mean position", "middle of the image",
    ]  # fmt: skip
    for table in (study.tables[0], study.tables[3]):
        assert [row[:2] for row in table.rows] == [[layer, name] for layer in (LOWER, UPPER) for name in detectors]
    methods = [row[0] for row in study.tables[2].rows]
    assert methods[:7] == [
        "nodes of the graph", "raw filters, the same vote", "patterns without a graph", "nodes, another image's evidence",
        "mean annotated position", "image centre", "random weights: nodes",
    ]  # fmt: skip
    assert len([name for name in methods if name.endswith((UPPER, LOWER))]) == 10
    for table in study.tables:
        assert all(len(row) == len(table.header) and "nan" not in " ".join(row) for row in table.rows)
        assert table.title in str(table) and table.note in str(table)


def test_nodes_are_parts_and_controls_are_not(study: Study) -> None:
    for title, table in zip(TITLES, study.tables, strict=True):
        if title.startswith("Location"):
            for other in ("raw filters", "nodes, another image's evidence"):
                assert column(table, "nodes minus this", LOWER, other) < -0.01
        elif title.startswith("Few-shot"):
            assert column(table, "mean: distance", "nodes of the graph") < (0.08 if title == TITLES[2] else 0.13)
            for other in (
                "nodes, another image's evidence",
                "mean annotated position",
                "image centre",
                "random weights: nodes",
            ):
                assert column(table, "nodes minus this", other) < -0.02
        else:
            assert (
                column(table, "purity", LOWER, "nodes")
                > column(table, "purity", LOWER, "nodes, another image's evidence") + 0.1
            )


def test_numbers_are_those_of_the_metrics_by_hand(
    study: Study, nets: list[conelens.Network], graph: ExplanatoryGraph, parts: PartSet
) -> None:
    features = Features.extract(nets[0], parts, [LOWER, UPPER], scale=graph.scale)
    points, diagonal = parts.landmarks.points.numpy(), math.hypot(SIZE, SIZE)

    def by_hand(positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return by_loops.deviations(positions, scores, points, diagonal, 100, "visible")

    table = study.tables[0]
    peaks = features[UPPER].float().flatten(2).max(-1)
    filters = by_hand(features.grids[UPPER].pixels(peaks.indices).numpy(), peaks.values.numpy())
    assert column(table, "mean", UPPER, "raw filters") == pytest.approx(np.nanmean(filters), abs=6e-4)
    assert column(table, "tail", UPPER, "raw filters") == pytest.approx(np.nanmean(filters[:, 1]), abs=6e-4)
    placed = graph.infer(features)[UPPER]
    scores = placed.scores.flatten(1).numpy()
    nodes = by_hand(placed.positions.flatten(1, 2).numpy(), scores)
    assert column(table, "all", UPPER, "nodes") == pytest.approx(np.nanmean(nodes), abs=6e-4)
    best = np.argsort(-np.sort(scores, 0)[::-1][:50].astype(float).sum(0), kind="stable")[:2]  # as many as filters
    assert column(table, "mean", UPPER, "nodes") == pytest.approx(np.nanmean(nodes[best]), abs=6e-4)
    difference = np.nanmean(nodes[best]) - np.nanmean(filters)
    assert column(table, "nodes minus this", UPPER, "raw filters") == pytest.approx(difference, abs=6e-4)


def test_a_study_is_saved_for_people_and_programs(study: Study, tmp_path: Path) -> None:
    text = study.save(tmp_path / "study").read_text()
    held = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [table["title"] for table in held["tables"]] == TITLES and held["tables"][0]["rows"] == study.tables[0].rows
    assert held["settings"]["images"] == 40 and held["settings"]["graph"]["edges"] == 3
    for table in study.tables:
        assert f"## {table.title}\n" in text and f"| {' | '.join(table.rows[-1])} |" in text


# --- annotations that are hard -----------------------------------------------------------------------------------------


def small(nets: list[conelens.Network], graph: ExplanatoryGraph, items: Sequence[PartImage]) -> Study:
    return evaluate(nets[0], graph, PartSet(items, NAMES, RECIPE), resamples=10, repeats=1)


def test_parts_that_are_points_have_no_purity(nets: list[conelens.Network], graph: ExplanatoryGraph, parts: PartSet) -> None:
    bare = [replace(item, annotations=tuple(Mark(*mark[:3]) for mark in item.annotations)) for item in parts.images[:12]]
    found = small(nets, graph, bare)
    assert [table.title for table in found.tables] == [title for title in TITLES if title != "Part interpretability"]
    assert not any("linear probe" in row[0] for row in found.tables[1].rows)
    # one box among points makes no difference
    assert not any("linear probe" in row[0] for row in small(nets, graph, [parts.images[0], *bare[1:]]).tables[1].rows)


def test_parts_that_few_images_show_are_not_localised(
    nets: list[conelens.Network], graph: ExplanatoryGraph, parts: PartSet
) -> None:
    items = [replace(item, annotations=item.annotations[: 2 if i < 3 else 1]) for i, item in enumerate(parts.images[:8])]
    tables = {table.title: table for table in small(nets, graph, items).tables}
    header = tables["Few-shot localisation, crops as annotated"].header
    assert "head: distance" in header and "tail: distance" not in header
    assert "tail" in tables["Location instability, crops as annotated"].header
    with pytest.raises(ArgumentError, match="got 4 annotated images, wanted at least 5"):
        small(nets, graph, items[:4])


def test_images_that_cannot_be_read_are_left_out(
    nets: list[conelens.Network], graph: ExplanatoryGraph, parts: PartSet, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    items = [replace(parts.images[0], path=tmp_path / "broken.png"), *parts.images[1:9]]
    with pytest.warns(UserWarning, match=r"skipped: .*broken\.png"):
        found = small(nets, graph, items)
    assert found.settings["images"] == 8 and found.tables == small(nets, graph, parts.images[1:9]).tables


def test_few_images_and_few_units_have_fewer_clusters(nets: list[conelens.Network], parts: PartSet) -> None:
    """Twelve filters, 2 x 2 cells, five images: no more than twenty units, not ten in any image."""
    model = nn.Sequential(nn.Conv2d(3, 12, 48, stride=48), nn.ReLU()).eval()
    net = conelens.trace(model, (3, SIZE, SIZE))
    graph = ExplanatoryGraph.fit(net, parts.take(range(5)), ["0"], 2, iterations=2)
    found = evaluate(net, graph, parts.take(range(5)), resamples=5, repeats=1)
    assert [table.title for table in found.tables] == TITLES
