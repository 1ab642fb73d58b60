"""graph_e_step against plain loops and SciPy, and its rules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from conelens.kernels.graph_e_step import reference
from conelens.ops.graph_e_step import EStep

pytestmark = pytest.mark.usefixtures("two_threads")

GRID = (7.5, 3.0, 16.0, 11.0)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Inputs = dict[str, Any]


def inputs(
    images: int, channels: int, height: int, width: int, nodes: int, dtype: torch.dtype = torch.float64, *, seed: int = 0,
    shifted: bool = True, lit: float = 0.7,
) -> Inputs:  # fmt: skip
    """Random activity, `lit` of it positive, and nodes in and around the map; all but features in their real dtype."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    size = torch.tensor([height * GRID[2], width * GRID[3]], dtype=torch.float64)
    return {
        "features": (random(images, channels, height, width) - (1 - lit)).mul(3).to(dtype),
        "mean": (random(channels, nodes, 2) * size).to(real),
        "shift": ((random(images, channels, nodes, 2) - 0.5) * 0.4 * size).to(real) if shifted else None,
        "sigma": ((0.25 + random(channels, nodes)) * float(size.max()) * 0.4).to(real),
        "weight": random(images, channels, nodes).to(real),
        "tau": random(images).mul(0.2).to(real),
    }


def run(given: Inputs, backend: str = "compiled", **options: Any) -> Any:
    with ops.use_backend(backend):
        return ops.graph_e_step(*given.values(), grid=GRID, **options)


def wide(given: Inputs) -> Inputs:
    return {name: x if x is None else x.double() for name, x in given.items()}


