"""How good a graph's nodes are as parts: metrics of detectors, with controls and intervals."""

from __future__ import annotations

from conelens.explanatory.evaluate.bootstrap import (
    Interval,
    draws,
    interval,
    mean_over_images,
    paired_difference,
    resampled_instability,
)
from conelens.explanatory.evaluate.detectors import Detector, constant_position, raw_filters, without_evidence
from conelens.explanatory.evaluate.instability import Instability, instability
from conelens.explanatory.evaluate.purity import Purity, purity_of_maps, purity_of_nodes

__all__ = [
    "Detector",
    "Instability",
    "Interval",
    "Purity",
    "constant_position",
    "draws",
    "instability",
    "interval",
    "mean_over_images",
    "paired_difference",
    "purity_of_maps",
    "purity_of_nodes",
    "raw_filters",
    "resampled_instability",
    "without_evidence",
]
