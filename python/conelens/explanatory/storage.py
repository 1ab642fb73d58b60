"""Graphs in files: one safetensors file that is replaced whole, and beside it JSON for people."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conelens.errors import CheckpointError
from conelens.explanatory.features import Grid
from conelens.explanatory.layer import GraphLayer

FORMAT = "conelens.ExplanatoryGraph 1"
FILE = "graph.safetensors"


def write(folder: str | Path, layers: dict[str, GraphLayer], scale: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write ``graph.safetensors``, and ``graph.json``, for people to read; the old ones stay until both are complete."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"scale\n{name}": sigma for name, sigma in scale.items()}
    about: dict[str, Any] = {"format": FORMAT, "settings": settings, "layers": {}}
    for name, layer in layers.items():
        values = {f.name: getattr(layer, f.name) for f in fields(layer)}
        tensors |= {f"{key}\n{name}": value for key, value in values.items() if isinstance(value, Tensor)}
        about["layers"][name] = {"grid": layer.grid, "mean_score": layer.mean_score, "history": layer.history}
    text = json.dumps(about, indent=1)
    parts = folder / "graph.json.part", folder / (FILE + ".part")
    try:
        # not save_file, which makes the file unreadable to others and hides why it cannot be written
        held = save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, {"graph": text})
        parts[0].write_text(text, encoding="utf-8")
        parts[1].write_bytes(held)
        for part in parts:
            part.replace(part.with_suffix(""))
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def read(folder: str | Path) -> tuple[dict[str, GraphLayer], dict[str, Tensor], dict[str, Any]]:
    """(layers, scale, settings) of what :func:`write` wrote; CheckpointError when it is no graph, or not a whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(folder) / FILE, "pt") as file:
            about = json.loads((file.metadata() or {})["graph"])
            if about["format"] != FORMAT:
                raise KeyError(about["format"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not iterable itself
        layers = {name: _layer(name, held, tensors) for name, held in about["layers"].items()}
        scale = {key.split("\n")[1]: value for key, value in tensors.items() if key.startswith("scale\n")}
        names = about["settings"]["layers"]
        if set(scale) != set(names) or not set(layers) <= set(names):
            raise ValueError("its layers do not fit its settings")
        _check_edges([layers[name] for name in names if name in layers])
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise CheckpointError(f"{folder}: no explanatory graph that this version can read ({error})") from error
    return layers, scale, about["settings"]


def _layer(name: str, held: dict[str, Any], tensors: dict[str, Tensor]) -> GraphLayer:
    start, step, size = held["grid"]
    grid = Grid(tuple(map(float, start)), tuple(map(float, step)), tuple(map(int, size)))  # type: ignore[arg-type]
    keys = ("mean", "sigma", "prior_sigma", "anchor", "edges", "strength")
    found = {key: tensors.get(f"{key}\n{name}") for key in keys}
    mean = tensors[f"mean\n{name}"]
    nodes = mean.shape[:2]
    for key, value in found.items():
        if value is None and key in ("edges", "strength"):
            continue
        if value is None:
            raise KeyError(key)
        if value.shape[:2] != nodes or (key in ("mean", "anchor") and value.shape[2:] != (2,)):
            raise ValueError(f"{key} of {name} has shape {tuple(value.shape)}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} of {name} holds NaN")
    if (found["edges"] is None) != (found["strength"] is None):
        raise ValueError(f"edges of {name} have no strength")
    history = [float(value) for value in held["history"]]
    return GraphLayer(name, grid, **found, mean_score=float(held["mean_score"]), history=history)  # type: ignore[arg-type]


def _check_edges(layers: list[GraphLayer]) -> None:
    for layer, above in pairwise(layers):
        if layer.edges is not None and not bool(((layer.edges >= 0) & (layer.edges < above.sigma.numel())).all()):
            raise ValueError(f"edges of {layer.name} lead to nodes that {above.name} does not have")
    if layers and layers[-1].edges is not None:
        raise ValueError(f"{layers[-1].name} is the top layer but has edges")
