"""The activity that an explanatory graph explains: normalised feature maps of a whole data set, kept in half precision."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conelens.checked import CheckedImages, warn_skipped
from conelens.data import ImageDataset, iter_batches
from conelens.errors import ArgumentError, DataError, LayerError
from conelens.network import Network

Progress = Callable[[int, int], None]

# a unit that hardly ever changes would turn rounding into activity: no scale is below this share of the layer's mean scale
_LEAST_SCALE = 1e-3
_LEAST_DEVIATION = 1e-6  # of the root mean square: rounding
_PER_UNIT_FROM = 200  # images from which each unit's own deviation is known well enough
_BLOCK_BYTES = 64 << 20
_ROOM = 2.0**15  # largest half that is used while the true scale is not known: half precision ends at 2^16


class Grid(NamedTuple):
    """The cells of a layer in pixels of the network's input: receptive-field centres, (y, x); pixel i is centred at i."""

    start: tuple[float, float]
    step: tuple[float, float]
    size: tuple[int, int]

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """(y0, x0, dy, dx) as `ops.graph_e_step` wants them."""
        return (*self.start, *self.step)

    @property
    def cell(self) -> float:
        """Pixels per cell: the geometric mean of both steps."""
        return (self.step[0] * self.step[1]) ** 0.5

    def pixels(self, cells: Tensor) -> Tensor:
        """Cell indices ``y * W + x`` [...] -> float32 pixels [..., 2]."""
        y, x = cells // self.size[1], cells % self.size[1]
        return torch.stack((self.start[0] + self.step[0] * y.float(), self.start[1] + self.step[1] * x.float()), -1)

    def cells(self, pixels: Tensor) -> Tensor:
        """The index of the cell nearest to pixels [..., 2] -> int64 [...]; points outside go to the border."""
        along = [
            ((pixels[..., axis] - self.start[axis]) / self.step[axis]).round().long().clamp(0, self.size[axis] - 1)
            for axis in (0, 1)
        ]
        return along[0] * self.size[1] + along[1]


def grid_of(net: Network, layer: str) -> Grid:
    """Where the units of a layer look: the centres of their receptive fields. LayerError for a layer without a map."""
    node, about = net.node(layer), net[layer]
    if node.vector or min(about.stride) < 1 or min(about.shape[1:]) < 2:
        raise LayerError(
            f"layer: {layer!r} has shape {about.shape}, which is no map of places in the image; choose a convolution before it"
        )
    centre = [offset + (field - 1) / 2 for offset, field in zip(about.offset, about.receptive_field, strict=True)]
    return Grid((centre[0], centre[1]), (float(about.stride[0]), float(about.stride[1])), (about.shape[1], about.shape[2]))


