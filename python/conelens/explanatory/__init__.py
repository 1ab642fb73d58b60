"""The explanatory graph of a network: learned, inferred, drawn, evaluated."""

from __future__ import annotations

from conelens.explanatory.features import Features, Grid, grid_of
from conelens.explanatory.graph import ExplanatoryGraph, FitInterrupted
from conelens.explanatory.layer import GraphLayer, Placement
from conelens.explanatory.rules import FORMS, Rules

__all__ = ["FORMS", "ExplanatoryGraph", "Features", "FitInterrupted", "GraphLayer", "Grid", "Placement", "Rules", "grid_of"]
