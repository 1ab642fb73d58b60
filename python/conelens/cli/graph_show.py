"""What `conelens graph draw` does: the page of a graph on photographs, its GraphML, a decoder and what it paints."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conelens.cli import console
from conelens.cli.graph_work import Fitted, photographs
from conelens.cli.options import DECODER_STEPS
from conelens.cli.work import write_report
from conelens.data import ImageFolder
from conelens.errors import ArgumentError
from conelens.explanatory import Features, Placement
from conelens.explanatory.decoder import Decoder, Recipe, TrainingInterrupted
from conelens.explanatory.export import write_graphml
from conelens.explanatory.pictures import Node, check_node
from conelens.explanatory.synthesis import synthesis_sheet, synthesise
from conelens.report import Figure, Section, safe_name
from conelens.report.graph import graph_page

SHOWN = 6  # photographs painted, at most; the decoder learns from the others
_SYNTHESIS = (
    "A small network learned to paint photographs from the activity of {layer}; these ones it has not seen. It paints them "
    "from all units, from those alone where the best tenth of the nodes was found, and, to compare, from as many active units "
    "drawn at random and from as many of the strongest. {decoder}."
)


@dataclass(frozen=True)
class DrawJob:
    """What is to be shown, checked before the long part begins. ``steps``: of the decoder; None: no synthesis."""

    fitted: Fitted
    images: Path
    layer: str | None
    nodes: int
    patches: int
    side: int
    root: Node | None
    steps: int | None

    @classmethod
    def prepare(
        cls, fitted: Fitted, images: Path, layer: str | None, nodes: int, patches: int, side: int | None, root: str | None,
        steps: int | None,
    ) -> DrawJob:  # fmt: skip
        """Check the options against the graph. ArgumentError says what does not fit."""
        for option, value in (("--nodes", nodes), ("--patches", patches), ("--side", side), ("--steps", steps)):
            if value is not None and value < 1:
                raise ArgumentError(f"{option} is {value}, wanted at least 1")
        if layer is not None:
            with console.of_option("--layer"):
                fitted.graph[layer]
        chosen = None if root is None else find_node(fitted, root)
        return cls(fitted, images, layer, nodes, patches, side or fitted.graph.rules.patch, chosen, steps)

    def write(self, out: Path, batch_size: int) -> Path:
        """Place the graph on the photographs and write pictures and, where Jinja2 is there, the report."""
        graph, model = self.fitted.graph, self.fitted.bench.model
        dataset = photographs(self.images, model.preprocess)
        features, placements = self.fitted.place(dataset, batch_size)
        page = graph_page(
            f"conelens: explanatory graph of {model.name}", graph, placements, dataset,
            layers=None if self.layer is None else [self.layer], nodes=self.nodes, patches=self.patches, side=self.side,
            root=self.root,
        )  # fmt: skip
        if self.steps is not None:
            page.sections.insert(-1, self._synthesis(features, placements, dataset, self.steps, out))
        names = "\n".join(f"{number:5d}  {dataset.label(number)}" for number in range(len(dataset)))
        page.sections.append(Section("Images", "The numbers below the patches.", preformatted=names))
        return write_report(page, out)

    def _synthesis(
        self, features: Features, placements: dict[str, Placement], dataset: ImageFolder, steps: int, out: Path
    ) -> Section:
        layer = self.layer or list(self.fitted.graph.layers)[-1]
        if len(dataset) < 3:
            raise ArgumentError(f"--synthesis: got {len(dataset)} images, wanted at least 3, better hundreds")
        count = min(SHOWN, max(1, len(dataset) // 4))
        shown = [(2 * number + 1) * len(dataset) // (2 * count) for number in range(count)]
        others = [number for number in range(len(dataset)) if number not in shown]
        doubts = _doubts(len(others), count, steps)
        for doubt in doubts:
            warnings.warn(f"--synthesis: {doubt}", stacklevel=2)
        decoder = _train(layer, features[layer][others], _frames(dataset, others), steps, out / f"decoder_{safe_name(layer)}")
        sheet = synthesis_sheet(dataset, synthesise(features, placements, decoder, images=shown))
        text = _SYNTHESIS.format(layer=layer, decoder=f"{decoder}".replace("decoder", "Decoder", 1))
        text = " ".join([text, *(f"Mind that {doubt}." for doubt in doubts)])
        return Section("Synthesis", text, [Figure(f"synthesis_{safe_name(layer)}", sheet)])


def _doubts(images: int, held_out: int, steps: int) -> list[str]:
    """Why what the decoder paints may show little."""
    doubts = []
    if images < 200:
        doubts.append(
            f"{images} images teach a decoder little ({held_out} more are held out, to be painted); hundreds show what is meant"
        )
    if steps < DECODER_STEPS // 2:
        doubts.append(f"after {steps} steps a decoder paints blurs; the default is {DECODER_STEPS}")
    return doubts


def _train(layer: str, maps: Tensor, frames: Tensor, steps: int, folder: Path) -> Decoder:
    """A decoder that is kept in a folder, finished or not, and gone on with there."""
    with console.writing(folder), console.stages() as report:
        try:
            decoder = Decoder.train(
                layer, maps, frames, Recipe(steps=steps), folder=folder,
                progress=lambda done, total, loss: report("decoder", done, total, f": loss {loss:.3f}"),
            )  # fmt: skip
        except TrainingInterrupted as stop:
            kept = f"{stop.decoder.steps} of {steps} steps of the decoder are kept in {folder}"
            raise KeyboardInterrupt(f"{kept}; the same command goes on from there") from None
        decoder.save(folder / "decoder.safetensors")
    return decoder


def _frames(dataset: ImageFolder, numbers: list[int]) -> Tensor:
    """uint8 [n, 3, H, W], as the network saw them."""
    return torch.stack([torch.from_numpy(np.array(dataset.frame(number))).permute(2, 0, 1) for number in numbers])


def find_node(fitted: Fitted, text: str) -> Node:
    """ "conv5_3/12/4": layer, filter, node, as in GraphML."""
    layer, *numbers = text.rsplit("/", 2)
    if len(numbers) != 2 or not all(part.isdecimal() for part in numbers):
        raise ArgumentError(f"--root is {text!r}, wanted LAYER/FILTER/NODE, such as {next(iter(fitted.graph.layers))}/12/4")
    node = Node(layer, int(numbers[0]), int(numbers[1]))
    with console.of_option("--root"):
        check_node(node, fitted.graph[layer].shape)
    return node


def save_graphml(fitted: Fitted, path: Path) -> Path:
    """Write the graph for other tools."""
    with console.writing(path):
        return write_graphml(fitted.graph, path)
