"""What the commands do: models from options, projections of files, winners of a folder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from conelens.cli import console
from conelens.cli.fingerprint import fingerprint, require_same
from conelens.data import ImageFolder, Preprocess, TiledFolder, load_image
from conelens.diagram import draw_image, draw_svg
from conelens.errors import ArgumentError, ConelensError, DataError
from conelens.figures import cut, enlarge, save_png, signed, unit_panel
from conelens.models import BUILT_IN, load_model
from conelens.models.registry import LoadedModel
from conelens.peaks import Interrupted, PeakTable, top_peaks
from conelens.projection import project
from conelens.report import (
    Figure,
    Page,
    Section,
    Workbench,
    diagram_nodes,
    open_workbench,
    safe_name,
    winners,
    write_figures,
    write_page,
)

TILE = 160
SPARE = 8  # peaks kept per winner shown, where tiles of one photograph compete


def open_model(
    name: str,
    weights: Path | None = None,
    input_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    scale: float | None = None,
    fit: str | None = None,
    device: str = "cpu",
    policy: str | None = None,
    without_weights: bool = False,
) -> Workbench:
    """A model by the options of the command line; `without_weights` lets a built-in keep random ones."""
    rules = console.policy(policy)
    if without_weights and weights is None and name in BUILT_IN and BUILT_IN[name].weights is None:
        entry = BUILT_IN[name]
        model = LoadedModel(name, entry.build().eval(), entry.preprocess)
    else:
        model = load_model(name, weights)
    changes: dict[str, object] = {}
    if input_size is not None:
        changes["size"] = console.size(input_size)
    if mean is not None:
        changes["mean"] = console.numbers(mean, "--mean")
    if std is not None:
        changes["std"] = console.numbers(std, "--std")
    if scale is not None:
        changes["scale"] = scale
    if fit is not None:
        changes["fit"] = fit
    if fit == "none":
        raise ArgumentError(
            "--fit none keeps each image's own size, which one network input cannot; wanted crop, letterbox, stretch"
        )
    recipe = dataclasses.replace(model.preprocess, **changes)  # type: ignore[arg-type]
    return open_workbench(dataclasses.replace(model, preprocess=recipe), device, rules)


def check_drawing(path: Path) -> None:
    """ArgumentError unless `drawing` knows the suffix."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise ArgumentError(f"--draw is {path}, wanted a name that ends in .svg or .png")


