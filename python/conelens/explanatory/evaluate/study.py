"""Experiments 2 and 3 of the papers as tables: are nodes parts, do three annotations find a part? Each beside controls."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.bootstrap import Interval, interval, resampled_instability
from conelens.explanatory.evaluate.detectors import Detector, constant_position, raw_filters, without_evidence
from conelens.explanatory.evaluate.instability import RELEASE_NODES, instability
from conelens.explanatory.evaluate.localisation import Localisation, Method, instances, localise
from conelens.explanatory.evaluate.localisation_baselines import (
    GlobalRidge,
    ImageCentre,
    LinearProbe,
    LocalTemplate,
    MeanPosition,
    NearestNeighbour,
)
from conelens.explanatory.evaluate.midlevel import kmeans_patterns, strongest_unit_patterns
from conelens.explanatory.evaluate.purity import purity_of_maps, purity_of_nodes
from conelens.explanatory.evaluate.units import unit_blocks
from conelens.explanatory.evaluate.vote import Vote
from conelens.explanatory.features import Features
from conelens.explanatory.graph import ExplanatoryGraph, Progress, of_stage
from conelens.explanatory.layer import Placement
from conelens.explanatory.pictures import rank_scores
from conelens.landmarks import PartSet, jittered
from conelens.network import Network

RADIUS = 35.0  # pixels: half of the papers' patches
ANNOTATED = "crops as annotated"
SHOTS = 3  # annotated images of a part
STRONGEST = 10  # units of an image that a baseline clusters


@dataclass(frozen=True)
class Table:
    """A table for people: title, header, rows of text, and what to know when reading it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *text, self.note])


