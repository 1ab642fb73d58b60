"""collapse_parents below torch: nothing is trusted, as a wrong pointer must not be reached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conelens import _native

core: Any = _native.cpu().module
Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    return {
        "displacement": np.ones((2, 5, 2), np.float32),
        "sigma": np.ones(5, np.float32),
        "edges": np.zeros((3, 4), np.int64),
        "shift": np.full((2, 3, 2), 9, np.float32),
        "sigma_out": np.full(3, 9, np.float32),
        "log_agreement": np.full((2, 3), 9, np.float32),
    }


def test_takes_arrays_and_names_no_parent_that_is_not_there() -> None:
    good = arrays()
    assert core.collapse_parents(*good.values(), 1) is True
    assert (good["shift"] == 1).all() and (good["sigma_out"] == 1).all() and (good["log_agreement"] == 0).all()
    for wrong in (5, -1, 2**62):
        bad = arrays()
        bad["edges"][2, 3] = wrong
        assert core.collapse_parents(*bad.values(), 1) is False  # the caller names it
        assert all((bad[name] == 9).all() for name in ("shift", "sigma_out", "log_agreement"))


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("displacement", np.ones((2, 5), np.float32), "displacement has shape .*wanted 3 axes"),
        ("displacement", np.ones((2, 5, 2), np.float16), "sigma has DLPack dtype 2:32"),
        ("displacement", np.ones((2, 2, 5), np.float32).transpose(0, 2, 1), "displacement must be contiguous"),
        ("sigma", np.ones(4, np.float32), r"sigma has shape \[4\], wanted \[5\]"),
        ("edges", np.zeros((3, 4), np.int16), "edges has DLPack dtype 0:16"),
        ("edges", np.zeros((4, 3), np.int64).T, "edges must be contiguous"),
        ("shift", np.ones((2, 3, 1), np.float32), r"shift has shape \[2, 3, 1\], wanted \[2, 3, 2\]"),
        ("log_agreement", np.ones((2, 3), np.float64), "log_agreement has DLPack dtype 2:64"),
    ],
)
def test_arguments_are_checked_once_more(name: str, replacement: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core.collapse_parents(*(arrays() | {name: replacement}).values(), 1)


def test_what_cannot_be_run_is_refused() -> None:
    none = arrays() | {"edges": np.zeros((3, 0), np.int64)}
    with pytest.raises(RuntimeError, match="invalid argument"):
        core.collapse_parents(*none.values(), 1)
    halves = {name: x if name == "edges" else x.astype(np.float16) for name, x in arrays().items()}
    with pytest.raises(RuntimeError, match="unsupported dtype"):
        core.collapse_parents(*halves.values(), 1)
    frozen = arrays()
    frozen["shift"].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        core.collapse_parents(*frozen.values(), 1)