def by_hand(given: Inputs) -> tuple[np.ndarray, ...]:
    """One cell and one node after the other, in float64: mass, first, second, log-likelihood, position, score."""
    x = {name: None if v is None else v.double().numpy() for name, v in given.items()}
    features, sigma = x["features"], x["sigma"]
    images, channels, _, width = features.shape
    nodes = sigma.shape[1]
    mass, second, score = (np.zeros((images, channels, nodes)) for _ in range(3))
    first, likelihood = np.zeros((images, channels, nodes, 2)), np.zeros((images, channels))
    position = np.full((images, channels, nodes), -1)
    for i, d, a, b in np.ndindex(features.shape):
        activity = max(features[i, d, a, b], 0.0)
        if activity == 0:
            continue
        off = np.array([GRID[0] + GRID[2] * a, GRID[1] + GRID[3] * b]) - x["mean"][d]
        if x["shift"] is not None:
            off = off - x["shift"][i, d]
        density = np.array([x["weight"][i, d, k] * math.exp(-(off[k] @ off[k]) / (2 * sigma[d, k] ** 2)) for k in range(nodes)])
        total = density.sum() + x["tau"][i]
        likelihood[i, d] += activity * math.log(total)
        for k in range(nodes):
            owned = activity * density[k] / total
            mass[i, d, k] += owned
            first[i, d, k] += owned * off[k]
            second[i, d, k] += owned * (off[k] @ off[k])
            if activity * density[k] > score[i, d, k]:
                score[i, d, k], position[i, d, k] = activity * density[k], a * width + b
    return mass, first, second, likelihood, position, score


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    """Relative 2-norm of every result; positions exactly. NaN never passes."""
    for name, a, b in zip(EStep._fields, found, wanted):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert a.shape == b.shape, name
        if name == "position":
            assert torch.equal(a.long(), b.long())
            continue
        scale = float(b.double().norm())
        error = float((a.double() - b.double()).norm())
        assert error <= tolerance * scale, f"{name} is {error / scale if scale else error:.1e} off"


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "shared"])
def test_equals_loops_in_float64(backend: str, shifted: bool, isa: str) -> None:
    for seed, shape in enumerate([(2, 3, 5, 7, 4), (1, 2, 8, 3, 1), (3, 1, 1, 1, 2), (1, 2, 9, 17, 11)]):
        given = inputs(*shape, seed=seed, shifted=shifted)
        assert_close(run(given, backend, argmax=True), by_hand(given), 1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_separable_equals_dense_in_float64(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, most), label=name) for name, most in zip("IDHWK", (3, 3, 20, 40, 45))]
    given = inputs(
        *shape,
        seed=data.draw(st.integers(0, 99)),
        shifted=data.draw(st.booleans()),
        lit=data.draw(st.sampled_from([0.02, 0.3, 1.0])),
    )
    assert_close(run(given, argmax=True), run(given, "reference", argmax=True), 1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_on_every_instruction_set(dtype: torch.dtype, isa: str) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # centres are rounded to float32, too
    shapes = [(2, 3, 14, 14, 20), (1, 2, 28, 28, 40), (2, 2, 7, 7, 6), (1, 1, 3, 70, 33), (1, 1, 70, 2, 3)]
    for seed, shape in enumerate(shapes):
        given = inputs(*shape, dtype, seed=seed, shifted=seed % 2 == 0)
        found = run(given, argmax=True)
        assert {x.dtype for x in found} == {given["mean"].dtype, torch.int32}
        assert_close(found, run(wide(given), "reference", argmax=True), tolerance)
        for a, b in zip(run(given), found):
            assert b is found[4] or b is found[5] or torch.equal(a, b), "the arg-max changes other results"


def test_responsibilities_of_scipys_normal_densities() -> None:
    """Each node a bivariate normal of prior weight * 2 pi sigma^2, Bayes' rule against them and the noise."""
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
    given = inputs(1, 1, 6, 8, 3, shifted=False, lit=1.0)
    mean, sigma, weight = (given[name].numpy().reshape(3, -1) for name in ("mean", "sigma", "weight"))
    y, x = np.indices((6, 8)).reshape(2, -1)
    cells = np.stack([GRID[0] + GRID[2] * y, GRID[1] + GRID[3] * x], 1)
    priors = (weight * 2 * math.pi * sigma**2)[:, 0]
    density = np.stack([stats.multivariate_normal(m, s[0] ** 2 * np.eye(2)).pdf(cells) for m, s in zip(mean, sigma)], 1)
    joint = priors * density
    activity = given["features"].clamp(min=0).flatten().numpy()
    share = activity[:, None] * joint / (joint.sum(1) + float(given["tau"][0]))[:, None]
    off = cells[:, None] - mean
    found = run(given)
    np.testing.assert_allclose(found.mass[0, 0], share.sum(0), rtol=1e-11)
    np.testing.assert_allclose(found.first[0, 0], np.einsum("ck,cka->ka", share, off), rtol=1e-9)
    np.testing.assert_allclose(found.second[0, 0], np.einsum("ck,cka->k", share, off**2), rtol=1e-11)


def test_log_likelihood_of_scipy() -> None:
    special = pytest.importorskip("scipy.special", reason="needs SciPy")
    given = inputs(2, 2, 5, 9, 6)
    given["tau"].zero_()
    y, x = np.indices((5, 9))
    cells = np.stack([GRID[0] + GRID[2] * y, GRID[1] + GRID[3] * x], -1)[..., None, :]
    off = cells - (given["mean"] + given["shift"]).numpy()[:, :, None, None]
    exponent = -(off**2).sum(-1) / (2 * given["sigma"].numpy() ** 2)[:, None, None]
    log_total = special.logsumexp(exponent, axis=-1, b=given["weight"].numpy()[:, :, None, None])
    expected = (given["features"].clamp(min=0).numpy() * log_total).sum((2, 3))
    np.testing.assert_allclose(run(given).log_likelihood, expected, rtol=1e-12)


def test_mass_is_all_activity_but_the_noise_share(isa: str) -> None:
    given = inputs(2, 3, 14, 14, 20, torch.float32)
    given["tau"].zero_()
    torch.testing.assert_close(run(given).mass.sum(-1), given["features"].clamp(min=0).sum((2, 3)))
    given["tau"].fill_(1e30)
    assert float(run(given).mass.max()) < 1e-25


def test_only_cells_with_activity_count(isa: str) -> None:
    given = inputs(1, 4, 14, 19, 5, torch.float32)
    given["features"].fill_(-1)
    given["features"][0, 1, 3, 17] = 2
    given["features"][0, 2, 13, 0], given["features"][0, 2, 13, 18] = 1, 0.5
    given["features"][0, 3] = 0
    found = run(given, argmax=True)
    assert_close(found, run(wide(given), "reference", argmax=True), 1e-6)
    for channel in (0, 3):
        assert all(not x[0, channel].any() for x in (*found[:4], found.score))
        assert (found.position[0, channel] == -1).all()
    assert (found.position[0, 1] == 3 * 19 + 17).all()


def test_a_node_seen_nowhere(isa: str) -> None:
    given = inputs(1, 2, 6, 6, 4, torch.float32)
    given["weight"][0, 0, 2] = 0
    given["mean"][1, 3] = 1e6
    found = run(given, argmax=True)
    for channel, node in ((0, 2), (1, 3)):
        assert found.position[0, channel, node] == -1
        assert found.score[0, channel, node] == found.mass[0, channel, node] == 0
    assert (found.position >= 0).sum() == 6


def test_first_of_equal_cells_wins(isa: str) -> None:
    """A node in the middle of a flat map is as near to two or to four cells."""
    features = torch.ones(1, 1, 8, 20)
    centre = torch.tensor([[3.5, 10.5], [4, 2.5]]) * torch.tensor(GRID[2:]) + torch.tensor(GRID[:2])
    given = (features, centre[None], None, torch.full((1, 2), 50.0), torch.ones(1, 1, 2), 0.1)
    for backend in ("compiled", "reference"):
        with ops.use_backend(backend):
            position = ops.graph_e_step(*given, grid=GRID, argmax=True).position
        assert position is not None
        assert position[0, 0].tolist() == [3 * 20 + 10, 4 * 20 + 2]


def test_nan_stays_visible_in_its_channel(isa: str) -> None:
    given = inputs(2, 3, 9, 11, 21, torch.float32)
    clean = run(given, argmax=True)
    given["features"][0, 1, 4, 7] = given["features"][0, 1, 5, 0] = math.nan
    found = run(given, argmax=True)
    for name, a, b in zip(found._fields, found, clean):
        if name == "position":
            assert (a[0, 1] == 4 * 11 + 7).all()
        else:
            assert a[0, 1].isnan().all(), name
        mask = torch.ones(2, 3, dtype=torch.bool)
        mask[0, 1] = False
        assert torch.equal(a[mask], b[mask])
    given = inputs(1, 2, 5, 5, 3, torch.float32)
    given["weight"][0, 1, 2] = math.nan
    found = run(given, argmax=True)
    assert found.mass[0, 1, 2].isnan() and found.log_likelihood[0, 1].isnan() and found.score[0, 1, 2].isnan()
    assert not found.mass[0, 0].isnan().any() and not found.log_likelihood[0, 0].isnan()


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_a_lit_cell_out_of_everyones_reach(backend: str) -> None:
    given = inputs(1, 1, 4, 40, 2, torch.float32, shifted=False, lit=1.0)
    given["tau"].zero_()
    given["mean"][:], given["sigma"][:] = torch.tensor([7.5, 3.0]), 8.0
    found = run(given, backend)
    assert found.log_likelihood.item() == -math.inf
    assert all(x.isfinite().all() for x in found[:3])
    near = given["features"][:, :, :, :10].clamp(min=0)
    assert 0 < float(found.mass.sum()) <= float(near.sum()) * 1.0001


def test_large_activity_stays_exact_and_huge_sums_are_infinite() -> None:
    given = inputs(1, 1, 7, 7, 3, torch.float32)
    given["features"] *= 1e30
    assert_close(run(given)[:4], run(wide(given), "reference")[:4], 1e-5)
    given["weight"].fill_(3e38)
    given["mean"][:], given["shift"][:], given["sigma"][:] = 50.0, 0.0, 1e4
    assert run(given).log_likelihood.item() == math.inf


def test_any_strides() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(2, 6, 10, 12, 5, dtype)
        wanted = run(given, argmax=True)
        large = torch.full((2, 6, 12, 16), math.nan, dtype=dtype)
        large[:, :, 1:11, 2:14] = given["features"]
        for view in (
            given["features"].contiguous(memory_format=torch.channels_last),
            large[:, :, 1:11, 2:14],
            given["features"].transpose(2, 3).contiguous().transpose(2, 3),
            given["features"].transpose(0, 1).contiguous().transpose(0, 1),
        ):
            spread = {name: None if x is None else torch.stack([x, x], -1)[..., 0] for name, x in given.items()}
            found = run({**spread, "features": view}, argmax=True)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_expanded_weight_and_a_number_for_tau() -> None:
    given = inputs(3, 2, 6, 6, 4, torch.float32)
    given["weight"], given["tau"] = torch.tensor(0.3).expand(3, 2, 4), 0.25
    found = run(given)
    given["weight"], given["tau"] = torch.full((3, 2, 4), 0.3), torch.full((3,), 0.25)
    assert all(torch.equal(a, b) for a, b in zip(found[:4], run(given)[:4]))


def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    for shifted in (True, False):
        given = inputs(3, 40, 14, 14, 20, torch.float32, shifted=shifted)
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(given, argmax=True))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_denormal_numbers_are_still_there_afterwards() -> None:
    run(inputs(1, 1, 4, 4, 2, torch.float32))
    assert float(torch.tensor(1e-40) * 0.5) > 0