@dataclass(frozen=True)
class Study:
    """The tables, and under what settings they were made."""

    tables: list[Table]
    settings: dict[str, Any]

    def save(self, folder: str | Path, name: str = "study") -> Path:
        """Write ``<name>.json`` and ``<name>.md`` (for people) into a folder. -> the latter's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        sections = []
        for table in self.tables:
            rows = [table.header, ["---"] * len(table.header), *table.rows]
            sections.append(
                f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{table.note}\n"
            )
        path = folder / f"{name}.md"
        path.write_text("\n".join(sections), encoding="utf-8")
        return path


@dataclass(frozen=True)
class _Crops:
    """One way to cut the annotated photographs, with everything that was found on them."""

    title: str
    parts: PartSet
    features: Features
    placements: dict[str, Placement]
    alone: dict[str, Placement]
    random: tuple[Features, dict[str, Placement]] | None


def evaluate(
    net: Network,
    graph: ExplanatoryGraph,
    parts: PartSet,
    *,
    random_net: Network | None = None,
    smallest: float = 0.6,
    seed: int = 0,
    resamples: int = 1000,
    repeats: int = 10,
    progress: Progress | None = None,
) -> Study:
    """Location instability, part interpretability and few-shot localisation of a graph's nodes, beside all controls.

    Only annotated images that can be read are used. Everything is shown twice: on the crops as they are, where objects lie much
    alike, so that any fixed position is near a part; and on random views of them, of which the graph was not learned. Part
    interpretability needs the extent of parts: without boxes or masks there is no table of it. A part that fewer than four
    images show is not localised.

    Args:
        net, graph: the network and what was learned of it.
        parts: photographs with annotated parts, as of ``conelens.landmarks``.
        random_net: the same network with random weights, for controls; its graph is learned here, from the annotated images.
        smallest: share of a side that a random view shows at least.
        seed: of random views, draws and controls.
        resamples: of the bootstrap.  repeats: draws of three annotated images.
        progress: called with (what, done, in all).

    Raises:
        ArgumentError: fewer than five annotated images. DataError: none can be read, or a network gives NaN.
        ConelensError: scikit-learn is not installed.
    """
    marked = parts.landmarks.points.isfinite().all(-1).any(1).nonzero()[:, 0].tolist()
    if len(marked) < 5:
        raise ArgumentError(f"parts: got {len(marked)} annotated images, wanted at least 5")
    layers = list(graph.layers)

    def extract(views: PartSet, title: str) -> Features:
        return Features.extract(
            net, views, layers, scale=graph.scale, progress=of_stage(progress, f"{title}: features")
        ).cpu()  # fmt: skip

    parts = parts.take(marked)
    annotated = extract(parts, ANNOTATED)
    if annotated.skipped:
        parts = parts.take([image for image in range(len(parts)) if image not in annotated.skipped])
        annotated = extract(parts, ANNOTATED)
    tables: list[Table] = []
    # mixtures of every filter: of one layer alone there are no edges
    alone = {layer: _like(graph, net, annotated.only([layer]), progress) for layer in layers}
    random_graph: ExplanatoryGraph | None = None
    for title, views in ((ANNOTATED, parts), ("random views", jittered(parts, seed, smallest))):
        features = annotated if views is parts else extract(views, title)
        placements = graph.infer(features, progress=progress)
        random = None
        if random_net is not None:
            scale: Any = "auto" if random_graph is None else random_graph.scale
            noise = Features.extract(
                random_net, views, layers, scale=scale, progress=of_stage(progress, f"{title}: random weights")
            ).cpu()
            if random_graph is None:
                random_graph = _like(graph, random_net, noise, progress)
            random = (noise, random_graph.infer(noise, progress=progress))
        single = {layer: alone[layer].infer(features.only([layer]))[layer] for layer in layers}
        crops = _Crops(title, views, features, placements, single, random)
        tables.append(_stability(crops, graph, resamples, seed, progress))
        if views is parts and _have_extent(parts):
            tables.append(_purity(crops, graph, seed, progress))
        tables += _localisation(crops, graph, repeats, resamples, seed, progress)
    settings = {"images": len(parts), "seed": seed, "smallest": smallest, "resamples": resamples, "graph": graph.settings}
    return Study(tables, settings)


def _like(graph: ExplanatoryGraph, net: Network, features: Features, progress: Progress | None) -> ExplanatoryGraph:
    """A graph of other features, learned with the settings of this one."""
    counts = [graph[name].shape[1] for name in features.layers]
    return ExplanatoryGraph.fit(
        net, features, nodes_per_filter=counts, edges=graph.settings["edges"], iterations=graph.settings["iterations"],
        seed=graph.settings["seed"], form=graph.rules, progress=progress,
    )  # fmt: skip


def _nodes(placement: Placement, name: str = "nodes") -> Detector:
    return Detector(name, placement.positions.flatten(1, 2), placement.scores.flatten(1))


def _best(placements: dict[str, Placement], layer: str, name: str = "nodes") -> Detector:
    """As many nodes as there are filters: those whose fifty best scores add up highest; labels have no say."""
    count = placements[layer].scores.shape[1]
    order = rank_scores(placements[layer]).flatten().sort(descending=True, stable=True).indices[:count]
    return _nodes(placements[layer], name).nodes(order)


# --- experiment 2 ------------------------------------------------------------------------------------------------------


def _detectors(crops: _Crops, layer: str, seed: int) -> Iterator[tuple[Detector, Detector | None]]:
    """(detector, all its nodes where it is a choice of them), the graph's first."""
    features, grid = crops.features[layer], crops.features.grids[layer]
    nodes = _best(crops.placements, layer)
    yield nodes, _nodes(crops.placements[layer])
    yield raw_filters(features, grid), None
    # as many clusters as filters, or as there are units to cluster
    active = torch.cat([(block.amax(1) > 0).sum(1) for block in unit_blocks(features)])
    few = min(STRONGEST, features.shape[2] * features.shape[3])
    clusters, fewer = (min(features.shape[1], int(units.sum())) for units in (active, active.clamp(max=few)))
    yield replace(kmeans_patterns(features, grid, clusters, seed=seed), name="k-means of units"), None
    strongest = strongest_unit_patterns(features, grid, fewer, per_image=few, seed=seed)
    yield replace(strongest, name="strongest units, clustered"), None
    if crops.random is not None:
        noise, found = crops.random
        yield replace(raw_filters(noise[layer], grid), name="random weights: filters"), None
        yield _best(found, layer, "random weights: nodes"), _nodes(found[layer])
    yield replace(without_evidence(nodes, seed), name="nodes, another image's evidence"), None
    yield replace(constant_position(nodes), name="nodes, each at its mean position"), None
    middle = [(side - 1) / 2 for side in crops.features.image_size]
    yield replace(constant_position(nodes, (middle[0], middle[1])), name="middle of the image"), None


