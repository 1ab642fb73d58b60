"""edge_scores below torch: nothing is trusted, as a wrong pointer must not be reached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conelens import _native

core: Any = _native.cpu().module


def arrays() -> dict[str, np.ndarray]:
    shapes = {"displacement": (2, 3, 2), "weight": (2, 3), "parent": (2, 5, 2), "bandwidth": (3,), "out": (3, 5)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_takes_arrays() -> None:
    good = arrays()
    core.edge_scores(*good.values(), 1)
    assert (good["out"] == 2).all()
    core.edge_scores(*(good | {"bandwidth": None}).values(), 1)
    assert (good["out"] == 0).all()
    empty = arrays() | {"displacement": np.ones((0, 3, 2), np.float32), "weight": np.ones((0, 3), np.float32)}
    empty["parent"] = np.ones((0, 5, 2), np.float32)
    core.edge_scores(*empty.values(), 1)
    assert (empty["out"] == 0).all()


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("displacement", np.ones((2, 3), np.float32), "displacement has shape .*wanted 3 axes"),
        ("displacement", np.ones((2, 3, 3), np.float32), r"displacement has shape \[2, 3, 3\], wanted \[2, 3, 2\]"),
        ("weight", np.ones((3, 2), np.float32).T, "weight must be contiguous"),
        ("parent", np.ones((1, 5, 2), np.float32), r"parent has shape \[1, 5, 2\], wanted \[2, 5, 2\]"),
        ("bandwidth", np.ones(3, np.float64), "bandwidth has DLPack dtype 2:64"),
        ("out", np.ones((5, 3), np.float32), r"out has shape \[5, 3\], wanted \[3, 5\]"),
    ],
)
def test_arguments_are_checked_once_more(name: str, replacement: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core.edge_scores(*(arrays() | {name: replacement}).values(), 1)


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(RuntimeError, match="unsupported dtype"):
        core.edge_scores(*(x.astype(np.float16) for x in arrays().values()), 1)
    frozen = arrays()
    frozen["out"].flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        core.edge_scores(*frozen.values(), 1)
