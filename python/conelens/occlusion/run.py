"""``conelens.occlude``: slide a window over images, run the network at every position, keep what a person wants to know."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conelens.errors import ArgumentError, ConelensError
from conelens.network import Network, trace
from conelens.occlusion.engine import Engine, Visited
from conelens.occlusion.incremental import Incremental
from conelens.occlusion.records import Record, read_records
from conelens.occlusion.rerun import Rerun
from conelens.occlusion.sweep import Activity, Sweep, SweepInterrupted
from conelens.occlusion.windows import Windows, fill_images, make_windows, pair

FORMS = ("auto", "delta", "gather", "rerun")
DEFAULT_MEMORY = 2 * 2**30


def occlude(
    net: Network | nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    window: int | Sequence[int] | Windows = 16,
    stride: int | Sequence[int] = 4,
    fill: Any = 0.0,
    border: str = "flush",
    *,
    record: str | Sequence[str] | Mapping[str, Any] | None = None,
    form: str = "auto",
    memory: int = DEFAULT_MEMORY,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Callable[[Sweep], None] | None = None,
    resume: Sweep | None = None,
) -> Sweep:
    """Occlusion sweep (Zeiler & Fergus 2014, §4.2): every window of a grid painted over every image, the network run on each.

    On a traced network only what a window can change is computed, exactly; the results are those of running the network anew.

    Args:
        net: from :func:`conelens.trace`; or a module, which is traced here; or any function of images [N, C, H, W], which is
            run anew for every position.
        images: [N, C, H, W] in the network's input space.
        window, stride: (height, width) in pixels, or one number for both. Strides need not divide. Or a grid of one's own as
            ``window``, which leaves nothing for ``stride`` and ``border`` to say.
        fill: what the window shows, in the network's input space: a number, one per channel, a tensor that broadcasts to the
            images, "mean" (of each image and channel), "blur", or a function of the images.
        border: "flush": the last window ends at the border; "clip": the last window is cut off there (Captum).
        record: layers whose activity is summed and maximised per position: a name, several, or {name: channels}, where channels
            are numbers, "all", "strongest" (per image, the channel with the largest summed activity on the clean image) or
            "strongest_max" (with the largest maximum).
        form: how: "delta" (changes travel through the network), "gather" (changed regions with their surroundings), "rerun"
            (everything, for every position), or "auto".
        memory: bound in bytes for everything besides the result itself.
        progress: called with (positions done, positions in all).
        checkpoint: called with the sweep as far as it is, again and again, so that a long one can be saved every few minutes.
        resume: a sweep with the same settings that was interrupted.

    Raises:
        SweepInterrupted: on Ctrl-C, with what is done.
        ArgumentError, LayerError.
    """
    if form not in FORMS:
        raise ArgumentError(f"form: got {form!r}, wanted one of {', '.join(FORMS)}")
    if memory < 2**24:
        raise ArgumentError(f"memory: got {memory} bytes, wanted at least {2**24} (16 MiB)")
    runs = _traced(net, images, form)
    network = runs if isinstance(runs, Network) else None
    if network is not None:
        network.check_images(images)
    elif not isinstance(images, Tensor) or images.ndim != 4:
        raise ArgumentError(f"images: got {getattr(images, 'shape', type(images).__name__)}, wanted a tensor [N, C, H, W]")
    if len(images) == 0:
        raise ArgumentError("images: got none, wanted at least one")
    if not bool(torch.isfinite(images).all()):
        raise ArgumentError("images: hold NaN or infinity; clean the data first")
    image_size = (images.shape[2], images.shape[3])
    windows = window if isinstance(window, Windows) else make_windows(image_size, window, stride, border)
    if windows.image_size != image_size:
        raise ArgumentError(f"window: got a grid for images of {windows.image_size}, wanted one for {image_size}")
    with torch.inference_mode():
        filled = fill_images(fill, images, windows.largest)
    about = {
        "window": list(windows.largest), "stride": None if windows is window else list(pair(stride, "stride")),
        "border": border, "fill": fill if isinstance(fill, int | float | str) else _fingerprint(filled),
    }  # fmt: skip
    with torch.inference_mode():
        records = read_records(network, record)
        engine: Engine
        if network is None or form == "rerun":
            engine = Rerun(runs, images, filled, windows, records, memory)
        else:
            engine = Incremental(network, images, filled, windows, records, form, memory)
        return _sweep(engine, network, images, filled, windows, about | {"form": engine.form}, progress, checkpoint, resume)


def _traced(net: Any, images: Any, form: str) -> Network | Callable[[Tensor], Tensor]:
    """The traced network, or the function itself where it cannot be traced."""
    if isinstance(net, Network):
        return net
    if isinstance(net, nn.Module) and isinstance(images, Tensor):
        try:
            return trace(net, images[:1], policy="clamp")  # any rule will do: nothing goes top-down here
        except ArgumentError:
            raise
        except ConelensError as error:
            if form in ("delta", "gather"):
                raise
            warnings.warn(f"the whole network runs anew for every position, because it cannot be traced: {error}", stacklevel=3)
            return net
    if not callable(net):
        raise ArgumentError(f"net: got {type(net).__name__}, wanted a traced network, a module or a function of images")
    if form in ("delta", "gather"):
        raise ArgumentError(f"form: {form!r} needs a traced network; a plain function can only be run anew ('rerun')")
    if form == "auto":
        warnings.warn("the whole function runs anew for every position: only a torch.nn.Module can be traced", stacklevel=3)
    return net


def _sweep(
    engine: Engine, network: Network | None, images: Tensor, filled: Tensor, windows: Windows, about: dict[str, Any],
    progress: Callable[[int, int], None] | None, checkpoint: Callable[[Sweep], None] | None, resume: Sweep | None,
) -> Sweep:  # fmt: skip
    clean, records = engine.clean()
    with torch.inference_mode(False):  # the result is made of ordinary tensors
        sweep = _empty(clean.clone(), records, windows, _kind(network, clean), about)
    if resume is not None:
        _require_same(resume, sweep)
        sweep = resume
    total = sweep.done.numel()
    todo = np.argwhere(~sweep.done.cpu().numpy())
    same = _unchanged(images, filled, windows, todo)
    _store(sweep, _as_clean(sweep, todo[same]))
    done = total - int((~same).sum())
    try:
        for visited in engine.visit(todo[~same]):
            _store(sweep, visited)
            done += len(visited.units)
            if progress is not None:
                progress(done, total)
            if checkpoint is not None:
                checkpoint(sweep)
    except KeyboardInterrupt:
        raise SweepInterrupted(sweep) from None
    return sweep


def _kind(network: Network | None, clean: Tensor) -> str | None:
    """What the outputs are: "logits", "probabilities", or None for no classifier."""
    if clean.ndim != 2 or clean.shape[1] < 2:
        return None
    if network is not None:
        op = network.graph[network.graph.outputs[0]].op
        return "probabilities" if getattr(op, "name", "") == "softmax" else "logits"
    sums_to_one = bool(((clean.sum(1) - 1).abs() < 1e-3).all() and (clean >= 0).all())
    return "probabilities" if sums_to_one else "logits"


def _fingerprint(filled: Tensor) -> str:
    """What stands for a fill that is no number or word: equal for equal fills."""
    return f"pixels {zlib.crc32(filled.double().cpu().contiguous().numpy().tobytes()):08x}"


def _empty(clean: Tensor, records: list[Record], windows: Windows, kind: str | None, about: dict[str, Any]) -> Sweep:
    grid = (len(clean), *windows.shape)
    activity = {}
    for record in records:
        assert record.channels is not None and record.sums is not None and record.maxima is not None
        room = (*grid, record.channels.shape[1])
        activity[record.name] = Activity(
            record.channels.clone(), record.sums.new_full(room, float("nan")), record.maxima.new_full(room, float("nan")),
            record.sums.clone(), record.maxima.clone(),
        )  # fmt: skip
    outputs = clean.new_full((*grid, *clean.shape[1:]), float("nan"))
    done = torch.zeros(grid, dtype=torch.bool, device=clean.device)
    return Sweep(outputs, clean, windows, kind, done, activity, about)


def _require_same(resume: Sweep, fresh: Sweep) -> None:
    """ArgumentError where the interrupted sweep is of other images, another network or other settings."""
    for name in ("outputs", "clean"):
        theirs, ours = getattr(resume, name).shape, getattr(fresh, name).shape
        if theirs != ours:
            raise ArgumentError(f"resume: that sweep has {name} {tuple(theirs)}, this one {tuple(ours)}; use the same settings")
    if resume.about | {"form": ""} != fresh.about | {"form": ""} or set(resume.activity) != set(fresh.activity):
        raise ArgumentError(f"resume: that sweep was made with {resume.about}, this one with {fresh.about}")
    grids = ([getattr(sweep.windows, axis) for axis in ("tops", "bottoms", "lefts", "rights")] for sweep in (resume, fresh))
    if not all(np.array_equal(theirs, ours) for theirs, ours in zip(*grids)):
        raise ArgumentError("resume: that sweep has another grid of windows; use the same")
    if not torch.allclose(resume.clean, fresh.clean.to(resume.clean), rtol=1e-3, atol=1e-4):
        raise ArgumentError("resume: that sweep is of other images or another network; start anew without resume")


def _unchanged(images: Tensor, filled: Tensor, windows: Windows, units: np.ndarray) -> np.ndarray:
    """Bool [U]: does the window show, bit for bit, what is there anyway? Nothing changes then."""
    if not len(units):
        return np.zeros(0, bool)
    differs = (images != filled).any(1).to(torch.float64)
    rows, columns = (torch.from_numpy(c).to(differs) for c in windows.covers())
    counts = torch.einsum("rh,nhw,cw->nrc", rows, differs, columns).cpu().numpy()
    return counts[tuple(units.T)] == 0


def _as_clean(sweep: Sweep, units: np.ndarray) -> Visited:
    image = torch.from_numpy(units[:, 0]).to(sweep.clean.device)
    activity = {name: (a.clean_sums[image], a.clean_maxima[image]) for name, a in sweep.activity.items()}
    return Visited(units, sweep.clean[image], activity)


def _store(sweep: Sweep, visited: Visited) -> None:
    index = tuple(torch.from_numpy(visited.units.T).to(sweep.done.device))
    sweep.outputs[index] = visited.outputs
    for name, (sums, maxima) in visited.activity.items():
        sweep.activity[name].sums[index] = sums
        sweep.activity[name].maxima[index] = maxima
    sweep.done[index] = True
