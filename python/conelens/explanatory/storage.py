"""Graphs in files: one safetensors file that is replaced whole, and beside it JSON for people."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conelens import files
from conelens.explanatory.features import Grid
from conelens.explanatory.layer import GraphLayer
from conelens.explanatory.rules import Rules

FORMAT = "conelens.ExplanatoryGraph 1"
FILE = "graph.safetensors"
_SETTINGS = {"layers", "nodes_per_filter", "edges", "iterations", "seed", "rules", "images", "image_size", "activity"}


def write(folder: str | Path, layers: dict[str, GraphLayer], scale: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write ``graph.safetensors``, and ``graph.json``, for people to read; the old ones stay until both are complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"scale\n{name}": sigma for name, sigma in scale.items()}
    about: dict[str, Any] = {"format": FORMAT, "settings": settings, "layers": {}}
    for name, layer in layers.items():
        values = {f.name: getattr(layer, f.name) for f in fields(layer)}
        tensors |= {f"{key}\n{name}": value for key, value in values.items() if isinstance(value, Tensor)}
        about["layers"][name] = {"grid": layer.grid, "mean_score": layer.mean_score, "history": layer.history}
    tensors = {key: value.clone() for key, value in tensors.items()}  # some may be one tensor
    files.write_tensors(folder / FILE, tensors, {"graph": about}, readable="graph")


def read(folder: str | Path) -> tuple[dict[str, GraphLayer], dict[str, Tensor], dict[str, Any]]:
    """(layers, scale, settings) of what :func:`write` wrote; CheckpointError when it is no graph, or not a whole one."""
    with files.reading(folder, "explanatory graph"):
        tensors, (about,) = files.read_tensors(Path(folder) / FILE, FORMAT, "graph")
        layers = {name: _layer(name, held, tensors) for name, held in about["layers"].items()}
        scale = {key.split("\n")[1]: value for key, value in tensors.items() if key.startswith("scale\n")}
        if missing := _SETTINGS - set(about["settings"]):
            raise KeyError(*sorted(missing))
        names = about["settings"]["layers"]
        if set(scale) != set(names) or not set(layers) <= set(names):
            raise ValueError("its layers do not fit its settings")
        Rules(**about["settings"]["rules"])
        _check_edges([layers[name] for name in names if name in layers])
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
        if value.dtype != (torch.int64 if key == "edges" else torch.float32):
            raise ValueError(f"{key} of {name} is {value.dtype}")
    edges, strength = found["edges"], found["strength"]
    if (None if edges is None else edges.shape) != (None if strength is None else strength.shape):
        raise ValueError(f"edges of {name} do not fit their strength")
    history = [float(value) for value in held["history"]]
    return GraphLayer(name, grid, **found, mean_score=float(held["mean_score"]), history=history)  # type: ignore[arg-type]


def _check_edges(layers: list[GraphLayer]) -> None:
    for layer, above in pairwise(layers):
        if layer.edges is None:
            raise ValueError(f"{layer.name} has no edges")
        if not bool(((layer.edges >= 0) & (layer.edges < above.sigma.numel())).all()):
            raise ValueError(f"edges of {layer.name} lead to nodes that {above.name} does not have")
    if layers and layers[-1].edges is not None:
        raise ValueError(f"{layers[-1].name} is the top layer but has edges")
