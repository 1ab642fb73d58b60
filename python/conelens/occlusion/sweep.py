"""The result of an occlusion sweep, and everything read off it: probabilities, labels, drops, maps, activities."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conelens import files
from conelens.errors import ArgumentError, LayerError
from conelens.occlusion.windows import Windows

FORMAT = "conelens.Sweep 1"
FILE = "sweep.safetensors"


@dataclass(eq=False)
class Activity:
    """Activity max(0, x) of some channels of one layer, at every position of the sweep and on the clean image.

    ``channels`` [N, K] (they may differ by image); ``sums`` and ``maxima`` [N, rows, cols, K] over the map's cells, NaN where
    the sweep has not been; ``clean_sums`` and ``clean_maxima`` [N, K].
    """

    channels: Tensor
    sums: Tensor
    maxima: Tensor
    clean_sums: Tensor
    clean_maxima: Tensor


@dataclass(eq=False)
class Sweep:
    """What a network returned for every image under every window.

    ``outputs`` [N, rows, cols, ...]: the network's output per position; NaN where ``done`` [N, rows, cols] is False.
    ``clean`` [N, ...]: for the images as they are. ``classifier`` "logits", "probabilities", or None for a network whose output
    is no vector of classes. ``activity`` {layer: Activity} of the recorded layers. ``about``: the settings of the sweep.
    """

    outputs: Tensor
    clean: Tensor
    windows: Windows
    classifier: str | None
    done: Tensor
    activity: dict[str, Activity]
    about: dict[str, Any]

    def __repr__(self) -> str:
        places = "x".join(map(str, self.windows.shape))
        recorded = f", recorded {', '.join(self.activity)}" if self.activity else ""
        return (
            f"Sweep({len(self.clean)} images, {places} windows, {int(self.done.sum())} of {self.done.numel()} positions done, "
            f"{self.classifier or 'outputs'} {list(self.clean.shape[1:])}{recorded})"
        )

    @property
    def tops(self) -> np.ndarray:
        """First pixel row of each row of windows, [rows]."""
        return self.windows.tops

    @property
    def lefts(self) -> np.ndarray:
        """First pixel column of each column of windows, [cols]."""
        return self.windows.lefts

    @property
    def complete(self) -> bool:
        """Has every position been visited?"""
        return bool(self.done.all())

    # --- classes -------------------------------------------------------------------------------------------------------

    @property
    def logits(self) -> Tensor:
        """Class scores before the softmax, [N, rows, cols, classes]."""
        if self.classifier == "probabilities":
            raise ArgumentError("logits: this network returns probabilities; use outputs or probabilities")
        return self._classes(self.outputs)

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities [N, rows, cols, classes]."""
        return self._probabilities(self._classes(self.outputs))

    def probability(self, k: Any = None) -> Tensor:
        """Probability [N, rows, cols] of class ``k``: a number, one per image [N], or None for each image's own top class."""
        return self._of_class(self.probabilities, k)

    @property
    def label(self) -> Tensor:
        """Most probable class [N, rows, cols], int64; -1 where the sweep has not been."""
        return self._classes(self.outputs).argmax(-1).masked_fill(~self.done, -1)

    @property
    def clean_label(self) -> Tensor:
        """Most probable class of each image as it is, [N] int64."""
        return self._classes(self.clean).argmax(-1)

    def drop(self, k: Any = None, of: str = "probability") -> Tensor:
        """How much class ``k`` loses, [N, rows, cols]: clean minus occluded, ``of`` "probability" or "output" (the score)."""
        outputs, clean = self._classes(self.outputs), self._classes(self.clean)
        if of == "probability":
            outputs, clean = self._probabilities(outputs), self._probabilities(clean)
        elif of != "output":
            raise ArgumentError(f"of: got {of!r}, wanted 'probability' or 'output'")
        return self._of_class(clean[:, None, None], k) - self._of_class(outputs, k)

    def _classes(self, values: Tensor) -> Tensor:
        if self.classifier is None:
            raise ArgumentError(
                f"this network returns {tuple(self.clean.shape[1:])} per image, which is no vector of classes; "
                "read .outputs or .activity, or trace a classifier"
            )
        return values

    def _probabilities(self, values: Tensor) -> Tensor:
        return values if self.classifier == "probabilities" else values.softmax(-1)

    def _of_class(self, values: Tensor, k: Any) -> Tensor:
        """Entries [N, rows, cols] of class ``k`` out of [N, rows, cols, classes]."""
        count, classes = len(values), values.shape[-1]
        chosen = self.clean_label if k is None else torch.as_tensor(k)
        if chosen.dtype.is_floating_point or chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != count):
            raise ArgumentError(f"k: got {k!r}, wanted a class number, or one for each of the {count} images")
        if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= classes):
            raise ArgumentError(f"k: got class {k}, this network has classes 0 to {classes - 1}")
        index = chosen.to(values.device).long().expand(count).reshape(count, 1, 1, 1)
        return values.gather(-1, index.expand(*values.shape[:3], 1))[..., 0]

    # --- pictures ------------------------------------------------------------------------------------------------------

    def pixel_map(self, values: Tensor) -> Tensor:
        """Position values [N, rows, cols] as pixels [N, H, W]: each pixel the mean over the windows that cover it.

        Captum's definition, when ``values`` are drops. NaN where no window covers a pixel. Of an interrupted sweep only the
        positions that are done count.
        """
        done = torch.ones_like(values[:1], dtype=torch.bool)
        if not self.complete:
            done = self.done.to(values.device)
            if values.shape != done.shape:
                raise ArgumentError(
                    f"values: got {tuple(values.shape)}, wanted {tuple(done.shape)}: which positions are done differs by image"
                )
            values = values.masked_fill(~done, 0)
        return self._spread(values) / self._spread(done.float()).to(values.dtype)

    def _spread(self, values: Tensor) -> Tensor:
        """At each pixel [N, H, W] the sum over the windows that cover it."""
        rows, columns = (torch.from_numpy(c).to(values) for c in self.windows.covers())
        return torch.einsum("rh,nrc,cw->nhw", rows, values, columns)

    def upsample(self, values: Tensor) -> Tensor:
        """Position values [N, rows, cols] as a smooth picture [N, H, W]: bilinear between the windows' centres.

        ArgumentError for an interrupted sweep, where there is nothing to interpolate: go on with it, or see :meth:`pixel_map`.
        """
        if not self.complete:
            raise ArgumentError(
                f"upsample: only {int(self.done.sum())} of {self.done.numel()} positions are done; go on with "
                "occlude(..., resume=sweep), or take pixel_map, which shows what is there"
            )
        starts = (self.windows.tops, self.windows.lefts)
        ends = (self.windows.bottoms, self.windows.rights)
        weights = [
            torch.from_numpy(_interpolation((start + end - 1) / 2, cells)).to(values)
            for start, end, cells in zip(starts, ends, self.windows.image_size, strict=True)
        ]
        return torch.einsum("hr,nrc,wc->nhw", weights[0], values, weights[1])

    def heatmap(self, k: Any = None) -> Tensor:
        """The drop in probability of class ``k`` as a picture [N, H, W], up-sampled; of a complete sweep, as there."""
        return self.upsample(self.drop(k))

    def recorded(self, layer: str) -> Activity:
        """Activity of a recorded layer; LayerError names those there are."""
        if layer not in self.activity:
            there = ", ".join(self.activity) or "none; pass record=[...]"
            raise LayerError(f"layer: got {layer!r}, which was not recorded (recorded: {there})")
        return self.activity[layer]

    def to(self, device: torch.device | str) -> Sweep:
        """The same sweep on ``device``; a tensor that is there already is shared."""
        activity = {
            name: Activity(*(getattr(one, field.name).to(device) for field in fields(one)))
            for name, one in self.activity.items()
        }
        outputs, clean, done = (tensor.to(device) for tensor in (self.outputs, self.clean, self.done))
        return replace(self, outputs=outputs, clean=clean, done=done, activity=activity)

    # --- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``sweep.safetensors`` into ``folder``, and beside it ``sweep.json``, what a person may read of it.

        :meth:`load` reads the first alone, so that no interruption leaves two halves of different sweeps.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"outputs": self.outputs, "clean": self.clean, "done": self.done}
        for name, activity in self.activity.items():
            tensors |= {f"activity\n{name}\n{field.name}": getattr(activity, field.name) for field in fields(activity)}
        windows = {f.name: np.asarray(getattr(self.windows, f.name)).tolist() for f in fields(self.windows)}
        about = {"format": FORMAT, "classifier": self.classifier, "windows": windows, "about": self.about}
        files.write_tensors(folder / FILE, tensors, {"sweep": about}, readable="sweep")

    @classmethod
    def load(cls, folder: str | Path) -> Sweep:
        """Read what :meth:`save` wrote; CheckpointError when it is no sweep."""
        with files.reading(folder, "sweep"):
            tensors, (about,) = files.read_tensors(Path(folder) / FILE, FORMAT, "sweep")
            held = about["windows"]
            grid = [np.array(held[name], np.int64) for name in ("tops", "bottoms", "lefts", "rights")]
            names = {key.split("\n")[1] for key in tensors if key.startswith("activity\n")}
            activity = {
                name: Activity(*(tensors[f"activity\n{name}\n{field.name}"] for field in fields(Activity)))
                for name in sorted(names)
            }
            size = (int(held["image_size"][0]), int(held["image_size"][1]))
            windows = Windows(grid[0], grid[1], grid[2], grid[3], size)
            sweep = cls(
                tensors["outputs"], tensors["clean"], windows, about["classifier"], tensors["done"], activity, about["about"]
            )
            if sweep.done.shape != (len(sweep.clean), *windows.shape) or sweep.outputs.shape[:3] != sweep.done.shape:
                raise ValueError("its tensors do not fit its grid")
        return sweep


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep; ``sweep`` holds what is done and can be passed as ``resume``."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(f"interrupted after {int(sweep.done.sum())} of {sweep.done.numel()} positions")
        self.sweep = sweep


def _interpolation(centres: np.ndarray, cells: int) -> np.ndarray:
    """Weights [cells, len(centres)] of linear interpolation between ``centres``, in any order; constant outside them.

    Windows of one centre stand for their mean.
    """
    places, which, sharing = np.unique(centres, return_inverse=True, return_counts=True)
    weights = np.stack([np.interp(np.arange(cells), places, row) for row in np.eye(len(places))], 1)
    return weights[:, which] / sharing[which]
