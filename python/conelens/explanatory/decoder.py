"""A small up-convolutional network that paints the picture a layer's activity came from.

After Dosovitskiy and Brox, "Inverting visual representations with convolutional networks" (CVPR 2016), made small: about a
thousand photographs and a few minutes on two cores give blurred pictures, of where things are and in which colours.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from conelens import files
from conelens.errors import ArgumentError, CheckpointError
from conelens.explanatory.painting import SLOPE, Recipe, doublings, layout_of, paint

FORMAT = "conelens.Decoder 1"
CHECKPOINT = "decoder_training.safetensors"
_BETAS, _EPSILON = (0.9, 0.99), 1e-8  # Adam's
_ORDER, _THINNING, _HELD_OUT, _INITIAL = range(4)  # what random numbers are drawn for


class Errors(NamedTuple):
    """Mean absolute error on held-out images, in grey levels (0..255), of what is painted from:

    ``whole`` all units, ``tenth`` a random tenth of the active units, ``colour`` nothing: the mean colour everywhere.
    """

    whole: float
    tenth: float
    colour: float


class _State(NamedTuple):
    """Training between two updates. Replaced as a whole, so that an interrupt never meets half an update."""

    step: int
    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training; ``decoder`` is what it had become. With a folder, the same call goes on from there."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(f"interrupted after {decoder.steps} of {decoder.recipe.steps} steps")
        self.decoder = decoder


@dataclass(frozen=True, eq=False)
class Decoder:
    """Paints low-pass pictures from a layer's normalised activity. Made by :meth:`train`, kept by :meth:`save`.

    Attributes:
        layer: name of the layer; ``shape`` (D, H, W) of its maps.
        recipe: how it was trained; ``steps`` how far.
        errors: on held-out images, None where there were none.
    """

    layer: str
    shape: tuple[int, int, int]
    recipe: Recipe
    weights: dict[str, Tensor] = field(repr=False)
    steps: int
    errors: Errors | None = None

    def __str__(self) -> str:
        said = f"decoder of {self.layer}, {self.steps} of {self.recipe.steps} steps, pictures of {self.size[0]}x{self.size[1]}"
        if self.errors is None:
            return said
        whole, tenth, colour = self.errors
        return (
            f"{said}; held-out error {whole:.1f} grey levels, from a tenth of the units {tenth:.1f}, mean colour {colour:.1f}"
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        times = 2 ** doublings(self.shape, self.recipe.size)
        return self.shape[1] * times, self.shape[2] * times

    def __call__(self, maps: Tensor, batch_size: int = 32) -> Tensor:
        """Maps [N, D, H, W], normalised and non-negative, of any floating dtype -> pictures [N, 3, h, w] float32 in 0..1."""
        _check_maps("maps", maps, self.shape)
        with torch.no_grad():
            parts = [paint(self.weights, part.float()).clamp(0, 1) for part in maps.split(batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, 3, *self.size)

    @classmethod
    def train(
        cls, layer: str, features: Tensor, images: Tensor, recipe: Recipe | None = None, *,
        folder: str | Path | None = None, save_every: int = 50, progress: Callable[[int, int, float], None] | None = None,
    ) -> Decoder:  # fmt: skip
        """Learn to paint ``images`` from ``features``.

        The loss is the mean absolute error of the pixels plus ``recipe.contrast`` times that of the differences of neighbouring
        pixels, both against the image averaged down to the size of the picture.

        Args:
            layer: the layer's name, told by messages and kept in the file.
            features: [N, D, H, W], N ≥ 2, floating, finite and non-negative; may be memory-mapped.
            images: [N, 3, h, w], what the network saw, for display: uint8, or floating in 0..1.
            recipe: by default ``Recipe()``.
            folder: keeps a checkpoint, made anew after every ``save_every`` updates, so that the same call goes on after a kill
                or Ctrl-C and ends with the same weights as if nothing had happened.
            progress: called with (updates done, updates in all, loss) after each update.

        Raises:
            TrainingInterrupted: on Ctrl-C.
            ArgumentError: shapes, dtypes or values.
            CheckpointError: the folder's checkpoint is broken, or of other data or another recipe.
        """
        recipe = recipe or Recipe()
        if type(save_every) is not int or save_every < 1:
            raise ArgumentError(f"save_every: got {save_every!r}, wanted a whole number of at least 1 (updates)")
        _check_maps("features", features, None)
        shape = (features.shape[1], features.shape[2], features.shape[3])
        decoder = cls(layer, shape, recipe, {}, 0)
        targets = low_pass(images, decoder.size)
        training, held = _parts(len(features), len(targets), recipe)
        file = None if folder is None else Path(folder) / CHECKPOINT
        about = decoder._about(data=_fingerprint(features, targets))
        state = None if file is None else _resume(file, about)
        if state is None:
            state = _begin(shape, recipe, targets[training].float().mean((0, 2, 3)) / 255)
        decoder = cls(layer, shape, recipe, state.weights, state.step)
        try:
            while state.step < recipe.steps:
                chosen = training[_batch(len(training), state.step, recipe)]
                maps, wanted = features[chosen].float(), targets[chosen].float() / 255
                later, loss = _update(state, maps, wanted, recipe)
                if not math.isfinite(loss):
                    raise ArgumentError(
                        f"rate: the loss is {loss} after {state.step} updates; got {recipe.rate}, take a third of it"
                    )
                state = later
                if file is not None and (state.step % save_every == 0 or state.step == recipe.steps):
                    _save_state(file, state, about)
                if progress is not None:
                    progress(state.step, recipe.steps, loss)
            decoder = cls(layer, shape, recipe, state.weights, state.step)
            return cls(layer, shape, recipe, state.weights, state.step, decoder._measure(features, targets, training, held))
        except KeyboardInterrupt:
            if file is not None:
                _save_state(file, state, about)
            raise TrainingInterrupted(cls(layer, shape, recipe, state.weights, state.step)) from None

    def _measure(self, features: Tensor, targets: Tensor, training: Tensor, held: Tensor) -> Errors | None:
        if not len(held):
            return None
        colour = targets[training].float().mean((0, 2, 3))[:, None, None]
        totals = np.zeros(3)
        for number, index in enumerate(held.tolist()):
            maps, wanted = features[index : index + 1].float(), targets[index : index + 1].float()
            tenth = thin(maps, torch.tensor([0.1]), _random(self.recipe.seed, _HELD_OUT, number + 1))
            painted = (255 * self(maps), 255 * self(tenth), colour)
            totals += [float((picture - wanted).abs().mean()) for picture in painted]
        return Errors(*(totals / len(held)).tolist())

    def _about(self, **more: Any) -> dict[str, Any]:
        return {"format": FORMAT, "layer": self.layer, "shape": list(self.shape), "recipe": asdict(self.recipe), **more}

    def save(self, path: str | Path) -> None:
        """Write weights and recipe as safetensors; the old file stays whole until the new one is complete."""
        about = self._about(steps=self.steps, errors=None if self.errors is None else list(self.errors))
        _write(Path(path), self.weights, about)

    @classmethod
    def load(cls, path: str | Path) -> Decoder:
        """Read what :meth:`save` wrote; CheckpointError when it is something else, or broken."""
        with files.reading(path, "decoder"):
            weights, (about,) = files.read_tensors(path, FORMAT, "conelens")
            recipe = Recipe(**about["recipe"])
            depth, height, width = (int(n) for n in about["shape"])
            shape = (depth, height, width)
            errors = None if about["errors"] is None else Errors(*map(float, about["errors"]))
            layer, steps = str(about["layer"]), int(about["steps"])
        return cls(layer, shape, recipe, _checked(path, weights, layout_of(shape, recipe)), steps, errors)


# ----------------------------------------------------------------------------------------------------- pictures and sparse maps
def low_pass(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [N, 3, h, w], uint8 or floating in 0..1 -> uint8 [N, 3, *size], averaged down (or enlarged smoothly)."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(f"images: got {got}, wanted a tensor [N, 3, h, w]")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ArgumentError(f"images: got {images.dtype}, wanted uint8, or floating values in 0..1")
    parts = []
    for part in images.split(64):
        values = part.float() if part.dtype == torch.uint8 else part.float() * 255
        if not bool(((values >= 0) & (values <= 255)).all()):
            raise ArgumentError(
                "images: got NaN or values outside 0..1, wanted them for display; undo the network's normalisation"
            )
        if values.shape[2:] != size:
            values = functional.interpolate(values, size, mode="bilinear", antialias=True, align_corners=False)
        parts.append(values.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def thin(maps: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
    """Maps [N, D, H, W] in which image n keeps each unit with probability ``shares`` [N] and has zeros elsewhere."""
    kept = torch.rand(maps.shape, generator=generator) < shares[:, None, None, None]
    return maps * kept.to(maps.dtype)


# ------------------------------------------------------------------------------------------------------------------ the network
def _begin(shape: tuple[int, int, int], recipe: Recipe, colour: Tensor) -> _State:
    """First weights, of a size that keeps the activity's; zero maps are painted in ``colour`` [3]."""
    generator = _random(recipe.seed, _INITIAL, 0)
    weights = {}
    for name, size in layout_of(shape, recipe).items():
        if len(size) == 1:
            weights[name] = torch.zeros(size)
            continue
        # a cell of an up-convolution is reached by a quarter of its taps
        inputs = math.prod(size[1:]) if name in ("gather", "mix") else size[0] * size[2] * size[3] / (size[2] - 2) ** 2
        gain = 0.1 if name == "colour" else math.sqrt(2 / (1 + SLOPE**2))
        weights[name] = torch.randn(size, generator=generator) * (gain / math.sqrt(inputs))
    weights["colour.bias"] = colour.clone()
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    return _State(0, weights, zeros, dict(zeros))


