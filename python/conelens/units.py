"""Which units a call is about: image, channel and position of each, checked against the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from conelens.errors import ArgumentError
from conelens.graph import Node


@dataclass
class Units:
    """U units of one layer: ``rows`` [U] (image of each), ``channels`` [U], ``places`` [U, 2] (y, x) or None for peaks."""

    rows: np.ndarray
    channels: np.ndarray
    places: np.ndarray | None

    def __len__(self) -> int:
        return len(self.rows)


def read_units(node: Node, images: Tensor, channel: Any, position: Any, image: Any) -> Units:
    """Units from the arguments of ``project``; ArgumentError says which one is wrong."""
    given = {"image": _integers("image", image, 1), "channel": _integers("channel", channel, 1)}
    if given["channel"] is None:
        raise ArgumentError("channel: got None, wanted an int or [U] ints")
    where = None
    if not isinstance(position, str):
        where = given["position"] = _integers("position", position, 2)
        if where is not None and where.size == 0:
            where = given["position"] = where.reshape(-1, 2)
        if where is None or where.shape[-1:] != (2,):
            raise ArgumentError(f"position: got {position!r}, wanted 'peak', (y, x) or [U, 2]")
    elif position != "peak":
        raise ArgumentError(f"position: got {position!r}, wanted 'peak', (y, x) or [U, 2]")
    lengths = {name: len(v) for name, v in given.items() if v is not None and v.ndim == (2 if name == "position" else 1)}
    units = next(iter(lengths.values()), len(images) if image is None else 1)
    if set(lengths.values()) - {units} or (image is None and units != len(images) and len(images) != 1):
        told = ", ".join(f"{name} of {length}" for name, length in lengths.items())
        raise ArgumentError(
            f"units: got {told} for {len(images)} images; all lengths must agree, and image=[...] says whose each unit is"
        )
    rows = given["image"]
    if rows is None:
        rows = np.arange(units) if units == len(images) else np.zeros(units, np.int64)
    rows, channels = (v if v.ndim else np.full(units, v) for v in (rows, given["channel"]))
    _check_range("image", rows, len(images), "the images given")
    _check_range("channel", channels, node.shape[0], f"layer {node.name}")
    if where is not None:
        where = where if where.ndim == 2 else np.repeat(where[None], units, 0)
        _check_range("position y", where[:, 0], node.shape[1], f"layer {node.name}")
        _check_range("position x", where[:, 1], node.shape[2], f"layer {node.name}")
    return Units(rows, channels, where)


def _integers(name: str, value: Any, most: int) -> np.ndarray | None:
    if value is None:
        return None
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim > most:
        raise ArgumentError(f"{name}: got {value!r}, wanted whole numbers with at most {most} dimension(s)")
    return array.astype(np.int64)


def _check_range(name: str, values: np.ndarray, size: int, of: str) -> None:
    if values.size and values.view(np.uint64).max() >= size:  # negative ones read as huge ones
        wrong = values[(values < 0) | (values >= size)]
        raise ArgumentError(f"{name}: got {int(wrong[0])}, wanted 0..{size - 1} ({of} has {size})")