def _stability(crops: _Crops, graph: ExplanatoryGraph, resamples: int, seed: int, progress: Progress | None) -> Table:
    landmarks = crops.parts.landmarks
    header = ["layer", "detector", *landmarks.names, "mean", "95 %", "nodes minus this", "95 %", "release's choice", "all"]
    rows = []
    for number, layer in enumerate(graph.layers):
        own: Tensor | None = None
        own_mean = 0.0
        for detector, every in _detectors(crops, layer, seed):
            found = instability(detector, landmarks)
            values = resampled_instability(detector, landmarks, resamples=resamples, seed=seed)
            bounds = interval(found.mean, values)
            release = instability(
                every or detector, landmarks, selection="release", nodes=min(RELEASE_NODES, _count(every or detector))
            )
            row = [layer, detector.name, *(_number(float(d)) for d in found.by_part), _number(found.mean), _bounds(bounds)]
            if own is None:
                own, own_mean = values, found.mean
                row += ["", ""]
            else:
                difference = interval(own_mean - found.mean, own - values)
                row += [_number(difference.estimate, True), _bounds(difference, True)]
            row += [_number(release.mean), "" if every is None else _number(instability(every, landmarks).mean)]
            rows.append(row)
        if progress is not None:
            progress(f"{crops.title}: stability", number + 1, len(graph.layers))
    note = (
        "Location instability (lower is better): standard deviation of the distance between detector and part over the "
        "detector's 100 best images that show the part, over the image's diagonal. As many nodes as the layer has filters, by "
        "score. Intervals: bootstrap over images, paired. Release's choice: 20 best images, 167 best nodes or filters. All: "
        "every node."
    )
    return Table(f"Location instability, {crops.title}", header, rows, note)


def _count(detector: Detector) -> int:
    return detector.scores.shape[1]


def _have_extent(parts: PartSet) -> bool:
    """Are there boxes or masks for all parts, or are some mere points?"""
    return not any(
        item.masks is None and any(mark.part in parts.names and math.isnan(mark.height) for mark in item.visible())
        for item in parts.images
    )


def _purity(crops: _Crops, graph: ExplanatoryGraph, seed: int, progress: Progress | None) -> Table:
    rows = []
    for number, layer in enumerate(graph.layers):
        features, grid = crops.features[layer], crops.features.grids[layer]
        filters = purity_of_maps(features, grid, crops.parts.regions, RADIUS)
        share = max(float(filters.shown.mean()), 1 / len(features))  # on tiny maps no unit may be among the strongest
        nodes = _best(crops.placements, layer)
        detectors = [
            nodes,
            replace(raw_filters(features, grid), name="raw filters, strongest unit"),
            replace(without_evidence(nodes, seed), name="nodes, another image's evidence"),
            replace(constant_position(nodes), name="nodes, each at its mean position"),
        ]
        found = [purity_of_nodes(d, crops.parts.regions, RADIUS, share=share) for d in detectors]
        rows += [[layer, each.name, _number(each.mean)] for each in (found[0], filters, *found[1:])]
        if progress is not None:
            progress("purity", number + 1, len(graph.layers))
    note = (
        "Part interpretability (higher is better): share of images in which the detector's region, discs of radius "
        f"{RADIUS:.0f} pixels, meets its best part with an intersection over union above 0.2, mean over detectors; parts are "
        "filled boxes or masks. Nodes and single units speak up in as many images as the filters do."
    )
    return Table("Part interpretability", ["layer", "detector", "purity"], rows, note)


# --- experiment 3 ------------------------------------------------------------------------------------------------------


