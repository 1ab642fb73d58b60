"""The explanatory graph (Zhang et al. 2018, 2021): part patterns of every filter, linked across layers."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conelens.data import ImageDataset
from conelens.errors import ArgumentError, CheckpointError, DataError, DeadUnitWarning
from conelens.explanatory import export, storage
from conelens.explanatory.features import Features
from conelens.explanatory.fit import LayerFit, blocks, choose_candidates, first_layer_state
from conelens.explanatory.layer import GraphLayer, Parents, Placement
from conelens.explanatory.rules import Rules, check_order, nodes_for, preset_layers, rules_of
from conelens.network import Network

_BLOCK_CELLS = 1 << 26

Progress = Callable[[str, int, int], None]
Watch = Callable[[str, int, float], None]


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C during a fit; ``folder`` holds what was learned, if a checkpoint was asked for and there is something to keep."""

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            kept = "nothing was kept; fit with checkpoint=FOLDER to be able to go on"
        elif (folder / storage.FILE).exists():
            kept = f"{folder} goes on from here"
        else:
            kept = "nothing was learned yet"
        super().__init__(f"interrupted; {kept}")
        self.folder = folder


class ExplanatoryGraph:
    """Nodes and edges of some layers of a network. Made by :meth:`fit` or :meth:`load`.

    layers: GraphLayer by name, bottom first.  scale: what activity is divided by, for images to come.
    settings: how it was made.
    """

    def __init__(
        self, layers: dict[str, GraphLayer], scale: dict[str, Tensor], settings: dict[str, Any], net: Network | None = None
    ) -> None:
        self.layers = layers
        self.scale = scale
        self.settings = settings
        self.net = net
        self.rules = Rules(**settings["rules"])

    def __repr__(self) -> str:
        nodes = ", ".join(f"{name} {layer.shape[0]}x{layer.shape[1]}" for name, layer in self.layers.items())
        return f"ExplanatoryGraph({nodes})"

    def __getitem__(self, layer: str) -> GraphLayer:
        if layer not in self.layers:
            raise ArgumentError(f"layer: got {layer!r}, wanted one of {', '.join(self.layers)} (the layers of this graph)")
        return self.layers[layer]

    # --- learning ------------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        net: Network | None,
        images: Tensor | ImageDataset | Features,
        layers: Sequence[str] | None = None,
        nodes_per_filter: Sequence[int] | int | None = None,
        *,
        edges: int = 15,
        iterations: int = 20,
        seed: int = 0,
        form: str | Rules = "recommended",
        noise: float | None = None,
        negatives: Tensor | ImageDataset | None = None,
        scale: str = "auto",
        batch_size: int = 16,
        memory: int = 4 << 30,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> ExplanatoryGraph:
        """Learn a graph from images of one kind of object, layer by layer from the top (Zhang et al., Algorithm 1).

        Args:
            net: from :func:`conelens.trace`; may be None when ``images`` are Features.
            images: [N, C, H, W] or a data set in the network's space, objects cropped and resized to its input; or Features.
            layers: names, bottom first; default: the papers' for VGG-16 and ResNets at 224 pixels.
            nodes_per_filter: K of each layer, or one number for all; default 40, 20, 10 at maps of 28, 14, 7 cells.
            edges: parents per node, M; fewer where the layer above has fewer nodes.
            iterations: of expectation-maximisation, per layer.
            seed: of the nodes' first positions. Same input and seed: same graph.
            form: "recommended", "paper" or "release" (see :class:`Rules`), or Rules of your own.
            noise: level tau of the noise component; 0.1 in the papers.
            negatives, scale, batch_size, memory: as for :meth:`Features.extract`.
            checkpoint: folder that keeps the state after every iteration; a fit that finds one there goes on from it, and ends
                with the same graph. The finished graph is saved there; files of features lie there while it learns.
            progress: called with (what, done, in all): ("features", images...), (layer name, iterations...).
            watch: called with (layer name, iteration, log-likelihood per unit of activity) after every iteration.

        Raises:
            ArgumentError, LayerError: wrong arguments. DataError: images without any activity, NaN.
            CheckpointError: the checkpoint is of another fit. OSError: it cannot be written. FitInterrupted: on Ctrl-C.
        """
        rules = rules_of(form, noise)
        for name, value in (("edges", edges), ("iterations", iterations)):
            if value < 1:
                raise ArgumentError(f"{name}: got {value}, wanted at least 1")
        folder = None if checkpoint is None else Path(checkpoint)
        room = None if folder is None or isinstance(images, Features) else folder / "features"
        for needed in (folder, room):
            if needed is not None:
                needed.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written says so before the work
        try:
            features = _features(net, images, layers, scale, negatives, batch_size, memory, room, progress)
            counts = _counts(features, nodes_per_filter)
            settings = {
                "layers": features.layers,
                "nodes_per_filter": counts,
                "edges": edges,
                "iterations": iterations,
                "seed": seed,
                "rules": asdict(rules),
                "images": len(features),
                "image_size": list(features.image_size),
                "activity": _mean_activity(features),
            }
            graph = cls({}, features.scale, settings, net) if folder is None else _resumed(folder, features, settings, net)
            _learn(graph, features, folder, progress, watch)
        except KeyboardInterrupt:
            raise FitInterrupted(folder) from None
        finally:
            if room is not None:
                shutil.rmtree(room, ignore_errors=True)
        return graph

    # --- inference -----------------------------------------------------------------------------------------------------

    def infer(
        self,
        images: Tensor | ImageDataset | Features,
        *,
        net: Network | None = None,
        layers: Sequence[str] | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> dict[str, Placement]:
        """Find every node in images, fitted on or not, from the top layer down: {layer: Placement}, bottom first, on the CPU.

        Args:
            images: [N, C, H, W] or a data set in the network's space, or Features extracted with ``scale=graph.scale``.
            net: the network, for a graph that was loaded without it.
            layers: those wanted; the layers above them are inferred all the same, but not kept.
            batch_size, progress: as for :meth:`fit`.

        Raises:
            ArgumentError: wrong arguments, Features of another size or scale. DataError: no image could be read, or NaN.
        """
        wanted = list(self.layers) if layers is None else [self[name].name for name in layers]
        if not isinstance(images, Features):
            net = net or self.net
            if net is None:
                raise ArgumentError(
                    "net: this graph was loaded without its network; give infer(images, net=conelens.trace(...))"
                )
            images = Features.extract(
                net, images, list(self.layers), scale=self.scale, batch_size=batch_size, progress=of_stage(progress, "features")
            )
        if not wanted or not len(images):
            raise ArgumentError(f"layers and images: got {len(wanted)} and {len(images)}, wanted at least one of each")
        order = list(self.layers)[::-1]
        order = order[: 1 + max(map(order.index, wanted))]
        for name in order:
            _check_fits(images, self.layers[name], self.scale[name])
        kept = {name: _room_for(self.layers[name], len(images)) for name in wanted}
        for start, stop in self._blocks(len(images)):
            above: tuple[GraphLayer, Tensor] | None = None
            for layer in map(self.layers.__getitem__, order):
                parents = None if above is None or layer.edges is None else _parents(layer, *above)
                features = images[layer.name][start:stop].to(layer.mean.device)
                placement, centres = layer.place(features, parents, self.rules)
                if not bool(torch.isfinite(placement.scores).all()):
                    raise DataError(f"layer {layer.name}: its features hold NaN or infinity, in images {start} to {stop - 1}")
                above = (layer, centres)
                if layer.name in kept:
                    for room, found in zip(kept[layer.name], placement, strict=True):
                        room[start:stop] = found
            if progress is not None:
                progress("infer", stop, len(images))
        return kept

    def _blocks(self, images: int) -> list[tuple[int, int]]:
        largest = max(self.layers.values(), key=lambda layer: layer.sigma.numel())
        channels, nodes = largest.shape
        return list(blocks(images, channels, nodes, largest.grid.size[0] * largest.grid.size[1]))

    # --- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``graph.safetensors`` (all of it) and ``graph.json`` (to read) into ``folder``. OSError says why not."""
        storage.write(folder, self.layers, self.scale, self.settings)

    @classmethod
    def load(cls, folder: str | Path, net: Network | None = None) -> ExplanatoryGraph:
        """Read what :meth:`save` wrote; CheckpointError when it is no graph, or one that was not learned to its end.

        ``net``: the network it was learned from, for :meth:`infer` on images; the graph comes to its device.
        """
        layers, scale, settings = storage.read(folder)
        if net is not None:
            layers = {name: layer.to(net.device) for name, layer in layers.items()}
        graph = cls(_ordered(layers, settings), scale, settings, net)
        if not graph.complete:
            raise CheckpointError(
                f"{folder}: this fit was not finished; go on with ExplanatoryGraph.fit(..., checkpoint={str(folder)!r})"
            )
        return graph

    def to_networkx(self) -> Any:
        """The graph as a ``networkx.DiGraph``: :func:`conelens.explanatory.export.to_networkx`."""
        return export.to_networkx(self)

    def write_graphml(self, path: str | Path) -> Path:
        """The graph as GraphML: :func:`conelens.explanatory.export.write_graphml`."""
        return export.write_graphml(self, path)

    @property
    def complete(self) -> bool:
        """Have all layers had all their iterations, and been finished?"""
        iterations = self.settings["iterations"]
        return list(self.layers) == self.settings["layers"] and all(
            len(layer.history) == iterations and layer.mean_score > 0 for layer in self.layers.values()
        )


def _room_for(layer: GraphLayer, images: int) -> Placement:
    """A placement to be filled, on the CPU."""
    scores = torch.empty(images, *layer.shape)
    return Placement(torch.empty(*scores.shape, 2), scores, torch.empty_like(scores))


def of_stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """What a single stage of the work tells its (done, in all) to."""
    return None if progress is None else lambda done, total: progress(stage, done, total)


def _features(
    net: Network | None,
    images: Tensor | ImageDataset | Features,
    layers: Sequence[str] | None,
    scale: str,
    negatives: Tensor | ImageDataset | None,
    batch_size: int,
    memory: int,
    folder: Path | None,
    progress: Progress | None,
) -> Features:
    if isinstance(images, Features):
        if layers is not None and list(layers) != images.layers:
            raise ArgumentError(
                f"layers: got {', '.join(layers)}, but the features hold {', '.join(images.layers)}; leave layers out"
            )
        if net is not None:
            check_order(net, images.layers)
        return images
    if net is None:
        raise ArgumentError("net: got None, wanted conelens.trace(model, ...), or Features instead of images")
    names = preset_layers(net) if layers is None else list(layers)
    check_order(net, names)
    return Features.extract(
        net, images, names, scale=scale, negatives=negatives, batch_size=batch_size, memory=memory,
        folder=folder, progress=of_stage(progress, "features"),
    )  # fmt: skip


def _counts(features: Features, nodes_per_filter: Sequence[int] | int | None) -> list[int]:
    sizes = [features.grids[name].size for name in features.layers]
    if nodes_per_filter is None:
        return [nodes_for(size) for size in sizes]
    counts = [nodes_per_filter] * len(sizes) if isinstance(nodes_per_filter, int) else [int(k) for k in nodes_per_filter]
    if len(counts) != len(sizes):
        raise ArgumentError(
            f"nodes_per_filter: got {len(counts)} numbers for {len(sizes)} layers, wanted one each, or one for all"
        )
    for name, count, size in zip(features.layers, counts, sizes, strict=True):
        if not 1 <= count <= size[0] * size[1]:
            raise ArgumentError(
                f"nodes_per_filter: got {count} for {name}, wanted 1 to {size[0] * size[1]}, as many as its map has cells"
            )
    return counts


def _mean_activity(features: Features) -> list[float]:
    """Of each layer, what also tells other images apart. DataError where there is none, or NaN."""
    found = []
    for name in features.layers:
        maps = features[name]
        rows = max(1, _BLOCK_CELLS // maps[0].numel())
        sums = (part.flatten(1).sum(1, dtype=torch.float32) for part in maps.split(rows))
        total = sum(float(each.sum(dtype=torch.float64)) for each in sums)
        if total == 0:
            raise DataError(f"layer {name}: no unit fires in any of the {len(features)} images; there is nothing to explain")
        if not math.isfinite(total):
            raise DataError(f"layer {name}: its features hold NaN or infinity, from which nothing can be learned")
        found.append(total / maps.numel())
    return found


def _check_fits(features: Features, layer: GraphLayer, scale: Tensor) -> None:
    wanted, theirs = (layer.shape[0], *layer.grid.size), features.scale[layer.name]
    if tuple(features[layer.name].shape[1:]) != wanted or features.grids[layer.name] != layer.grid:
        raise ArgumentError(
            f"features: {layer.name} is {tuple(features[layer.name].shape[1:])}, but the graph was learned on maps {wanted}; "
            "trace the network at the size it was learned at"
        )
    if theirs.shape != scale.shape or not torch.allclose(theirs, scale, rtol=1e-3):
        raise ArgumentError(
            f"features: {layer.name} is measured by other deviations than those of the graph; give Features.extract(..., "
            "scale=graph.scale)"
        )


def _parents(layer: GraphLayer, above: GraphLayer, positions: Tensor) -> Parents:
    assert layer.edges is not None
    nodes = layer.edges.unique()
    return Parents.of(above, nodes, positions.flatten(1, 2)[:, nodes])


def _ordered(layers: dict[str, GraphLayer], settings: dict[str, Any]) -> dict[str, GraphLayer]:
    return {name: layers[name] for name in settings["layers"] if name in layers}


def _resumed(folder: Path, features: Features, settings: dict[str, Any], net: Network | None) -> ExplanatoryGraph:
    """The graph as far as it was learned in ``folder``, or an empty one where nothing was begun."""
    if not (folder / storage.FILE).exists():
        return ExplanatoryGraph({}, features.scale, settings, net)
    layers, scale, theirs = storage.read(folder)
    for key, value in settings.items():
        if key != "activity" and theirs.get(key) != value:
            raise CheckpointError(
                f"{folder}: was begun with {key} {theirs.get(key)}, now {value}; use the same, or another folder"
            )
    for name, sigma, now, then in zip(features.layers, features.scale.values(), settings["activity"], theirs["activity"]):
        same = scale[name].shape == sigma.shape and torch.allclose(scale[name], sigma, rtol=1e-3)
        if not (same and math.isclose(now, then, rel_tol=1e-4)):
            raise CheckpointError(
                f"{folder}: was begun on other images or another network ({name} has other activity); use the same"
            )
    device = torch.device("cpu") if net is None else net.device
    held = {name: layer.to(device) for name, layer in _ordered(layers, settings).items()}
    return ExplanatoryGraph(held, features.scale, settings, net)


def _learn(
    graph: ExplanatoryGraph, features: Features, folder: Path | None, progress: Progress | None, watch: Watch | None
) -> None:
    """Learn what is missing of the graph, from the top layer down."""
    settings, rules = graph.settings, graph.rules
    device = torch.device("cpu") if graph.net is None else graph.net.device
    parents: Parents | None = None
    names = settings["layers"][::-1]
    for number, name in enumerate(names):
        maps, grid = features[name], features.grids[name]
        count = settings["nodes_per_filter"][len(names) - 1 - number]
        if name not in graph.layers:
            begun = first_layer_state(name, grid, maps.shape[1], count, settings["seed"] + 7919 * number)
            graph.layers = {name: begun.to(device), **graph.layers}
        layer = graph.layers[name]
        fit = LayerFit(layer, maps, rules, settings["edges"], parents)
        total = settings["iterations"]
        for iteration in range(len(layer.history) + 1, total + 1):
            fit.update(fit.statistics(), iteration)
            if folder is not None:
                graph.save(folder)
            if watch is not None:
                watch(name, iteration, layer.history[-1])
            if progress is not None:
                progress(name, iteration, total)
        parents = _finish(fit, settings["edges"], last=number == len(names) - 1)
    if folder is not None:
        graph.save(folder)


def _finish(fit: LayerFit, edges: int, last: bool) -> Parents | None:
    """Where the nodes of a learned layer are in its images, and which of them may become parents of the layer below."""
    layer, summary = fit.layer, fit.summary()
    silent = int((summary.score.view(layer.shape).sum(1) == 0).sum())
    if silent:
        warnings.warn(
            f"{layer.name}: {silent} of {layer.shape[0]} filters never fire in these images; their nodes stay where they began",
            DeadUnitWarning,
            stacklevel=4,  # whoever called fit
        )
    fit.finish(summary)
    return None if last else fit.as_parents(choose_candidates(layer, summary, fit.rules, edges))