def test_out_is_written_and_returned() -> None:
    given = inputs(2, 3, 6, 7, 5, torch.float32)
    wanted = run(given, argmax=True)
    for out in (
        tuple(torch.full_like(x, -7) for x in wanted),
        tuple(torch.full((*x.shape, 2), -7, dtype=x.dtype)[..., 0] for x in wanted),
    ):
        found = run(given, argmax=True, out=out)
        assert all(a is b for a, b in zip(found, out))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
        four = run(given, out=out[:4])
        assert four.position is None and four.score is None
        assert all(torch.equal(a, b) for a, b in zip(four[:4], wanted))


def test_empty_batch() -> None:
    for shape in ((0, 3, 4, 4, 2), (2, 0, 4, 4, 2), (2, 3, 4, 4, 0)):
        found = run(inputs(*shape, torch.float32), argmax=True)
        assert found.first.shape == (shape[0], shape[1], shape[4], 2)
        assert found.log_likelihood.shape == shape[:2]


def test_numpy_in_numpy_out() -> None:
    given = inputs(2, 2, 5, 6, 3, torch.float32)
    arrays = [None if x is None else x.numpy() for x in given.values()]
    with ops.require_kernels():
        found = ops.graph_e_step(*arrays, grid=GRID)
    assert isinstance(found.mass, np.ndarray) and found.position is None
    np.testing.assert_array_equal(found.second, run(given).second)


