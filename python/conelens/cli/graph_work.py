"""What `conelens graph fit | infer` do: a fit that survives Ctrl-C, the note that later commands read, positions in files."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conelens.cli import console
from conelens.cli.fingerprint import differing, graph_fingerprint, model_fingerprint
from conelens.data import ImageDataset, ImageFolder, Preprocess, iter_batches
from conelens.errors import ArgumentError, CheckpointError, DataError
from conelens.explanatory import ExplanatoryGraph, Features, Placement, grid_of, storage
from conelens.explanatory.rules import check_order, nodes_for, preset_layers, rules_of
from conelens.files import write_tensors
from conelens.models import LoadedModel, load_model
from conelens.network import Network
from conelens.report import Workbench, open_workbench

NOTE, FORMAT = "fit.json", "conelens graph fit 1"
PLACEMENTS, PLACEMENTS_FORMAT = "placements.safetensors", "conelens.Placements 1"


def readable(dataset: ImageDataset) -> list[int]:
    """Numbers of the items that can be read; the others are named in warnings. DataError where none can."""
    broken: set[int] = set()

    def skip(number: int, error: DataError) -> None:
        broken.add(number)
        warnings.warn(f"skipped: {error}", stacklevel=2)

    with console.progress("images") as report:
        for batch in iter_batches(dataset, on_problem=skip):
            report(batch.indices[-1] + 1, len(dataset))
    if len(broken) == len(dataset):
        raise DataError(f"none of the {len(dataset)} images can be read")
    return [number for number in range(len(dataset)) if number not in broken]


def photographs(source: Path, recipe: Preprocess) -> ImageFolder:
    """The images below a folder (or one file) that can be read; the others are named in warnings."""
    found = ImageFolder(source, recipe)
    return ImageFolder([found.paths[number] for number in readable(found)], recipe)


# ------------------------------------------------------------------------------------------------------- fit
@dataclass(frozen=True)
class FitSettings:
    """The options of the command that decide what is learned."""

    layers: list[str] | None
    nodes: list[int] | None
    edges: int
    iterations: int
    seed: int
    form: str
    noise: float | None


@dataclass(frozen=True)
class FitJob:
    """A fit that is checked before the long part begins; ``source``: fingerprint of all that its result depends on."""

    bench: Workbench
    images: Path
    negatives: Path | None
    settings: FitSettings
    layers: list[str]
    nodes: list[int]
    source: str

    @classmethod
    def prepare(cls, bench: Workbench, images: Path, settings: FitSettings, negatives: Path | None) -> FitJob:
        """Check the options against the network.

        Raises:
            ArgumentError, LayerError: an option that does not fit. DataError: no images there.
        """
        net = bench.net
        for option, value in (("--edges", settings.edges), ("--iterations", settings.iterations)):
            if value < 1:
                raise ArgumentError(f"{option} is {value}, wanted at least 1")
        rules_of(settings.form, settings.noise)
        with console.of_option("--layers"):
            layers = settings.layers or preset_layers(net)
            check_order(net, layers)
        nodes = _nodes(net, layers, settings.nodes)
        lasting = asdict(settings) | {"layers": layers, "nodes": nodes}
        source = graph_fingerprint(bench.model, images, negatives, lasting)
        return cls(bench, images, negatives, settings, layers, nodes, source)

    def run(self, out: Path, weights: Path | None, policy: str | None, batch_size: int, memory: int) -> ExplanatoryGraph:
        """Learn the graph in ``out``, from where a fit with the same settings stopped there.

        Raises:
            ArgumentError: ``out`` holds another fit.
        """
        kept = self._kept(out)
        if kept is not None and kept.complete:
            console.say(f"{out} holds this graph already, learned to its end; --anew learns it again")
            return kept
        reached = None if kept is None else _reached(kept)
        if reached is not None:
            console.say(f"goes on after iteration {reached[1]} of {reached[0]}")
        watch = _Watch(reached)
        try:
            recipe = self.bench.model.preprocess
            images = photographs(self.images, recipe)
            negatives = None if self.negatives is None else ImageFolder(self.negatives, recipe)
            self._write_note(out, weights, policy)
            with console.writing(out), console.stages() as watch.report:
                return ExplanatoryGraph.fit(
                    self.bench.net, images, self.layers, self.nodes, edges=self.settings.edges,
                    iterations=self.settings.iterations, seed=self.settings.seed, form=self.settings.form,
                    noise=self.settings.noise, negatives=negatives, batch_size=batch_size, memory=memory, checkpoint=out,
                    progress=watch.progress, watch=watch.iteration,
                )  # fmt: skip
        except KeyboardInterrupt:
            where = "begins again" if watch.reached is None else "goes on after iteration {1} of {0}".format(*watch.reached)
            raise KeyboardInterrupt(f"the same command {where}") from None

    def _kept(self, out: Path) -> ExplanatoryGraph | None:
        """What was learned in ``out``, whole or in part. ArgumentError where that is of another fit."""
        if not (out / storage.FILE).exists():
            return None
        elsewhere = "choose another --out, or replace it with --anew"
        try:
            note, (layers, scale, settings) = read_note(out), storage.read(out)
        except CheckpointError as error:
            raise ArgumentError(f"{error}; {elsewhere}") from error
        if names := differing(str(note["source"]), self.source):
            raise ArgumentError(f"the graph in {out} was begun with other {', '.join(names)}; {elsewhere}")
        held = {name: layers[name] for name in settings["layers"] if name in layers}
        return ExplanatoryGraph(held, scale, settings, self.bench.net)

    def _write_note(self, out: Path, weights: Path | None, policy: str | None) -> None:
        model = self.bench.model
        about = {
            "format": FORMAT,
            "model": model.name,
            "weights": None if weights is None else str(weights.resolve()),
            "input": asdict(model.preprocess),
            "policy": policy,
            "images": str(self.images.resolve()),
            "source": self.source,
        }
        console.write_whole(out / NOTE, json.dumps(about, indent=1).encode())


def _reached(graph: ExplanatoryGraph) -> tuple[str, int] | None:
    """The layer at which a fit stopped and its iterations; None where there were none yet."""
    done = ((name, len(layer.history)) for name, layer in graph.layers.items())
    return next(((name, iterations) for name, iterations in done if iterations), None)


class _Watch:
    """Bars with log-likelihoods, a line per finished layer, and how far the fit is."""

    report: console.Report

    def __init__(self, reached: tuple[str, int] | None) -> None:
        self.reached = reached
        self.told = ""

    def iteration(self, layer: str, iteration: int, likelihood: float) -> None:
        self.reached, self.told = (layer, iteration), f"log-likelihood {likelihood:.4f}"

    def progress(self, stage: str, done: int, total: int) -> None:
        learning = self.reached is not None and self.reached == (stage, done)
        self.report(stage, done, total, f": {self.told}" if learning else "")
        if learning and done == total:
            console.say(f"{stage}: {total} iterations, {self.told} per unit of activity, higher is better")


def _nodes(net: Network, layers: Sequence[str], given: Sequence[int] | None) -> list[int]:
    """Nodes per filter of each layer: those given, one number for all, or the papers'."""
    sizes = [grid_of(net, name).size for name in layers]
    if given is None:
        return [nodes_for(size) for size in sizes]
    if len(given) not in (1, len(layers)):
        raise ArgumentError(f"--nodes has {len(given)} numbers, wanted one, or one for each of {', '.join(layers)}")
    counts = list(given) if len(given) == len(layers) else list(given) * len(layers)
    for name, count, size in zip(layers, counts, sizes, strict=True):
        if count > size[0] * size[1]:
            raise ArgumentError(f"--nodes has {count} for {name}, wanted 1..{size[0] * size[1]}, as many as its map has cells")
    return counts


