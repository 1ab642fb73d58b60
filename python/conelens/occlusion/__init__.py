"""Occlusion sweeps (Zeiler & Fergus 2014, §4.2): which parts of an image an output depends on."""

from conelens.occlusion.run import occlude
from conelens.occlusion.sweep import Activity, Sweep, SweepInterrupted
from conelens.occlusion.windows import Windows, make_windows

__all__ = ["Activity", "Sweep", "SweepInterrupted", "Windows", "make_windows", "occlude"]
