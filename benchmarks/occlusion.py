"""Cases of occlusion sweeps: positions per second of `conelens.occlude` against running the network anew for every position."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import conelens
from benchmarks.cases import Case, Floor, Run, Target, compiled
from benchmarks.networks import build
from conelens.assets import photographs
from conelens.data import ImageFolder, Preprocess
from conelens.models import load_model
from conelens.models.registry import BUILT_IN, IMAGENET
from conelens.network import Network
from conelens.occlusion import Sweep, SweepPlan, Windows, make_windows, plan_occlusion
from conelens.occlusion.forms import form_for

CL = torch.channels_last
WINDOW = 16
DEFAULT = form_for("auto", "cpu", torch.float32).name
FORMS = (DEFAULT, *{"delta", "gather"} - {DEFAULT})
BATCHES = (1, 8, 32)
LEAST = 8  # positions per timed call of plain PyTorch, whatever its batch
CHECKED = 4  # positions of the gate
SAMPLED = 32  # positions of a timed sweep that are compared with running the network anew
CAPTUM_BATCH = 64
TOLERANCE = 5e-6


class Work(NamedTuple):
    """The sweep of one network: its ``stride``, what is promised, the ``batch`` that plain PyTorch runs fastest.

    The fastest others run ``again`` so often after ours.
    """

    model: Callable[[], nn.Module]
    stride: int
    promised: float
    batch: int
    preprocess: Preprocess = IMAGENET
    again: int = 3


# SqueezeNet is held against its MAC limit in the gather form.
WORK = {
    "VGG-16": Work(lambda: build("VGG-16"), 4, 8.5, 8, again=1),
    "ZFNet": Work(lambda: build("ZFNet"), 4, 5.0, 32),
    "AlexNet": Work(lambda: build("AlexNet"), 4, 3.0, 32),
    "ResNet-18": Work(lambda: build("ResNet-18"), 8, 2.4, 8),
    "SqueezeNet 1.1": Work(lambda: load_model("squeezenet1_1").module, 4, 3.4, 8, BUILT_IN["squeezenet1_1"].preprocess),
}


def photograph(preprocess: Preprocess) -> Tensor:
    return ImageFolder(photographs(), preprocess)[0][None]


@dataclass
class SweepInputs:
    """A traced network, the same module in both layouts, and ``boxes`` [P, 4], the positions that are run anew."""

    network: Network
    model: nn.Module
    model_last: nn.Module
    image: Tensor
    windows: Windows
    stride: int
    units: np.ndarray  # [P, 3] of (0, row, column)

    @property
    def boxes(self) -> np.ndarray:
        return self.windows.boxes(self.units)

    @cached_property
    def wanted(self) -> Tensor:
        """The network on every occluded copy, [P, classes]."""
        return _rerun(self, BATCHES[-1], last=False)

    @cached_property
    def plan(self) -> SweepPlan:
        return plan_occlusion(self.network, WINDOW, self.stride)


@lru_cache(1)
def _models(work: Work, shape: tuple[int, ...]) -> tuple[Network, nn.Module, nn.Module]:
    """Traced, as it is, and in channels_last; only the latest network is held in memory."""
    model = work.model().eval().requires_grad_(False)
    return conelens.trace(model, shape, policy="clamp"), model, copy.deepcopy(model).to(memory_format=CL)


def _inputs(work: Work, image: Tensor, part: bool) -> SweepInputs:
    """The whole grid and a sample of it; ``part``: its first few windows, downwards as Captum goes, and all of them."""
    windows = make_windows((image.shape[2], image.shape[3]), WINDOW, work.stride)
    if part:
        windows = Windows(
            windows.tops[:CHECKED], windows.bottoms[:CHECKED], windows.lefts[:1], windows.rights[:1], windows.image_size
        )
    chosen = torch.randperm(math.prod(windows.shape), generator=torch.Generator().manual_seed(0))[:SAMPLED].sort().values
    row, column = np.divmod(chosen.numpy(), windows.shape[1])
    units = np.stack([np.zeros_like(row), row, column], 1)
    return SweepInputs(*_models(work, tuple(image.shape[1:])), image, windows, work.stride, units)


def _copies(image: Tensor, boxes: np.ndarray, layout: torch.memory_format) -> Tensor:
    copies = image.expand(len(boxes), -1, -1, -1).clone(memory_format=layout)
    for one, (top, left, bottom, right) in zip(copies, boxes.tolist(), strict=True):
        one[:, top:bottom, left:right] = 0.0
    return copies


def _rerun(inputs: SweepInputs, batch: int, last: bool) -> Tensor:
    """Plain PyTorch in batches: what a person writes without conelens, on as many positions as the rate needs."""
    model, layout = (inputs.model_last, CL) if last else (inputs.model, torch.contiguous_format)
    boxes = inputs.boxes[: max(LEAST, batch)]
    with torch.inference_mode():
        return torch.cat([
            model(_copies(inputs.image, boxes[at : at + batch], layout)) for at in range(0, len(boxes), batch)
        ])  # fmt: skip


def _plain(batch: int, last: bool) -> Run:
    return lambda inputs: _rerun(inputs, batch, last)


def _compiled(batch: int) -> Run:
    """One batch through the compiled network, channels_last."""
    forward = compiled(lambda model, images: model(images))

    @torch.inference_mode()
    def run(inputs: SweepInputs) -> Tensor:
        boxes = inputs.boxes
        padded = boxes[np.arange(batch) % len(boxes)]  # one shape, so one compilation
        return forward(inputs.model_last, _copies(inputs.image, padded, CL))[: len(boxes)]

    return run


class _Enough(Exception):
    """Ends Captum's sweep: it has no way to run a part of one."""


