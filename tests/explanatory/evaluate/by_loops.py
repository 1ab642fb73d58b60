"""The metrics written once more, image by image in plain NumPy, to compare with."""

from __future__ import annotations

import numpy as np


def random_case(rng: np.random.Generator, images: int, nodes: int, parts: int, hidden: float = 0.3) -> tuple[np.ndarray, ...]:
    """positions [N, F, 2], scores [N, F] with ties and zeros, points [N, P, 2] with NaN."""
    positions = rng.uniform(0, 224, (images, nodes, 2)).astype(np.float32)
    scores = np.round(rng.uniform(0, 2, (images, nodes)), 1).astype(np.float32)
    points = rng.uniform(0, 224, (images, parts, 2)).astype(np.float32)
    points[rng.random((images, parts)) < hidden] = np.nan
    return positions, scores, points


def selected(scores: np.ndarray, visible: np.ndarray, top: int, selection: str) -> list[int]:
    """The images of one node and part: scores [n] and visible [n] may hold an image several times."""
    ranked = [i for i in np.argsort(-scores, kind="stable") if scores[i] > 0]
    if selection == "visible":
        return [i for i in ranked if visible[i]][:top]
    return [i for i in ranked[:top] if visible[i]]


def deviations(
    positions: np.ndarray, scores: np.ndarray, points: np.ndarray, diagonal: float, top: int, selection: str
) -> np.ndarray:
    """D [F, P]."""
    result = np.full((scores.shape[1], points.shape[1]), np.nan)
    for f in range(scores.shape[1]):
        for k in range(points.shape[1]):
            images = selected(scores[:, f], ~np.isnan(points[:, k, 0]), top, selection)
            distances = [np.hypot(*(positions[i, f].astype(float) - points[i, k])) / diagonal for i in images]
            if len(distances) > 1:
                result[f, k] = np.std(distances, ddof=1)
    return result


def best(scores: np.ndarray, top: int, nodes: int) -> list[int]:
    mean = [np.mean(np.sort(column.astype(float))[::-1][:top]) for column in scores.T]
    return sorted(sorted(range(len(mean)), key=lambda f: (-round(mean[f], 9), f))[:nodes])