class Features:
    """Normalised activity F = max(x, 0) / sigma of some layers over N images: ``features[layer]`` [N, D, H, W] float16.

    ``scale[layer]``: the sigma it was divided by, float32 [D, H, W] (per unit) or [D, 1, 1] (per channel), on the CPU.
    ``grids[layer]``: where the cells lie. ``image_size``: (height, width) of the network's input in pixels. Images that could
    not be read have no activity; ``skipped`` names them.
    """

    def __init__(
        self,
        maps: Mapping[str, Tensor],
        grids: Mapping[str, Grid],
        scale: Mapping[str, Tensor],
        image_size: tuple[int, int],
        skipped: Sequence[int] = (),
    ) -> None:
        self.maps = dict(maps)
        self.grids = {name: grids[name] for name in maps}
        self.scale = {name: scale[name].cpu() for name in maps}
        self.image_size = image_size
        self.skipped = list(skipped)
        self.layers = list(maps)
        self._home: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.maps.values())))

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self.maps:
            raise LayerError(f"layer: got {layer!r}, wanted one of {', '.join(self.layers)} (the layers of these features)")
        return self.maps[layer]

    def __repr__(self) -> str:
        return f"Features({', '.join(self.layers)}; {len(self)} images)"

    def only(self, layers: Sequence[str]) -> Features:
        """Some of the layers, sharing memory."""
        return self._holding({name: self[name] for name in layers}, self.skipped)

    def cpu(self) -> Features:
        """The same in the computer's memory."""
        return self._holding({name: maps.cpu() for name, maps in self.maps.items()}, self.skipped)

    def part(self, start: int, stop: int) -> Features:
        """Images [start, stop) alone, sharing memory: what one worker of several takes."""
        skipped = [i - start for i in self.skipped if start <= i < stop]
        return self._holding({name: values[start:stop] for name, values in self.maps.items()}, skipped)

    def _holding(self, maps: Mapping[str, Tensor], skipped: Sequence[int]) -> Features:
        """Other maps of the same network and scale."""
        features = Features(maps, self.grids, self.scale, self.image_size, skipped)
        features._home = self._home  # the files go when the last user has gone
        return features

    @classmethod
    def extract(
        cls,
        net: Network,
        images: Tensor | ImageDataset,
        layers: Sequence[str],
        *,
        scale: str | Mapping[str, Tensor] = "auto",
        negatives: Tensor | ImageDataset | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        memory: int = 4 << 30,
        folder: str | Path | None = None,
    ) -> Features:
        """One forward pass over the images (and one over ``negatives``).

        Args:
            net: from :func:`conelens.trace`.
            images: [N, C, H, W], or a data set of [C, H, W] in the network's space. An item that cannot be read, or holds
                NaN, is named in a warning and counts as an image without activity.
            layers: names or aliases; convolutions, read before their ReLU. Where a batch norm stands between them, name it
                instead: it decides what fires.
            scale: the sigma that activity is divided by: "unit" (standard deviation of each unit, Zhang et al.'s release),
                "channel" (of each channel over its map), "auto" (per unit from 200 images), or tensors [D, H, W] or [D, 1, 1]
                by layer name, as those of another call.
            negatives: images, ideally a thousand of anything, whose deviations are taken (the release's choice); without them
                those of ``images``.
            batch_size: images per forward pass.
            progress: called with (images done, images in all).
            memory: bytes of maps from which they are kept in files instead; below, on the network's device where they fit.
            folder: where those files go; a temporary folder by default, deleted with the last reference.

        Raises:
            ArgumentError, LayerError: wrong arguments. DataError: no image could be read, the network gives NaN, or images are
            too few for deviations. OSError: no room for the files.
        """
        if not layers:
            raise ArgumentError("layers: got none, wanted at least one name (net.layers() lists them)")
        if batch_size < 1:
            raise ArgumentError(f"batch_size: got {batch_size}, wanted at least 1")
        if len(images) == 0:
            raise ArgumentError("images: got none, wanted at least one")
        if isinstance(scale, str) and scale not in ("auto", "unit", "channel"):
            raise ArgumentError(f"scale: got {scale!r}, wanted 'auto', 'unit', 'channel' or tensors by layer name")
        grids = {name: grid_of(net, name) for name in layers}
        shapes = {name: net[name].shape for name in layers}
        total = len(images) + (len(negatives) if negatives is not None else 0)
        tell = _counter(progress, total)
        if not isinstance(scale, str):
            known: dict[str, Tensor] | None = {name: _given(scale, name, shape) for name, shape in shapes.items()}
        elif negatives is not None:
            spread = _Spread(shapes)
            for _, values in _passes(net, negatives, layers, batch_size, tell, []):
                spread.add(values)
            known = spread.scale(scale, "negatives")
        else:
            known = None

        skipped: list[int] = []
        store = _Store({name: (len(images), *shape) for name, shape in shapes.items()}, memory, folder, net.device)
        spread = _Spread(shapes)
        rough: dict[str, float] = {}  # keeps halves from overflowing until the true scale is known
        for indices, values in _passes(net, images, layers, batch_size, tell, skipped):
            for name, value in values.items():
                if known is not None:
                    value = value / known[name].to(value.device)
                else:
                    peak, by = float(value.amax()), rough.get(name, 0.0)
                    if peak > _ROOM * by:
                        rough[name] = peak / _ROOM**0.5
                        if by > 0:  # all before was darker by far
                            _divide(store.maps[name][: indices[0]], torch.tensor(rough[name] / by))
                    value = value / rough.get(name, 1.0)
                halves = value.clamp_(min=0).to(torch.float16)
                if not bool(torch.isfinite(halves).all()):
                    raise DataError(f"layer {name}: activity overflows half precision; give larger scales with scale={{...}}")
                store.maps[name][torch.tensor(indices)] = halves.to(store.maps[name].device)
            if known is None:
                spread.add(values)
        if known is None:
            known = spread.scale(str(scale), "images")
            for name, sigma in known.items():
                _divide(store.maps[name], sigma / rough.get(name, 1.0))
        features = cls(store.maps, grids, known, (net.input_shape[1], net.input_shape[2]), skipped)
        features._home = store.home
        return features


