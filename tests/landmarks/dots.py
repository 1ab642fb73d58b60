"""Black images with one white spot: where a part really is can be read off the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from conelens.data import Preprocess

PLAIN = Preprocess(size=(60, 80))


def spot(path: Path, height: int, width: int, y: float, x: float, radius: float = 4.0) -> Path:
    """Writes an image with a smooth white spot around the point (y, x), given in edges of pixels."""
    down, across = np.arange(height)[:, None] + 0.5 - y, np.arange(width) + 0.5 - x
    values = 255 * np.exp(-(down**2 + across**2) / radius**2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).convert("RGB").save(path, quality=100, subsampling=0)
    return path


def centroid(frame: np.ndarray) -> np.ndarray:
    """(y, x) of the spot in a frame, in pixels."""
    weight = frame[..., 0].astype(float)
    weight[weight < 8] = 0  # what JPEG leaves around it
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    return np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum()