def _captum(inputs: SweepInputs) -> Tensor:
    """The clean image and the first batch of positions of Captum's sweep."""
    from captum.attr import Occlusion

    batch = min(CAPTUM_BATCH, math.prod(inputs.windows.shape))
    seen: list[Tensor] = []

    def forward(images: Tensor) -> Tensor:
        seen.append(inputs.model_last(images))
        if len(seen) == 2:
            raise _Enough
        return seen[-1]

    steps = (inputs.image.shape[1], inputs.stride, inputs.stride)
    try:
        with torch.inference_mode():
            Occlusion(forward).attribute(
                inputs.image, (inputs.image.shape[1], WINDOW, WINDOW), steps, target=0, perturbations_per_eval=batch
            )
    except _Enough:
        return seen[1]
    raise RuntimeError("Captum ended before its first batch of positions")


def _ours(form: str) -> Run:
    return lambda i: conelens.occlude(i.network, i.image, i.windows, form=form)


def _read(inputs: SweepInputs, result: Sweep | Tensor) -> tuple[Tensor]:
    """Network outputs at the positions that are run anew, [P, classes]."""
    return (result if isinstance(result, Tensor) else result.outputs[tuple(torch.from_numpy(inputs.units.T))],)


def _floor(inputs: SweepInputs) -> Floor:
    """Multiply-adds that read a changed input: no exact way does with fewer. Of one position."""
    return Floor("flops", 2 * sum(layer.macs.delta for layer in inputs.plan.layers))


def _facts(inputs: SweepInputs) -> dict[str, str]:
    factors = inputs.plan.factors
    return {"MAC limits": f"gather {factors['gather']:.2f}x, delta {factors['delta']:.2f}x"}


def sweep_case(name: str, work: Work, image: Tensor | None = None) -> Case:
    """Others, ours, then the fastest others again: a machine that drifts shows on both sides of our runs."""
    height, width = work.preprocess.size if image is None else image.shape[2:]
    swept = math.prod(make_windows((height, width), WINDOW, work.stride).shape)
    plain, positions = {}, dict.fromkeys(FORMS, swept)
    for batch in BATCHES:
        for layout in ("NCHW", "channels_last"):
            title = f"plain {layout} {batch}"
            plain[title] = _plain(batch, layout == "channels_last")
            positions[title] = min(max(LEAST, batch), SAMPLED, swept)
    others = {**plain, "torch.compile": _compiled(work.batch), "Captum": _captum}
    again = tuple(title for title in others if "NCHW" not in title and title != "Captum")
    positions |= {"torch.compile": work.batch, "Captum": 1 + min(CAPTUM_BATCH, swept)}

    def inputs(part: bool) -> SweepInputs:
        return _inputs(work, photograph(work.preprocess) if image is None else image, part)

    return Case(
        section="Occlusion sweeps",
        name=f"{name}, stride {work.stride}",
        inputs=lambda: inputs(part=False),
        check_inputs=lambda: inputs(part=True),
        ours={form: _ours(form) for form in FORMS},
        others=others,
        read=_read,
        wanted=lambda i: i.wanted,
        floor=_floor,
        tolerance=TOLERANCE,
        targets=(Target(DEFAULT, work.promised, tuple(plain)),),
        positions=positions,
        schedule=(*others, *FORMS, *again * work.again),
        facts=_facts,
    )


def cases() -> list[Case]:
    return [sweep_case(*item) for item in WORK.items()]