def forget(out: Path) -> None:
    """Remove the fit that a folder holds, for --anew."""
    for name in (storage.FILE, "graph.json", NOTE):
        with console.writing(out / name):
            (out / name).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------- a graph that was fitted
def read_note(folder: Path) -> dict[str, Any]:
    """What `conelens graph fit` noted of itself. CheckpointError where it noted nothing, or something unknown."""
    if folder.is_file():
        raise CheckpointError(f"{folder}: it is a file, not a folder of `conelens graph fit`")
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if note["format"] != FORMAT or not {"model", "weights", "input", "policy", "source"} <= set(note):
            raise KeyError(FORMAT)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no graph of `conelens graph fit` (it has no {NOTE})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / NOTE}: not a note of `conelens graph fit` that this version can read") from error
    return dict(note)


@dataclass(frozen=True)
class Fitted:
    """A graph with the network that it was learned from."""

    bench: Workbench
    graph: ExplanatoryGraph

    @classmethod
    def open(cls, folder: Path, weights: Path | None, device: str) -> Fitted:
        """Read a finished graph and load its model as noted; ``weights``: where they are now.

        Raises:
            CheckpointError: no graph, or one that is not finished. ArgumentError: the weights are gone, or are others.
        """
        note = read_note(folder)
        if not (folder / storage.FILE).exists():
            raise CheckpointError(
                f"{folder}: this fit has not finished its first step; run the same `conelens graph fit` again"
            )
        graph = ExplanatoryGraph.load(folder)
        if weights is None and note["weights"] is not None:
            weights = Path(note["weights"])
            if not weights.exists():
                raise ArgumentError(f"the weights of {folder} are no longer at {weights}; say with --weights where they are")
        model = load_model(note["model"], weights, _recipe(folder, note["input"]))
        _require_weights(folder, str(note["source"]), model)
        bench = open_workbench(model, device, console.policy(note["policy"]))
        graph.net = bench.net
        return cls(bench, graph)

    def place(
        self, images: ImageDataset, batch_size: int, layers: Sequence[str] | None = None
    ) -> tuple[Features, dict[str, Placement]]:
        """Features of images and where the nodes (of ``layers``) are in them, on the CPU."""
        net, graph = self.bench.net, self.graph
        there = {name: layer.to(net.device) for name, layer in graph.layers.items()}
        with console.stages() as report:
            features = Features.extract(
                net, images, list(graph.layers), scale=graph.scale, batch_size=batch_size,
                progress=lambda done, total: report("features", done, total),
            )  # fmt: skip
            placements = ExplanatoryGraph(there, graph.scale, graph.settings).infer(features, layers=layers, progress=report)
        return features, {name: Placement(*(part.cpu() for part in found)) for name, found in placements.items()}


