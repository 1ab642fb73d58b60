"""``conelens.occlude``: slide a window over images, run the network at every position, keep what a person wants to know."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
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
from conelens.occlusion.windows import Windows, all_finite, fill_images, make_windows, pair

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
        fill: what the window shows, in the network's input space: a number, one per channel, a tensor or array that broadcasts
            to the images, "mean" (of each image and channel), "blur", or a function of the images.
        border: "flush": the last window ends at the border; "clip": the last window is cut off there (Captum).
        record: layers whose activity is summed and maximised per position: a name, several, or {name: channels}, where channels
            are numbers, "all", "strongest" (per image, the channel with the largest summed activity on the clean image) or
            "strongest_max" (with the largest maximum).
        form: how: "delta" (changes travel through the network), "gather" (changed regions with their surroundings), "rerun"
            (everything, for every position), or "auto".
        memory: bound in bytes for all tensors besides the result; kernels that libraries compile and keep come on top.
        progress: called with (positions done, positions in all); positions whose window shows what is there anyway are done
            at once.
        checkpoint: called with the sweep as far as it is, again and again, so that a long one can be saved every few minutes.
        resume: a sweep of the same images with the same settings that was interrupted; it may be on another device, and the
            ``form`` may differ. What is done from now on is entered into it, too, where it is on the device of ``images``.

    Returns:
        The sweep. Its ``classifier`` is "probabilities" where the network ends in a softmax, or where that is what it returns
        for the images as they are: nothing negative, each row a sum of 1 (to 1e-3). Other vectors count as "logits".

    Raises:
        SweepInterrupted: on Ctrl-C, with what is done. While the images as they are run, nothing is done yet: it then holds
            ``resume``, and without that a plain KeyboardInterrupt comes through.
        ArgumentError, LayerError.
        Whatever else goes wrong at a position (no memory, an error in a function), as it is; the exception's attribute
            ``sweep`` holds what is done.
    """
    if form not in FORMS:
        raise ArgumentError(f"form: got {form!r}, wanted one of {', '.join(FORMS)}")
    if not isinstance(memory, Real) or not 2**24 <= memory < math.inf:
        raise ArgumentError(f"memory: got {memory!r}, wanted a number of bytes, at least {2**24} (16 MiB)")
    if resume is not None and not isinstance(resume, Sweep):
        raise ArgumentError(f"resume: got {type(resume).__name__}, wanted a Sweep; Sweep.load(folder) reads a saved one")
    _check_images(net, images)
    runs = _traced(net, images, form)
    network = runs if isinstance(runs, Network) else None
    if not all_finite(images):
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
        "images": _fingerprint(images),
    }  # fmt: skip
    with torch.inference_mode():
        records = read_records(network, record)
        engine: Engine
        if network is None or form == "rerun":
            engine = Rerun(runs, images, filled, windows, records, int(memory))
        else:
            engine = Incremental(network, images, filled, windows, records, form, int(memory))
        try:
            sweep = _begun(engine, network, windows, about, resume)
        except KeyboardInterrupt:
            if resume is None:
                raise
            raise SweepInterrupted(resume) from None
        try:
            _go_on(sweep, engine, images, filled, progress, checkpoint)
        except KeyboardInterrupt:
            raise SweepInterrupted(sweep) from None
        except Exception as error:
            error.sweep = sweep
            count = f"{int(sweep.done.sum())} of {sweep.done.numel()} positions are done"
            error.add_note(f"{count}; this error's attribute `sweep` holds them, occlude(..., resume=error.sweep) goes on")
            raise
    return sweep


def _check_images(net: Any, images: Any) -> None:
    if isinstance(net, Network):
        net.check_images(images)
    elif not isinstance(images, Tensor) or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(f"images: got {got}, wanted a tensor [N, C, H, W]; a single image is images[None]")
    if not images.numel():
        raise ArgumentError(f"images: got {tuple(images.shape)}, wanted at least one")


def _traced(net: Any, images: Tensor, form: str) -> Network | Callable[[Tensor], Tensor]:
    """The traced network, or the function itself where it cannot be traced."""
    if isinstance(net, Network):
        return net
    if isinstance(net, nn.Module):
        try:
            return trace(net, images[:1], policy="clamp")  # any rule will do: nothing goes top-down here
        except ArgumentError as error:  # the images are what tracing calls its example
            raise ArgumentError(str(error).replace("example:", "images:", 1)) from None
        except ConelensError as error:
            if form in ("delta", "gather"):
                raise
            warnings.warn(f"the whole network runs anew for every position, because it cannot be traced: {error}", stacklevel=3)
            return net
        except RuntimeError as error:
            raise ArgumentError(f"images: the model does not take images {list(images.shape[1:])} ({error})") from error
    if not callable(net):
        raise ArgumentError(f"net: got {type(net).__name__}, wanted a traced network, a module or a function of images")
    if form in ("delta", "gather"):
        raise ArgumentError(f"form: {form!r} needs a traced network; a plain function can only be run anew ('rerun')")
    if form == "auto":
        warnings.warn("the whole function runs anew for every position: only a torch.nn.Module can be traced", stacklevel=3)
    return net


