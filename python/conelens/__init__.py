"""conelens shows what the units of a convolutional network look at.

One unit of a network sees one receptive-field cone; conelens computes that cone, and nothing else, exactly.
Importing this package costs nothing: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "ops": "conelens.ops",
    "capabilities": "conelens._capabilities",
    "trace": "conelens.network",
    "Network": "conelens.network",
    "project": "conelens.projection",
    "PeakTable": "conelens.peaks",
    "top_peaks": "conelens.peaks",
    "occlude": "conelens.occlusion",
    "plan_occlusion": "conelens.occlusion",
    "make_windows": "conelens.occlusion",
    "Windows": "conelens.occlusion",
    "Activity": "conelens.occlusion",
    "Sweep": "conelens.occlusion",
    "SweepInterrupted": "conelens.occlusion",
    "zeiler_fergus": "conelens.occlusion",
    "ZeilerFergus": "conelens.occlusion",
    "correspondence": "conelens.occlusion.correspondence",
    "Correspondence": "conelens.occlusion.correspondence",
    "ExplanatoryGraph": "conelens.explanatory",
    "Features": "conelens.explanatory",
    "FitInterrupted": "conelens.explanatory",
    "Interrupted": "conelens.peaks",
    "ConelensError": "conelens.errors",
    "ArgumentError": "conelens.errors",
    "UnsupportedOperatorError": "conelens.errors",
    "TraceError": "conelens.errors",
    "LayerError": "conelens.errors",
    "BackendError": "conelens.errors",
    "DataError": "conelens.errors",
    "CheckpointError": "conelens.errors",
    "DeadUnitWarning": "conelens.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    module_name = _EXPORTS.get(name)
    if module_name is None:
        raise AttributeError(f"module 'conelens' has no attribute {name!r}")
    module = importlib.import_module(module_name)
    value = module if name == "ops" else getattr(module, name)
    # a submodule of the same name was just bound here by the import system: the public name wins
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
