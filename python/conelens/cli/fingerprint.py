"""What a table of peaks was made from, as short hashes by part, so that a resume can say what has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from conelens.data import find_images
from conelens.errors import ArgumentError
from conelens.models import LoadedModel


def fingerprint(model: LoadedModel, folder: Path, tiles: str | None, distinct: str) -> str:
    """ "model:… weights:… input:… tiles:… distinct:… images:…"; images count by relative path and size in bytes."""
    recipe = model.preprocess
    files = [(os.path.relpath(path, folder), path.stat().st_size if path.exists() else -1) for path in find_images(folder)]
    parts = {
        "model": _short(model.name.encode()),
        "weights": _weights(model.module.state_dict()),
        "input": _short(repr((recipe.size, recipe.scale, recipe.mean, recipe.std, recipe.fit, recipe.short_side)).encode()),
        "tiles": _short(repr(tiles).encode()),
        "distinct": distinct,
        "images": _short(repr(files).encode()),
    }
    return " ".join(f"{name}:{value}" for name, value in parts.items())


def require_same(kept: str, wanted: str) -> None:
    """ArgumentError that names the parts in which two fingerprints differ."""
    theirs, ours = (dict(part.partition(":")[::2] for part in text.split()) for text in (kept, wanted))
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if differing:
        raise ArgumentError(
            f"--resume: that table was made with other {', '.join(differing)}; give the model, folder and options of the "
            "interrupted run, or start anew without --resume"
        )


def _weights(state: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, value in state.items():
        whole.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