def _localisation(
    crops: _Crops, graph: ExplanatoryGraph, repeats: int, resamples: int, seed: int, progress: Progress | None
) -> list[Table]:
    landmarks, size = crops.parts.landmarks, crops.features.image_size
    points, boxes = instances(landmarks)
    present = points.isfinite().all(-1)  # [N, P, G]
    often = (present.any(2).sum(0) > SHOTS).nonzero()[:, 0]
    if not len(often):
        return []
    points, boxes, present = points[:, often], boxes[:, often], present[:, often]
    names = [landmarks.names[part] for part in often.tolist()]
    have_boxes = bool((boxes.isfinite().all(-1) | ~present).all())
    features, grids = crops.features, crops.features.grids
    layers = list(graph.layers)

    def votes(name: str, detectors: list[Detector]) -> Vote:
        positions, scores = (torch.cat([getattr(d, field) for d in detectors], 1) for field in ("positions", "scores"))
        return Vote(Detector(name, positions, scores), size)

    found = votes("nodes of the graph", [_nodes(crops.placements[layer]) for layer in layers])
    methods: list[Method] = [
        found,
        votes("raw filters, the same vote", [raw_filters(features[layer], grids[layer]) for layer in layers]),
        votes("patterns without a graph", [_nodes(crops.alone[layer]) for layer in layers]),
        votes("nodes, another image's evidence", [without_evidence(found.detector, seed)]),
        MeanPosition(len(crops.parts)),
        ImageCentre(len(crops.parts), size),
    ]
    if crops.random is not None:
        methods.append(votes("random weights: nodes", [_nodes(crops.random[1][layer]) for layer in layers]))
    for layer in dict.fromkeys((layers[-1], layers[0])):
        for kind in (LinearProbe, LocalTemplate):
            if kind is LinearProbe and not have_boxes:
                continue  # parts that are points have no units of their own
            methods.append(_named(kind(features[layer], grids[layer]), layer))
        methods += [
            _named(NearestNeighbour(features[layer]), layer),
            _named(NearestNeighbour(features[layer], pooled=True), layer),
            _named(GlobalRidge(features[layer], size), layer),
        ]
    result = localise(methods, points, boxes, names, size, shots=SHOTS, repeats=repeats, seed=seed)
    if progress is not None:
        progress(f"{crops.title}: localisation", 1, 1)
    return [_localisation_table(crops.title, result, found.name, resamples, seed)]


def _named(method: Any, layer: str) -> Any:
    method.name = f"{method.name}, {layer}"
    return method


def _localisation_table(title: str, result: Localisation, own: str, resamples: int, seed: int) -> Table:
    parts = [*result.parts, "mean"]
    paired = {(row.method, row.part): row for row in result.against(own, samples=resamples, seed=seed)}
    header = ["method", *(f"{part}: distance" for part in parts), "95 %", "nodes minus this", "95 %"]
    header += [f"{part}: inside" for part in parts]
    by_method: dict[str, dict[str, Any]] = {}
    for row in result.table(samples=resamples, seed=seed):
        by_method.setdefault(row.method, {})[row.part] = row
    rows = []
    for method, found in by_method.items():
        cells = [method, *(_number(found[part].distance.estimate) for part in parts), _bounds(found["mean"].distance)]
        difference = paired.get((method, "mean"))
        cells += (
            ["", ""]
            if difference is None
            else [_number(difference.distance.estimate, True), _bounds(difference.distance, True)]
        )
        rows.append(cells + [f"{100 * found[part].rate.estimate:.0f} %" for part in parts])
    note = (
        "Three annotated images per part, drawn anew several times; distance from the part's centre over the image's diagonal "
        "(lower is better), and share of answers inside the part's box. Intervals: bootstrap over images and draws, paired."
    )
    return Table(f"Few-shot localisation, {title}", header, rows, note)


def _number(value: float, signed: bool = False) -> str:
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _bounds(found: Interval, signed: bool = False) -> str:
    return f"[{_number(found.low, signed)}, {_number(found.high, signed)}]"