def test_opcheck() -> None:
    given = inputs(2, 2, 5, 6, 3, torch.float32)
    for argmax in (False, True):
        torch.library.opcheck(torch.ops.conelens.graph_e_step.default, (*given.values(), list(GRID), argmax))


@pytest.mark.parametrize("argmax", [False, True])
def test_compiles_without_a_break(argmax: bool) -> None:
    given = inputs(2, 2, 5, 6, 3, torch.float32)

    def step(features: Tensor) -> Any:
        return ops.graph_e_step(**{**given, "features": features + 1}, grid=GRID, argmax=argmax)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(given["features"]), step(given["features"])):
        assert a is b is None or torch.equal(a, b)


def test_there_is_no_gradient_and_that_is_said() -> None:
    given = inputs(1, 1, 3, 3, 2)
    found = run({**given, "mean": given["mean"].requires_grad_()})
    with pytest.raises(NotImplementedError, match="graph_e_step has no gradient"):
        found.mass.sum().backward()
    with pytest.raises(ArgumentError, match="out= cannot be differentiated"):
        run(given, out=tuple(torch.zeros_like(x) for x in found[:4]))


def test_the_reference_is_differentiable() -> None:
    given = inputs(1, 1, 3, 3, 2)
    given["mean"].requires_grad_()
    mass, first, _, likelihood, *_ = reference.graph_e_step(*given.values(), GRID, False)
    likelihood.sum().backward()
    # d log p / d mean = (p - c) / sigma^2, summed over what the node owns
    torch.testing.assert_close(given["mean"].grad, (first[0] / given["sigma"][..., None] ** 2).detach())
    assert mass.requires_grad


