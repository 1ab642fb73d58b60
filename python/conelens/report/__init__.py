"""Montages of units and self-contained reports."""

from __future__ import annotations

from conelens.report.page import Figure, Page, Section, Table, safe_name, write_figures, write_page
from conelens.report.units import PictureDataset, Winners, pick, winners
from conelens.report.workbench import Workbench, diagram_nodes, open_workbench

__all__ = [
    "Figure",
    "Page",
    "PictureDataset",
    "Section",
    "Table",
    "Winners",
    "Workbench",
    "diagram_nodes",
    "open_workbench",
    "pick",
    "safe_name",
    "winners",
    "write_figures",
    "write_page",
]
