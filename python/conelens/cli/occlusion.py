"""What `conelens occlude` does: a sweep that survives Ctrl-C, its figure, its page."""

from __future__ import annotations

import difflib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import conelens
from conelens.cli import console
from conelens.cli.fingerprint import differing, sweep_fingerprint
from conelens.cli.work import read_frames, write_report
from conelens.data import ImageFolder, Preprocess
from conelens.errors import ArgumentError, CheckpointError, ConelensError
from conelens.network import Network
from conelens.occlusion import Sweep, SweepInterrupted, ZeilerFergus, make_windows, occlude, panels_of, record_strongest
from conelens.occlusion.run import FORMS
from conelens.occlusion.zeiler import check_figure
from conelens.report import Table, Workbench
from conelens.report.occlusion import occlusion_page, summary

SAVE_EVERY = 120.0  # seconds between saves of a sweep under way


@dataclass(frozen=True)
class Settings:
    """The options of the command; sizes in pixels, ``memory`` in bytes."""

    layer: str | None
    window: tuple[int, int]
    stride: tuple[int, int]
    fill: str
    border: str
    label: str | None
    strongest: str
    form: str
    memory: int


def plan_of(bench: Workbench, window: tuple[int, int], stride: tuple[int, int], border: str, form: str) -> str:
    """What a sweep would compute, as a table."""
    if form != "rerun":
        return str(conelens.plan_occlusion(bench.net, window, stride, border, form=form))
    plan = conelens.plan_occlusion(bench.net, window, stride, border)
    full = sum(layer.macs.full for layer in plan.layers) / 1e6
    return f"{plan.positions} positions; everything runs anew for each of them, {full:.1f} MMAC: 1.00 times the whole network"


