"""The release's domain: points in a window over smoothed activity, against loops; its noise level; its memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conelens.explanatory.features import Grid
from conelens.explanatory.fit import first_layer_state
from conelens.explanatory.lattice import lattice_mass, lattice_step
from conelens.explanatory.rules import FORMS

GRID = Grid((3.5, 1.5), (8.0, 4.0), (12, 9))


def problem(shifted: bool = True) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    features = (draw(3, 2, *GRID.size) - 0.5).clamp(min=0)
    features[1, 0] = 0
    mean = draw(2, 4, 2) * torch.tensor([96.0, 36.0])
    shift = 30 * (draw(3, 2, 4, 2) - 0.5) if shifted else None
    return features, mean, shift, 4 + 6 * draw(2, 4), draw(3, 2, 4), 0.01 + draw(3), GRID, 1 + 8 * draw(2, 4)


@pytest.mark.parametrize("shifted", [True, False])
def test_points_are_those_of_the_release_without_its_errors(shifted: bool) -> None:
    features, mean, shift, sigma, weight, tau, _, spread = problem(shifted)
    mass, first, second, _, positions, scores = lattice_step(features, mean, shift, sigma, weight, tau, GRID, spread)
    y = GRID.start[0] + GRID.step[0] * np.arange(-30, 42)
    x = GRID.start[1] + GRID.step[1] * np.arange(-30, 39)
    for i, d, k in np.ndindex(3, 2, 4):
        centres = (mean[d] + (0 if shift is None else shift[i, d])).numpy()
        half = [
            max(1, round(min(0.3 * cells / 2, 3 * float(spread[d, k]) / step))) * step
            for cells, step in zip(GRID.size, GRID.step, strict=True)
        ]
        middles = np.array([-5, -3, -1, 1, 3, 5]) / 6  # the middles of six bins of the window
        owned, offsets, seen = [], [], []
        for down in middles * half[0]:
            for across in middles * half[1]:
                point = centres[k] + (down, across)
                along = [
                    np.exp(-(((p - c) / s) ** 2) / (2 * (0.025 * n) ** 2))
                    for p, c, s, n in zip(point, (y, x), GRID.step, GRID.size, strict=True)
                ]
                endless = np.zeros((len(y), len(x)))
                endless[30:42, 30:39] = features[i, d].numpy()
                activity = along[0] @ endless @ along[1] / (along[0].sum() * along[1].sum())
                density = weight[i, d].numpy() * np.exp(-((centres - point) ** 2).sum(1) / (2 * sigma[d].numpy() ** 2))
                owned.append(activity * density[k] / (density.sum() + float(tau[i])))
                seen.append(activity * density[k])
                offsets.append((down, across))
        q, r = np.array(owned), np.array(offsets)
        assert float(mass[i, d, k]) == pytest.approx(q.sum(), rel=1e-9, abs=1e-14)
        np.testing.assert_allclose(first[i, d, k], q @ r, rtol=1e-9, atol=1e-12)
        assert float(second[i, d, k]) == pytest.approx(q @ (r**2).sum(1), rel=1e-9, abs=1e-12)
        assert float(scores[i, d, k]) == pytest.approx(max(seen), rel=1e-9, abs=1e-14)
        where = centres[k] + r[int(np.argmax(seen))] * (max(seen) > 0)
        np.testing.assert_allclose(positions[i, d, k], where, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("side", "nodes", "noise"), [(28, 40, 0.0246), (14, 20, 0.0983)])
def test_noise_of_the_release_is_a_tenth_of_the_densities_at_its_points(side: int, nodes: int, noise: float) -> None:
    """What its constants come to at the start, per cell (reference §2.7)."""
    grid = Grid((3.5, 3.5), (8.0, 8.0), (side, side))
    layer = first_layer_state("layer", grid, 2, nodes, 0)
    expected = layer.expect(FORMS["release"], 3, None)
    assert expected.tau.tolist() == pytest.approx([noise / 64] * 3, rel=0.01)
    alone = lattice_mass(layer.prior_sigma, layer.sigma, grid) / (2 * math.pi * layer.prior_sigma**2)
    torch.testing.assert_close(expected.tau, 0.1 * alone.mean().expand(3))


def test_blocks_of_images_hold_little_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem()
    whole = lattice_step(*arguments)
    monkeypatch.setattr("conelens.explanatory.lattice._CELLS", 1)
    for one, other in zip(lattice_step(*arguments), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    monkeypatch.undo()

    class Largest(TorchDispatchMode):
        cells = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.cells = max(self.cells, out.numel())
            return out

    grid = Grid((3.5, 3.5), (8.0, 8.0), (14, 14))
    layer = first_layer_state("layer", grid, 64, 40, 0)
    with Largest() as largest:
        layer.find(torch.rand(16, 64, 14, 14), layer.expect(FORMS["release"], 16, None), FORMS["release"], argmax=True)
    assert largest.cells <= 1 << 23  # of 6 x 40 x 40 x 64 x 16, which is nine million
