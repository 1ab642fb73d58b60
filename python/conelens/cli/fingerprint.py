"""What a table of peaks, a sweep or a graph was made from, as short hashes by part, so that a resume can say what changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from conelens.data import find_images
from conelens.errors import ArgumentError
from conelens.models import LoadedModel


def fingerprint(model: LoadedModel, folder: Path, tiles: str | None, distinct: str) -> str:
    """ "model:… weights:… input:… tiles:… distinct:… images:…"; images count by relative path and size in bytes."""
    return _joined(_model(model) | {"tiles": _short(repr(tiles).encode()), "distinct": distinct, "images": _files(folder)})


def sweep_fingerprint(model: LoadedModel, images: Tensor, settings: Mapping[str, object]) -> str:
    """ "model:… weights:… input:… images:…" and the settings by name; images [N, C, H, W] count by their content."""
    return _joined(_model(model) | {"images": _tensors({"": images})} | _told(settings))


def graph_fingerprint(model: LoadedModel, folder: Path, negatives: Path | None, settings: Mapping[str, object]) -> str:
    """ "model:… weights:… input:… images:… negatives:…" and the settings by name; images as in :func:`fingerprint`."""
    others = "none" if negatives is None else _files(negatives)
    return _joined(_model(model) | {"images": _files(folder), "negatives": others} | _told(settings))


def model_fingerprint(model: LoadedModel) -> str:
    """ "model:… weights:… input:…" as in the others."""
    return _joined(_model(model))


def differing(kept: str, wanted: str) -> list[str]:
    """The parts in which two fingerprints differ."""
    theirs, ours = (dict(part.partition(":")[::2] for part in text.split()) for text in (kept, wanted))
    return [name for name in ours if theirs.get(name) != ours[name]]


def require_same(kept: str, wanted: str) -> None:
    """ArgumentError where a table was made with something else."""
    if names := differing(kept, wanted):
        raise ArgumentError(
            f"--resume: that table was made with other {', '.join(names)}; give the model, images and options of the "
            "interrupted run, or start anew without --resume"
        )


def _joined(parts: Mapping[str, str]) -> str:
    return " ".join(f"{name}:{value}" for name, value in parts.items())


def _told(settings: Mapping[str, object]) -> dict[str, str]:
    return {name: _short(repr(value).encode()) for name, value in settings.items()}


def _files(folder: Path) -> str:
    files = [(os.path.relpath(path, folder), path.stat().st_size if path.exists() else -1) for path in find_images(folder)]
    return _short(repr(files).encode())


def _model(model: LoadedModel) -> dict[str, str]:
    recipe = model.preprocess
    return {
        "model": _short(model.name.encode()),
        "weights": _tensors(model.module.state_dict()),
        "input": _short(repr((recipe.size, recipe.scale, recipe.mean, recipe.std, recipe.fit, recipe.short_side)).encode()),
    }


def _tensors(state: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, value in state.items():
        whole.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