def _begun(engine: Engine, network: Network | None, windows: Windows, about: dict[str, Any], resume: Sweep | None) -> Sweep:
    """The sweep before any position of this call: with nothing done, or ``resume``, which must be of the same kind."""
    clean, records = engine.clean()
    about = about | {"form": engine.form}  # which may depend on the maps of the images as they are
    with torch.inference_mode(False):  # the result is made of ordinary tensors
        fresh = _empty(clean.clone(), records, windows, _kind(network, clean), about)
        if resume is None:
            return fresh
        sweep = resume.to(clean.device)
    _require_same(sweep, fresh)
    sweep.about = sweep.about | about
    return sweep


def _go_on(
    sweep: Sweep, engine: Engine, images: Tensor, filled: Tensor,
    progress: Callable[[int, int], None] | None, checkpoint: Callable[[Sweep], None] | None,
) -> None:  # fmt: skip
    """Visit the positions that are not done."""
    total = sweep.done.numel()
    todo = np.argwhere(~sweep.done.cpu().numpy())
    same = _unchanged(images, filled, sweep.windows, todo)
    _store(sweep, _as_clean(sweep, todo[same]))
    done = total - int((~same).sum())
    if progress is not None and (same.any() or not len(todo)):
        progress(done, total)
    for visited in engine.visit(todo[~same]):
        _store(sweep, visited)
        done += len(visited.units)
        if progress is not None:
            progress(done, total)
        if checkpoint is not None:
            checkpoint(sweep)


def _kind(network: Network | None, clean: Tensor) -> str | None:
    """What the outputs are: "logits", "probabilities", or None for no classifier."""
    if clean.ndim != 2 or clean.shape[1] < 2:
        return None
    if network is not None and getattr(network.graph[network.graph.outputs[0]].op, "name", "") == "softmax":
        return "probabilities"
    sums = clean.float().sum(1)
    return "probabilities" if bool(((sums - 1).abs() < 1e-3).all() and (clean >= 0).all()) else "logits"


def _fingerprint(pixels: Tensor) -> str:
    """What stands for pixels [N, C, H, W] in the settings of a sweep: equal for equal ones."""
    checksum = 0
    for image in pixels.detach():
        checksum = zlib.crc32(image.cpu().contiguous().view(torch.uint8).numpy(), checksum)
    return f"pixels {checksum:08x}"


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
        theirs, ours = ((str(one.dtype), tuple(one.shape)) for one in (getattr(resume, name), getattr(fresh, name)))
        if theirs != ours:
            raise ArgumentError(f"resume: that sweep has {name} {theirs}, this one {ours}; use the same settings")
    for name, ours in fresh.about.items():
        if name != "form" and resume.about.get(name) != ours:
            raise ArgumentError(f"resume: that sweep was made with {name} {resume.about.get(name)!r}, this one with {ours!r}")
    grids = ([getattr(sweep.windows, axis) for axis in ("tops", "bottoms", "lefts", "rights")] for sweep in (resume, fresh))
    if not all(np.array_equal(theirs, ours) for theirs, ours in zip(*grids)):
        raise ArgumentError("resume: that sweep has another grid of windows; use the same")
    if set(resume.activity) != set(fresh.activity):
        there, here = (", ".join(sorted(sweep.activity)) or "nothing" for sweep in (resume, fresh))
        raise ArgumentError(f"resume: that sweep recorded {there}, this one {here}")
    for name, active in fresh.activity.items():
        if not torch.equal(resume.activity[name].channels, active.channels):
            raise ArgumentError(f"resume: that sweep recorded other channels of {name}; use the same")
    if not _agree(resume.clean, fresh.clean):
        raise ArgumentError("resume: that sweep is of another network; start anew without resume")


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    """Equal but for rounding, which differs by form and device; NaN and infinity in the same places."""
    finite = ours.isfinite()
    if not torch.allclose(theirs[~finite], ours[~finite], equal_nan=True):
        return False
    error, size = (values[finite].double().norm() for values in (theirs - ours, ours))
    return bool(error <= 1e-3 * size)


def _unchanged(images: Tensor, filled: Tensor, windows: Windows, units: np.ndarray) -> np.ndarray:
    """Bool [U]: does the window show, bit for bit, what is there anyway? Nothing changes then."""
    rows, columns = (torch.from_numpy(c).to(images.device, torch.float64) for c in windows.covers())
    counts = []
    for image, fill in zip(images, filled):  # one by one: maps of all images at once would be as large as they are
        differs = (image != fill).any(0).to(torch.float64)
        counts.append(rows @ differs @ columns.T)
    unchanged: np.ndarray = (torch.stack(counts) == 0).cpu().numpy()
    return unchanged[tuple(units.T)]


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