def drawing(bench: Workbench, path: Path) -> None:
    """Draw the network as SVG or PNG, by the suffix."""
    nodes = diagram_nodes(bench.net)
    with console.writing(path, "--draw"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".svg":
            path.write_text(draw_svg(nodes, bench.model.name), encoding="utf-8")
        else:
            save_png(draw_image(nodes), path)


def write_report(page: Page, out: Path) -> Path:
    """Write a page and its pictures; the pictures alone, with a word about it, where Jinja2 is missing."""
    with console.writing(out):
        try:
            return write_page(page, out)
        except ConelensError as error:
            console.say(f"[yellow]warning[/]: {error}; the pictures are written without it")
            write_figures(page, out)
            return out / "figures"


# --------------------------------------------------------------------------------------------------- project
@dataclass(frozen=True)
class ProjectedImages:
    """Rows for the terminal and one strip of pictures per image."""

    stem: str
    rows: list[tuple[str, str, str, str]]
    strips: list[tuple[str, Image.Image]]

    def save(self, folder: Path) -> Path:
        """Write the strips as PNG; returns the folder."""
        with console.writing(folder):
            for name, strip in self.strips:
                save_png(strip, folder / f"{self.stem}_{safe_name(name)}.png")
        return folder


def check_files(paths: Sequence[Path]) -> None:
    """ArgumentError where a folder was given for an image."""
    for path in paths:
        if path.is_dir():
            raise ArgumentError(f"{path} is a folder, wanted image files: give {path / '*'}")


def read_frames(recipe: Preprocess, paths: Sequence[Path]) -> tuple[list[str], list[np.ndarray]]:
    """Names and frames uint8 [H,W,3] of the images that can be read; the others are named in warnings.

    Raises:
        DataError: none of the images can be read.
    """
    names: list[str] = []
    frames: list[np.ndarray] = []
    for path in paths:
        try:
            frames.append(recipe.frame(load_image(path)))
            names.append(path.name)
        except DataError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
    if not frames:
        raise DataError(f"none of the {len(paths)} images can be read")
    return names, frames


def project_images(
    bench: Workbench, paths: Sequence[Path], layer: str, channel: int, position: tuple[int, int] | str
) -> ProjectedImages:
    """Project one unit for each image that can be read; the others are named in warnings.

    Raises:
        DataError: none of the images can be read.
    """
    recipe = bench.model.preprocess
    about = bench.net[layer]
    if not 0 <= channel < about.shape[0]:
        raise ArgumentError(f"channel {channel} of {layer} is out of range, wanted 0..{about.shape[0] - 1}")
    if not isinstance(position, str) and not (position[0] < about.shape[1] and position[1] < about.shape[2]):
        raise ArgumentError(f"position {position} is outside the {about.shape[1]} x {about.shape[2]} map of {layer}")
    names, frames = read_frames(recipe, paths)
    images = torch.stack([recipe.tensor(f) for f in frames]).to(bench.net.device)
    result = project(bench.net, images, layer, channel, position)
    rows, strips = [], []
    for i, name in enumerate(names):
        box = result.boxes[i].tolist()
        y, x = result.positions[i].tolist()
        value = float(result.values[i])
        rows.append((name, "dead" if value <= 0 else f"{value:.4g}", f"{y},{x}", ",".join(map(str, box))))
        strips.append((f"{i:03d}_{Path(name).stem}", _strip(frames[i], box, result.crops[i])))
    return ProjectedImages(f"{safe_name(layer)}_{channel}", rows, strips)


def _strip(frame: np.ndarray, box: list[int], crop: Tensor) -> Image.Image:
    """Image with the unit's box, the patch in the box, its projection."""
    marked = Image.fromarray(frame)
    top, left, bottom, right = box
    edge = (max(0, left), max(0, top), min(marked.width, right) - 1, min(marked.height, bottom) - 1)
    if edge[2] >= edge[0] and edge[3] >= edge[1]:
        ImageDraw.Draw(marked).rectangle(edge, outline=(255, 64, 32), width=2)
    shown = np.moveaxis(signed(crop.float().cpu().numpy(), "percentile"), 0, -1)
    tiles = [np.asarray(marked), cut(frame, box, (crop.shape[1], crop.shape[2])), shown]
    sheet = Image.new("RGB", (3 * TILE + 16, TILE), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(enlarge(tile, TILE), (number * (TILE + 8), 0))
    return sheet


# ------------------------------------------------------------------------------------------------------- top
@dataclass(frozen=True)
class TopJob:
    """The strongest units of some channels over a folder, checked before the long part begins."""

    bench: Workbench
    dataset: ImageFolder | TiledFolder
    channels: dict[str, list[int]]
    k: int
    distinct: str
    source: str

    @classmethod
    def prepare(
        cls,
        bench: Workbench,
        folder: Path,
        layers: list[str],
        channels: str | None,
        k: int,
        distinct: str,
        tiles: str | None,
    ) -> TopJob:
        """Check layers and channels and list the images."""
        chosen = {name: console.channels(channels, bench.net[name].shape[0], name) for name in layers}
        recipe = bench.model.preprocess
        source = fingerprint(bench.model, folder, tiles, distinct)
        if tiles is None:
            return cls(bench, ImageFolder(folder, recipe), chosen, k, distinct, source)
        try:
            scales = [float(part) for part in tiles.split(",")]
        except ValueError:
            raise ArgumentError(f"--tiles is {tiles!r}, wanted scales with commas, e.g. 1.0,0.5") from None
        cut_up = TiledFolder(folder, recipe, scales)
        for problem in cut_up.problems:
            warnings.warn(f"skipped: {problem}", stacklevel=2)
        if not len(cut_up):
            raise DataError(f"{folder}: none of its images can be read")
        return cls(bench, cut_up, chosen, k, distinct, source)

    @property
    def _per_source(self) -> int | None:
        """One winner per photograph where tiles were cut and winners are to be distinct."""
        return 1 if isinstance(self.dataset, TiledFolder) and self.distinct == "image" else None

    def search(self, out: Path, batch_size: int, resume: Path | None) -> PeakTable:
        """One pass over the folder; Ctrl-C leaves what is done in `out/peaks.safetensors`."""
        before = None if resume is None else PeakTable.load(resume)
        if before is not None:
            require_same(before.source, self.source)
        with console.progress("images") as report:
            try:
                table = top_peaks(
                    self.bench.net,
                    self.dataset,
                    list(self.channels),
                    self.k if self._per_source is None else SPARE * self.k,
                    self.distinct,
                    batch_size=batch_size,
                    progress=report,
                    resume=before,
                    source=self.source,
                )
            except Interrupted as stop:
                kept = self._keep(stop.table, out)
                raise KeyboardInterrupt(
                    f"{stop.table.seen} of {len(self.dataset)} images are kept in {kept}; go on with --resume {kept}"
                ) from None
        self._keep(table, out)
        return table

    def _keep(self, table: PeakTable, out: Path) -> Path:
        path = out / "peaks.safetensors"
        with console.writing(path):
            table.save(path)
        return path

    def write(self, table: PeakTable, out: Path) -> Path:
        """Project the winners and write pictures, `top.csv`, and the report where Jinja2 is there."""
        page = Page(
            f"conelens: strongest units of {self.bench.model.name}",
            f"{len(self.dataset)} images, the {self.k} strongest units of each channel (distinct: "
            f"{self.distinct}). "
            "Left the image patches, right their deconvnet projections; zero is mid-grey.",
        )
        lines = ["layer,channel,rank,activity,y,x,image"]
        for layer, chosen in self.channels.items():
            figures = []
            for unit in winners(self.bench.net, self.dataset, table, layer, chosen, self.k, self._per_source):
                if unit.dead:
                    warnings.warn(
                        f"channel {unit.channel} of {layer} is dead: no image gives it positive activity",
                        stacklevel=2,
                    )
                columns = min(self.k, max(3, round(self.k**0.5)))
                picture = unit_panel(unit.panel(), columns=columns, scale="percentile", cells=self.k)
                figures.append(Figure(f"top_{layer}_{unit.channel}", picture))
                for rank, (peak, label) in enumerate(zip(unit.peaks, unit.labels), 1):
                    name = label.replace('"', '""')
                    lines.append(f'{layer},{unit.channel},{rank},{peak.value:.6g},{peak.y},{peak.x},"{name}"')
            about = self.bench.net[layer]
            text = f"A unit sees {about.receptive_field[0]} x {about.receptive_field[1]} pixels."
            page.sections.append(Section(layer, text, figures))
        with console.writing(out):
            (out / "top.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
        return write_report(page, out)
