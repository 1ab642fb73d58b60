"""The demonstration: SqueezeNet 1.1 on the shipped photographs, everything on one page."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import conelens
from conelens.assets import photographs
from conelens.data import ImageFolder, TiledFolder, iter_batches
from conelens.figures import enlarge, feature_maps, grid, unit_panel
from conelens.heatmaps import occlusion_figure
from conelens.models import load_model
from conelens.occlusion import zeiler_fergus
from conelens.peaks import PeakTable, top_peaks
from conelens.projection import project
from conelens.report import Figure, Page, Section, Table, Workbench, open_workbench, winners, write_page
from conelens.report.occlusion import GUIDE, drop_overlay, figure_row, summary

SCALES = (1.0, 0.55)
KEPT = 64  # peaks per channel, of which at most one per photograph is shown
STAGES = ("conv1", "fire3", "fire5", "fire7", "fire9")
STAGE_PHOTOGRAPHS = ("lemur.jpg", "colosseum.jpg")
OCCLUDED = ("duck.jpg", "komodo_dragon.jpg", "sheep.jpg")
WINDOW, STRIDE = 48, 12
TIMED = (("conv1", 47), ("fire3", 104), ("fire5", 217), ("fire7", 199), ("fire9", 166))

# chosen by eye from all channels of the layer, with what their nine winners share
SHOWN: dict[str, dict[int, str]] = {
    "conv1": {
        47: "saturated red",
        33: "blue to turquoise",
        55: "an upright edge, bright on the left",
        49: "a level edge, bright below",
    },
    "fire3": {
        104: "a dark hole in a ring: eyes, tubes, a socket, a window",
        27: "orange to yellow surfaces",
        108: "blue beside something else",
        59: "level stripes: roofs, ledges, twigs",
    },
    "fire5": {
        217: "an eye, or a ringed dot that passes for one",
        75: "a fine pattern that repeats: scales, spots, stitches, roof tiles",
        111: "green: grass and leaves",
        181: "the rounded edge of one thing",
    },
    "fire7": {
        199: "the head of an animal",
        367: "a face with its eye",
        266: "the body of an animal",
        274: "a rounded outline: fruit, spoon, plate, patch, roof",
    },
    "fire9": {
        166: "a four-legged animal in its surroundings",
        221: "an animal, head foremost",
        355: "rock or masonry that ends against the sky",
        132: "rows of equal parts: columns, storeys, arches, sleepers",
    },
}

Say = Callable[[str], None]


def run_demo(out: str | Path = "demo_output", say: Say = print, device: str = "cpu") -> Path:
    """Write the demonstration's report below `out` and return the path of its `report.html`.

    `say` receives a line per step.
    """
    started = time.perf_counter()
    bench = open_workbench(load_model("squeezenet1_1"), device)
    recipe = bench.model.preprocess
    photos = ImageFolder(photographs(), recipe)
    tiles = TiledFolder(photographs(), recipe, SCALES, smallest=100)
    say(f"SqueezeNet 1.1, {len(photos)} photographs, {len(tiles)} tiles at {len(SCALES)} scales")

    page = Page(
        "conelens: what SqueezeNet 1.1 looks at",
        f"{len(photos)} freely licensed photographs, cut into {len(tiles)} tiles at {len(SCALES)} scales. "
        "For each channel the strongest "
        "units were found over all tiles, and each was projected back to the pixels by the deconvnet of "
        "Zeiler & Fergus (2014), "
        "exactly and on its receptive-field cone alone. Zero is mid-grey in every projection and every map.",
    )
    page.sections.append(_predictions(bench, photos))
    say("predictions done")
    page.sections.append(_stages(bench, photos))
    say("feature maps done")
    table = top_peaks(bench.net, tiles, list(SHOWN), k=KEPT)
    say(f"strongest units of {sum(bench.net[n].shape[0] for n in SHOWN)} channels found")
    page.sections += _montages(bench, tiles, table)
    say("projections done")
    page.sections.append(_occlusion(bench, photos))
    say("occlusion done")
    page.sections.append(_timings(bench, photos))
    page.sections.append(Section("What runs here", preformatted=str(conelens.capabilities())))
    page.sections.append(_credits())
    taken = time.perf_counter() - started
    page.intro += f"\nMade in {taken:.0f} seconds on {torch.get_num_threads()} threads."
    path = write_page(page, out)
    table.save(Path(out) / "peaks.safetensors")
    say(f"{taken:.1f} s in all")
    return path.resolve()


def _predictions(bench: Workbench, photos: ImageFolder) -> Section:
    pictures: list[np.ndarray] = []
    labels: list[str] = []
    for batch in iter_batches(photos):
        share = bench.net(batch.images.to(bench.net.device)).softmax(1)
        for index, row in zip(batch.indices, share):
            value, best = row.max(0)
            pictures.append(photos.frame(index))
            labels.append(f"{bench.model.classes[int(best)]} {float(value):.0%}")
    sheet = grid(pictures, columns=11, side=112, gap=4, labels=labels)
    text = "The most probable of 1000 ImageNet classes for the centre of each photograph. What no class fits is guessed at."
    return Section("Predictions", text, [Figure("predictions", sheet)])


def _stages(bench: Workbench, photos: ImageFolder) -> Section:
    figures = []
    for name in STAGE_PHOTOGRAPHS:
        index = [photos.label(i) for i in range(len(photos))].index(name)
        maps = bench.net.forward(photos[index][None].to(bench.net.device), STAGES)
        stem = Path(name).stem
        figures.append(Figure(f"stages_{stem}", enlarge(photos.frame(index), 224), stem))
        for stage in STAGES:
            values = maps[stage][0].float().cpu().numpy()
            # the channels that this picture moves most, in their own order
            strongest = np.sort(np.argsort(-values.max((1, 2)), kind="stable")[:16])
            picture = feature_maps(values[strongest], columns=4, side=56, labels=[str(c) for c in strongest])
            caption = f"{stage}: 16 of {len(values)} maps, {values.shape[1]} x {values.shape[2]}"
            figures.append(Figure(f"stages_{stem}_{stage}", picture, caption))
    text = (
        "The 16 most active maps of each stage, with their channel numbers; each map has its own scale. "
        "Convolutions are shown before "
        "their ReLU, so that a darker place is inhibited."
    )
    return Section("Feature maps per stage", text, figures)


def _montages(bench: Workbench, tiles: TiledFolder, table: PeakTable) -> list[Section]:
    sections = []
    for layer, chosen in SHOWN.items():
        about = bench.net[layer]
        high, wide = about.receptive_field
        figures = [
            Figure(
                f"top_{layer}_{unit.channel}",
                unit_panel(unit.panel(chosen[unit.channel]), scale="percentile"),
            )
            for unit in winners(bench.net, tiles, table, layer, list(chosen), per_source=1)
        ]
        text = (
            f"{len(chosen)} of {about.shape[0]} channels; a unit sees {high} x {wide} pixels. Left the nine "
            "strongest image patches, at most one per photograph; right the projections of exactly those "
            "units, each scaled to the 99.3rd percentile of its magnitudes."
        )
        sections.append(Section(f"Strongest units of {layer}", text, figures))
    return sections


def _occlusion(bench: Workbench, photos: ImageFolder) -> Section:
    recipe, classes = bench.model.preprocess, bench.model.classes
    index = {photos.label(i): i for i in range(len(photos))}
    images = torch.stack([photos[index[name]] for name in OCCLUDED]).to(bench.net.device)
    rows = zeiler_fergus(bench.net, images, "fire9", WINDOW, STRIDE, "mean", others=photos)
    stems = [Path(name).stem for name in OCCLUDED]
    drawn = occlusion_figure([figure_row(stem, row, recipe, classes) for stem, row in zip(stems, rows)])
    figures = [Figure("occlusion", drawn)]
    figures += [Figure(f"overlay_{stem}", drop_overlay(stem, row, recipe, classes)) for stem, row in zip(stems, rows)]
    text = (
        f"{GUIDE} The window is {WINDOW} x {WINDOW} pixels, every {STRIDE} pixels, filled with the image's mean colour. Of the "
        "duck the head alone matters; of the Komodo dragon head and neck; of the ram its face and its fleece."
    )
    return Section("Occlusion", text, figures, [summary(OCCLUDED, rows, classes)])


def _timings(bench: Workbench, photos: ImageFolder) -> Section:
    image = photos[[photos.label(i) for i in range(len(photos))].index(STAGE_PHOTOGRAPHS[0])][None].to(bench.net.device)
    rows = []
    for layer, channel in TIMED:
        about = bench.net[layer]
        place = (about.shape[1] // 2, about.shape[2] // 2)
        cone, full = (_fastest(bench, image, layer, channel, place, route) for route in ("cone", "full"))
        high, wide = about.receptive_field
        rows.append((layer, f"{high} x {wide}", f"{cone * 1e3:.2f}", f"{full * 1e3:.2f}", f"{full / cone:.1f}"))
    text = (
        "One unit in the middle of the map, position known, from pixels to projection: on its cone, and "
        "with the whole image's forward "
        "pass. Fastest of three."
    )
    header = ("layer", "a unit sees", "cone, ms", "whole image, ms", "times faster")
    return Section("Cone against whole image", text, tables=[Table(header, rows)])


def _fastest(bench: Workbench, image: torch.Tensor, layer: str, channel: int, place: tuple[int, int], route: str) -> float:
    taken = []
    for _ in range(4):  # the first one plans and warms up
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", conelens.DeadUnitWarning)
            start = time.perf_counter()
            project(bench.net, image, layer, channel, place, route=route).crops.sum().item()
            taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _credits() -> Section:
    lines = (photographs() / "NOTICE.md").read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        if line.startswith("| `"):
            file, shows, author, licence, source, _ = (cell.strip() for cell in line.strip("|").split("|"))
            name, _, address = licence.strip("[)").partition("](")
            rows.append((file.strip("`"), shows, author, f"{name} ({address})", source))
    text = "The photographs were scaled to at most 640 pixels. Those under a ShareAlike licence stay under it, here too."
    return Section("Photographs", text, tables=[Table(("file", "shows", "author", "licence", "source"), rows)])