def without(name: str, value: Any) -> Inputs:
    return {**inputs(2, 3, 4, 5, 6, torch.float32), name: value}


@pytest.mark.parametrize(
    ("message", "given", "options"),
    [
        (r"features must be \[N,C,H,W\]", without("features", torch.zeros(3, 4, 5)), {}),
        ("features must be float32", without("features", torch.zeros(2, 3, 4, 5, dtype=torch.int32)), {}),
        ("features has no cells", without("features", torch.zeros(2, 3, 0, 5)), {}),
        (r"sigma must be a tensor \[D,K\]", without("sigma", 3.0), {}),
        (r"sigma must have shape \[3, 5\]|mean must have shape \[3, 5, 2\]", without("sigma", torch.ones(3, 5)), {}),
        (r"mean must have shape \[3, 6, 2\], got \[3, 6\]", without("mean", torch.ones(3, 6)), {}),
        (r"mean must be torch.float32, got torch.float64", without("mean", torch.ones(3, 6, 2, dtype=torch.float64)), {}),
        (r"shift must have shape \[2, 3, 6, 2\]", without("shift", torch.ones(3, 6, 2)), {}),
        (r"weight must have shape \[2, 3, 6\]", without("weight", torch.ones(3, 6)), {}),
        ("weight must be a tensor or a DLPack array, got float", without("weight", 1.0), {}),
        (r"tau must have shape \[2\]", without("tau", torch.ones(3)), {}),
        ("tau must be a tensor or a DLPack array, got str", without("tau", "0.1"), {}),
        ("sigma must be positive, got 0.0", without("sigma", torch.zeros(3, 6)), {}),
        ("sigma must be positive, got nan", without("sigma", torch.full((3, 6), math.nan)), {}),
        (r"tau must be at least 0, got -0.5", without("tau", -0.5), {}),
        (r"grid must be four finite numbers \(y0, x0, dy, dx\), got \(1, 2\)", without("tau", 0.1), {"grid": (1, 2)}),
        ("grid must be four finite numbers", without("tau", 0.1), {"grid": (0, 0, 1, math.inf)}),
        (r"out must be \(mass, first, second, log_likelihood\), got Tensor", without("tau", 0.1), {"out": torch.zeros(1)}),
        (r"out must be .*position, score\), got tuple of 1", without("tau", 0.1), {"out": (torch.zeros(1),), "argmax": True}),
        (r"out\[0\] must have shape \[2, 3, 6\]", without("tau", 0.1), {"out": (torch.zeros(1),) * 4}),
    ],
)
def test_bad_input_is_named(message: str, given: Inputs, options: dict[str, Any]) -> None:
    for backend in ("compiled", "reference"):
        with ops.use_backend(backend), pytest.raises(ArgumentError, match=message):
            ops.graph_e_step(*given.values(), **{"grid": GRID, **options})


def test_the_reference_takes_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    generator = torch.Generator().manual_seed(0)
    arguments = (
        torch.rand(5, 2, 4, 3, generator=generator),
        torch.rand(2, 3, 2, generator=generator) * 9,
        torch.rand(5, 2, 3, 2, generator=generator),
        torch.rand(2, 3, generator=generator) + 1,
        torch.rand(5, 2, 3, generator=generator),
        torch.rand(5, generator=generator),
    )
    with ops.use_backend("reference"):
        whole = ops.graph_e_step(*arguments, grid=(1, 2, 3, 4), argmax=True)
        monkeypatch.setattr(import_module("conelens.ops.graph_e_step"), "_REFERENCE_CELLS", 150)  # two images
        parts = ops.graph_e_step(*arguments, grid=(1, 2, 3, 4), argmax=True)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
