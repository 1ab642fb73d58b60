"""Occlusion sweeps (Zeiler & Fergus 2014, §4.2): which parts of an image an output depends on."""

from conelens.occlusion.plan import SweepPlan, plan_occlusion
from conelens.occlusion.run import occlude
from conelens.occlusion.sweep import Activity, Sweep, SweepInterrupted
from conelens.occlusion.windows import Windows, make_windows
from conelens.occlusion.zeiler import ZeilerFergus, panels_of, record_strongest, zeiler_fergus

__all__ = [
    "Activity",
    "Sweep",
    "SweepInterrupted",
    "SweepPlan",
    "Windows",
    "ZeilerFergus",
    "make_windows",
    "occlude",
    "panels_of",
    "plan_occlusion",
    "record_strongest",
    "zeiler_fergus",
]