# --------------------------------------------------------------------------------------------------------------------- training
def _random(seed: int, purpose: int, number: int) -> torch.Generator:
    """Random numbers that depend on these three alone, so that going on needs no generator's state."""
    mixed = np.random.SeedSequence([seed % 2**63, purpose, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def _parts(count: int, images: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Indices of the images to learn from, and of those to measure on."""
    if count != images:
        raise ArgumentError(f"features and images: got {count} and {images} of them, wanted as many")
    if count < 2:
        raise ArgumentError(f"features: got {count} images, wanted at least 2, better hundreds")
    order = torch.randperm(count, generator=_random(recipe.seed, _HELD_OUT, 0))
    held = min(count - 1, round(recipe.held_out * count))
    return order[held:].sort().values, order[:held].sort().values


def _batch(count: int, step: int, recipe: Recipe) -> Tensor:
    """Which of ``count`` images the update after ``step`` others learns from."""
    size = min(recipe.batch_size, count)
    epoch, place = divmod(step, count // size)
    return torch.randperm(count, generator=_random(recipe.seed, _ORDER, epoch))[place * size : (place + 1) * size]


def _rate(step: int, recipe: Recipe) -> float:
    warm = max(1, recipe.steps // 20)
    return recipe.rate * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _update(state: _State, maps: Tensor, wanted: Tensor, recipe: Recipe) -> tuple[_State, float]:
    """One step of Adam (Kingma and Ba 2015) into new tensors."""
    generator = _random(recipe.seed, _THINNING, state.step)
    shares = 10 ** (-2 * torch.rand(len(maps), generator=generator))  # 1 % to all, any order of magnitude as likely
    whole = torch.rand(len(maps), generator=generator) >= recipe.thinned
    if not bool(whole.all()):
        maps = thin(maps, torch.where(whole, 1.0, shares), generator)
    weights = {name: value.detach().requires_grad_() for name, value in state.weights.items()}
    loss = _loss(paint(weights, maps), wanted, recipe.contrast)
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    step, rate = state.step + 1, _rate(state.step, recipe)
    first = {name: torch.lerp(gradients[name], value, _BETAS[0]) for name, value in state.first.items()}
    second = {name: torch.lerp(gradients[name].square(), value, _BETAS[1]) for name, value in state.second.items()}
    rate, square = rate / (1 - _BETAS[0] ** step), 1 - _BETAS[1] ** step
    moved = {
        name: value - rate * first[name] / ((second[name] / square).sqrt() + _EPSILON) for name, value in state.weights.items()
    }
    return _State(step, moved, first, second), float(loss.detach())


def _loss(painted: Tensor, wanted: Tensor, contrast: float) -> Tensor:
    error = painted - wanted
    return error.abs().mean() + contrast * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


# ------------------------------------------------------------------------------------------------------------------------ files
def _fingerprint(features: Tensor, targets: Tensor) -> str:
    """Of all pictures, and of the features of some images."""
    digest = hashlib.sha256(targets.numpy().tobytes())
    for index in torch.linspace(0, len(features) - 1, 8).long().tolist():
        digest.update(features[index].float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _save_state(file: Path, state: _State, about: dict[str, Any]) -> None:
    groups = {"weights": state.weights, "first": state.first, "second": state.second}
    tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    try:
        _write(file, tensors, about | {"step": state.step})
    except OSError as error:
        warnings.warn(f"the checkpoint was not kept: {error}", stacklevel=3)


def _resume(file: Path, about: dict[str, Any]) -> _State | None:
    """The state kept in ``file``; None where there is none yet."""
    if not file.exists():
        return None
    with files.reading(file, "decoder"):
        tensors, (theirs,) = files.read_tensors(file, FORMAT, "conelens")
    differing = [key for key in ("layer", "shape", "recipe", "data") if theirs.get(key) != about[key]]
    if differing:
        raise CheckpointError(f"{file}: made with other {', '.join(differing)}; choose another folder, or remove that file")
    layout = layout_of(tuple(about["shape"]), Recipe(**about["recipe"]))
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "first": {}, "second": {}}
    for name, value in tensors.items():
        group, _, inner = name.partition("/")
        groups.setdefault(group, {})[inner] = value
    groups = {group: _checked(file, values, layout) for group, values in groups.items()}
    step = theirs.get("step")
    if type(step) is not int or not 0 <= step <= about["recipe"]["steps"]:
        raise CheckpointError(f"{file}: its step is {step!r}, wanted 0..{about['recipe']['steps']}; remove that file")
    return _State(step, **groups)


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_tensors(path, tensors, {"conelens": about})


def _checked(path: str | Path, weights: dict[str, Tensor], layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights in the order of ``layout``, if they are just these."""
    if {name: tuple(value.shape) for name, value in weights.items()} != layout:
        raise CheckpointError(f"{path}: its weights are not those of its recipe; train anew")
    broken = [name for name, value in weights.items() if value.dtype != torch.float32 or not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(f"{path}: {broken[0]} is not finite float32; train anew")
    return {name: weights[name] for name in layout}


def _check_maps(name: str, maps: Any, shape: tuple[int, int, int] | None) -> None:
    if not isinstance(maps, Tensor) or maps.ndim != 4 or not maps.is_floating_point():
        got = f"{maps.dtype} {list(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise ArgumentError(f"{name}: got {got}, wanted a floating tensor [N, D, H, W]")
    if 0 in maps.shape[1:] or (shape is not None and tuple(maps.shape[1:]) != shape):
        wanted = "no empty axis" if shape is None else f"[N, {shape[0]}, {shape[1]}, {shape[2]}] as in training"
        raise ArgumentError(f"{name}: got shape {list(maps.shape)}, wanted {wanted}")
    for part in maps.split(64):
        if not bool(((part >= 0) & (part < math.inf)).all()):
            raise ArgumentError(f"{name}: got negative, infinite or NaN values, wanted normalised activity, finite and ≥ 0")