class _Store:
    """Room for the maps: zeros in the network's memory, in the computer's, or in files where they would not fit."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], memory: int, folder: str | Path | None, device: torch.device
    ) -> None:
        self.home: tempfile.TemporaryDirectory[str] | None = None
        wanted = sum(2 * int(np.prod(shape)) for shape in shapes.values())
        if wanted <= memory:
            if device.type == "cuda" and 2 * wanted > torch.cuda.mem_get_info(device)[0]:
                device = torch.device("cpu")  # half of what is free stays for the work itself
            self.maps = {name: torch.zeros(shape, dtype=torch.float16, device=device) for name, shape in shapes.items()}
            return
        if folder is None:
            self.home = tempfile.TemporaryDirectory(prefix="conelens-features-")
            folder = self.home.name
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        about = {f"{number}.f16": {"layer": name, "shape": shape} for number, (name, shape) in enumerate(shapes.items())}
        (root / "features.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        self.maps = {}
        for file, (name, shape) in zip(about, shapes.items(), strict=True):
            self.maps[name] = _in_file(root / file, shape)


def _in_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Float16 zeros in a new file. Its room on the disk is taken now: a mapped file that finds none later kills the process."""
    path.unlink(missing_ok=True)  # who still maps an older file keeps it
    size = 2 * int(np.prod(shape))
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, f"{error.strerror} ({size / 1e9:.1f} GB of features)", str(path)) from error
    return torch.from_numpy(np.memmap(path, np.float16, "r+", shape=shape))


class _Spread:
    """Running deviations of units: population form around the mean, as the release has it."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.count = 0
        self.sums: dict[str, Tensor | float] = dict.fromkeys(shapes, 0.0)
        self.squares: dict[str, Tensor | float] = dict.fromkeys(shapes, 0.0)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            wide = value.double()
            self.sums[name] = self.sums[name] + wide.sum(0)
            self.squares[name] = self.squares[name] + wide.square().sum(0)
            count = len(value)
        self.count += count

    def scale(self, kind: str, source: str) -> dict[str, Tensor]:
        if self.count == 0:
            raise DataError(f"{source}: no image could be read")
        per_unit = kind == "unit" or (kind == "auto" and self.count >= _PER_UNIT_FROM)
        found = {}
        for name, total in self.sums.items():
            mean, square = torch.as_tensor(total).cpu() / self.count, torch.as_tensor(self.squares[name]).cpu() / self.count
            if not per_unit:
                mean, square = mean.mean((1, 2), keepdim=True), square.mean((1, 2), keepdim=True)
            sigma = (square - mean.square()).clamp(min=0).sqrt()
            if sigma.mean() < _LEAST_DEVIATION * square.mean().sqrt():
                what = "each unit" if per_unit else "each channel"
                raise DataError(
                    f"{source}: {what} of layer {name} is the same everywhere, so that there is no deviation to measure "
                    "activity by; give more images, negatives=... or scale='channel'"
                )
            floor = max(float(sigma.mean()) * _LEAST_SCALE, 1e-6)
            found[name] = sigma.clamp(min=floor).float()
        return found


def _given(scale: Mapping[str, Tensor], name: str, shape: tuple[int, int, int]) -> Tensor:
    if name not in scale:
        raise ArgumentError(f"scale: has no layer {name!r}; give a tensor for each layer")
    sigma = scale[name]
    if tuple(sigma.shape) not in (shape, (shape[0], 1, 1)) or not bool((sigma > 0).all()):
        raise ArgumentError(
            f"scale[{name!r}]: got shape {tuple(sigma.shape)}, wanted {shape} or {(shape[0], 1, 1)}, all positive"
        )
    return sigma.float()


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None and more > 0:
            progress(done, total)

    return tell


def _passes(
    net: Network,
    images: Tensor | ImageDataset,
    layers: Sequence[str],
    batch_size: int,
    tell: Callable[[int], None],
    skipped: list[int],
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices, raw maps) of batches; what cannot be read goes to ``skipped``."""

    def skip(index: int, error: DataError) -> None:
        skipped.append(index)
        warn_skipped(index, error)

    seen = 0
    for batch in iter_batches(CheckedImages(net, images), batch_size, on_problem=skip):
        values = net.forward(batch.images, layers)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"layer {name} gives NaN or infinity for the finite images {batch.indices[0]} to {batch.indices[-1]}; "
                    "the network's weights or their dtype overflow"
                )
        yield batch.indices, values
        tell(batch.indices[-1] + 1 - seen)
        seen = batch.indices[-1] + 1
    tell(len(images) - seen)


def _divide(maps: Tensor, by: Tensor) -> None:
    """In place, in blocks, in float32."""
    by = by.to(maps.device)
    rows = max(1, _BLOCK_BYTES // (4 * maps[0].numel()))
    for start in range(0, len(maps), rows):
        block = maps[start : start + rows]
        block.copy_((block.float() / by).clamp_(max=torch.finfo(torch.float16).max))