@dataclass(frozen=True)
class OcclusionJob:
    """A sweep over some images, checked before the long part begins. ``source``: fingerprint of all it depends on."""

    bench: Workbench
    names: list[str]
    images: Tensor
    layer: str
    record: Mapping[str, str]
    fill: Any
    label: int | None
    settings: Settings
    others: ImageFolder | None
    source: str

    @classmethod
    def prepare(cls, bench: Workbench, paths: Sequence[Path], settings: Settings, others: Path | None) -> OcclusionJob:
        """Check the options and read the images; those that cannot be read are named in warnings.

        Raises:
            ArgumentError, LayerError: an option that does not fit.
            DataError: none of the images can be read.
        """
        recipe, net = bench.model.preprocess, bench.net
        if settings.form not in FORMS:
            raise ArgumentError(f"--form is {settings.form!r}, wanted one of {', '.join(FORMS)}")
        make_windows(recipe.size, settings.window, settings.stride, settings.border)
        fill = _fill(settings.fill, recipe)
        classes = _class_count(net)
        layer = settings.layer or _last_convolution(net, classes)
        record = record_strongest(layer, settings.strongest)
        label = None if settings.label is None else find_class(settings.label, bench.model.classes, classes)
        pool = None if others is None else ImageFolder(others, recipe)
        names, frames = read_frames(recipe, paths)
        images = torch.stack([recipe.tensor(frame) for frame in frames]).to(net.device)
        check_figure(net, images, layer, label, pool)
        # what is read off a finished sweep may change, and how it is computed
        lasting = {name: value for name, value in asdict(settings).items() if name not in ("label", "form", "memory")}
        source = sweep_fingerprint(bench.model, images, lasting | {"layer": layer})
        return cls(bench, names, images, layer, record, fill, label, settings, pool, source)

    def sweep(self, out: Path, resume: bool | None) -> Sweep:
        """Visit every position; what is done stays in `out`, saved every few minutes and on Ctrl-C, and is gone on from.

        ``resume``: True: there must be a sweep in `out`; None: one that is there is gone on from; False: it is made anew.

        Raises:
            ArgumentError: the sweep in `out` is another one, or cannot be read.
        """
        kept = self._kept(out, resume)
        if kept is not None:
            console.say(f"going on from {int(kept.done.sum())} of {kept.done.numel()} positions in {out}")
            if kept.complete:
                return kept
        chosen = self.settings
        grid = make_windows(self.bench.net.input_shape[1:], chosen.window, chosen.stride, chosen.border)
        with console.progress("positions") as report:
            report(0 if kept is None else int(kept.done.sum()), len(self.images) * math.prod(grid.shape))
            try:
                sweep = occlude(
                    self.bench.net, self.images, chosen.window, chosen.stride, self.fill, chosen.border, record=self.record,
                    form=chosen.form, memory=chosen.memory, progress=report, checkpoint=self._saving(out), resume=kept,
                )  # fmt: skip
            except SweepInterrupted as stop:
                self._keep(stop.sweep, out)
                done, total = int(stop.sweep.done.sum()), stop.sweep.done.numel()
                raise KeyboardInterrupt(
                    f"{done} of {total} positions are kept in {out}; the same command goes on from there"
                ) from None
            except Exception as error:
                if isinstance(partial := getattr(error, "sweep", None), Sweep):
                    self._keep(partial, out)
                    console.say(f"kept in {out}: {int(partial.done.sum())} of {partial.done.numel()} positions")
                raise
        self._keep(sweep, out)
        return sweep

    def _kept(self, out: Path, resume: bool | None) -> Sweep | None:
        if resume is False or (resume is None and not (out / "sweep.safetensors").is_file()):
            return None
        elsewhere = "choose another --out, or replace it with --no-resume"
        try:
            sweep = Sweep.load(out)
        except CheckpointError as error:
            if resume:
                raise
            raise ArgumentError(f"{error}; {elsewhere}") from error
        if names := differing(sweep.about.pop("source", ""), self.source):
            raise ArgumentError(f"the sweep in {out} was made with other {', '.join(names)}; {elsewhere}")
        return sweep

    def _keep(self, sweep: Sweep, out: Path) -> None:
        with console.writing(out):
            replace(sweep, about=sweep.about | {"source": self.source}).save(out)

    def _saving(self, out: Path) -> Callable[[Sweep], None]:
        """What saves a sweep that is under way, once the last time is long ago."""
        last = time.monotonic()

        def save(sweep: Sweep) -> None:
            nonlocal last
            if time.monotonic() - last < SAVE_EVERY:
                return
            try:
                self._keep(sweep, out)
            except ConelensError as error:  # there may be room again when it matters
                warnings.warn(f"nothing saved this time: {error}", stacklevel=2)
            last = time.monotonic()

        return save

    def figures(self, sweep: Sweep) -> list[ZeilerFergus]:
        """The panels of each image."""
        try:
            return panels_of(
                self.bench.net, self.images, sweep, self.layer, self.fill,
                label=self.label, strongest=self.settings.strongest, others=self.others,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the finished sweep is kept; the same command goes on from it") from None

    def summary(self, figures: Sequence[ZeilerFergus]) -> Table:
        """A line per image."""
        return summary(self.names, figures, self.bench.model.classes)

    def write(self, figures: Sequence[ZeilerFergus], out: Path) -> Path:
        """Write pictures and, where Jinja2 is there, the report."""
        model = self.bench.model
        title = f"conelens: what {model.name} depends on"
        names = [Path(name).stem for name in self.names]
        return write_report(occlusion_page(title, names, figures, model.preprocess, model.classes), out)


def find_class(text: str, names: Sequence[str], count: int | None) -> int:
    """A class by its number or its name; ``count`` classes, None without a classifier."""
    if count is None:
        raise ArgumentError(f"--class is {text!r}, but this network is no classifier; leave --class out")
    if text.isdecimal():
        if int(text) >= count:
            raise ArgumentError(f"--class is {text}, wanted 0..{count - 1}")
        return int(text)
    if not names:
        raise ArgumentError(f"--class is {text!r}, but this model has no class names; give a number 0..{count - 1}")
    folded = [name.casefold() for name in names]
    found = [number for number, name in enumerate(folded) if name == text.casefold()]
    if len(found) > 1:
        raise ArgumentError(f"--class {text!r} names {len(found)} classes; give a number: {' or '.join(map(str, found))}")
    if not found:
        close = difflib.get_close_matches(text.casefold(), folded, n=3)
        hint = f"; did you mean {' or '.join(names[folded.index(name)] for name in close)}?" if close else ""
        raise ArgumentError(f"--class is {text!r}, which is no class of this model{hint}")
    return found[0]


def _class_count(net: Network) -> int | None:
    output = net.graph.output_shapes[0]
    return output[0] if len(output) == 1 and output[0] > 1 else None


def _last_convolution(net: Network, classes: int | None) -> str:
    """The deepest convolution with a map of several cells that is not the map of the classes themselves."""
    maps = [layer for layer in net.layers() if layer.kind == "conv" and min(layer.shape[1:]) > 1 and layer.shape[0] != classes]
    if not maps:
        raise ArgumentError("this network has no convolution with a map of several cells; choose a layer with --layer")
    return min((maps[-1].name, *maps[-1].aliases), key=len)


def _fill(text: str, recipe: Preprocess) -> Any:
    """ "mean" and "blur" as they are; a colour in 0..255 as numbers per channel of the network's input."""
    if text in ("mean", "blur"):
        return text
    try:
        colour = console.numbers(text, "--fill")
    except ArgumentError:
        raise ArgumentError(f"--fill is {text!r}, wanted mean, blur, or a colour: one number or R,G,B in 0..255") from None
    if not all(0 <= value <= 255 for value in colour):
        raise ArgumentError(f"--fill is {text!r}, wanted a colour with values in 0..255")
    pixel = np.array([[colour]], np.float32)
    return [float(value) for value in recipe.tensor(pixel)[:, 0, 0]]