def _recipe(folder: Path, held: Mapping[str, Any]) -> Preprocess:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in held.items()}
    try:
        return Preprocess(**values)
    except TypeError as error:
        raise CheckpointError(f"{folder / NOTE}: its input recipe is not one of this version ({error})") from error


def _require_weights(folder: Path, source: str, model: LoadedModel) -> None:
    if names := differing(source, model_fingerprint(model)):
        raise ArgumentError(
            f"the graph was fitted with other {', '.join(names)}: {folder} would mean nothing with those {model.name} has now; "
            "give the file it was fitted with as --weights, or fit anew"
        )


# ----------------------------------------------------------------------------------------------------- infer
def save_placements(path: Path, placements: Mapping[str, Placement], images: Sequence[Path], size: tuple[int, int]) -> None:
    """Write ``<layer>.positions`` [N,D,K,2] (y, x in pixels of the network's input), ``.scores`` and ``.activations`` [N,D,K],
    float32, as safetensors; what images these are stands in its metadata, as JSON under "conelens".
    """
    tensors = {f"{name}.{key}": value for name, found in placements.items() for key, value in found._asdict().items()}
    about = {"format": PLACEMENTS_FORMAT, "images": [str(path) for path in images], "input_size": size}
    with console.writing(path):
        write_tensors(path, tensors, {"conelens": about})


def strongest_nodes(
    graph: ExplanatoryGraph, placements: Mapping[str, Placement], images: Sequence[Path], count: int
) -> list[dict[str, Any]]:
    """The ``count`` nodes of each image with the highest scores, over all layers; a layer's scores count by its mean score.

    Of the nodes of a filter at one place only the strongest is listed.
    """
    rows: list[dict[str, Any]] = []
    names = list(placements)
    starts = torch.tensor([0, *(placements[name].scores[0].numel() for name in names)]).cumsum(0).tolist()
    for number, path in enumerate(images):
        scores = torch.cat([placements[name].scores[number].flatten() / graph.layers[name].mean_score for name in names])
        seen: set[tuple[int, int, float, float]] = set()
        for flat in scores.sort(descending=True, stable=True).indices.tolist():
            if len(seen) == count or not scores[flat] > 0:
                break
            layer = max(i for i, start in enumerate(starts[:-1]) if start <= flat)
            found = placements[names[layer]]
            filter_, node = divmod(flat - starts[layer], found.scores.shape[2])
            y, x = found.positions[number, filter_, node].tolist()
            if (layer, filter_, y, x) in seen:
                continue
            seen.add((layer, filter_, y, x))
            rows.append({
                "image": str(path), "rank": len(seen), "layer": names[layer], "filter": filter_, "node": node, "y": y, "x": x,
                "score": float(found.scores[number, filter_, node]), "relative_score": float(scores[flat]),
                "activation": float(found.activations[number, filter_, node]),
            })  # fmt: skip
    return rows


def save_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV or JSON, by the suffix."""
    if path.suffix.lower() == ".json":
        text = json.dumps(list(rows), indent=1)
    else:
        file = io.StringIO()
        table = csv.DictWriter(file, list(rows[0]) if rows else ["image"], lineterminator="\n")
        table.writeheader()
        table.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
        text = file.getvalue()
    console.write_whole(path, text.encode(), "--table")
