"""collapse_parents against plain loops and against the product of Gaussians itself, and its rules."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from conelens.ops.collapse_parents import CollapsedParents
from tests.kit.compare import assert_same, packed_in_guards

pytestmark = pytest.mark.usefixtures("two_threads")

BACKENDS = ("compiled", "reference")
DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
Results = tuple[Tensor, Tensor, Tensor]


def oracle(displacement: Tensor, sigma: Tensor, edges: Tensor) -> Results:
    """One node, image and axis after the other, in Python's floats, with exact sums."""
    images, nodes = displacement.shape[0], edges.shape[0]
    shift, scale = torch.zeros(images, nodes, 2, dtype=torch.float64), torch.zeros(nodes, dtype=torch.float64)
    agreement = torch.zeros(images, nodes, dtype=torch.float64)
    for v, parents in enumerate(edges.tolist()):
        weights = [1 / float(sigma[u]) ** 2 for u in parents]
        total = math.fsum(weights)
        scale[v] = 1 / math.sqrt(total / len(parents))
        for i in range(images):
            moved = [displacement[i, u].tolist() for u in parents]
            mean = [math.fsum(w * d[axis] for w, d in zip(weights, moved, strict=True)) / total for axis in (0, 1)]
            squares = [w * ((d[0] - mean[0]) ** 2 + (d[1] - mean[1]) ** 2) for w, d in zip(weights, moved, strict=True)]
            shift[i, v] = torch.tensor(mean, dtype=torch.float64)
            agreement[i, v] = -0.5 * math.fsum(squares) / len(parents)
    return shift, scale, agreement


def problem(
    images: int, parents: int, nodes: int, degree: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    displacement = 20 * torch.randn(images, parents, 2, generator=generator, dtype=torch.float64)
    sigma = 1 + 9 * torch.rand(parents, generator=generator, dtype=torch.float64)
    edges = torch.randint(0, parents, (nodes, degree), generator=generator)
    return displacement.to(dtype), sigma.to(dtype), edges


def assert_close(found: Results, wanted: Results, tolerance: float) -> None:
    for name, a, b in zip(CollapsedParents._fields, found, wanted, strict=True):
        assert a.shape == b.shape, name
        apart = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        assert apart <= tolerance * max(1e-10, float(b.abs().max()) if b.numel() else 0.0), f"{name} differs by {apart:.1e}"


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_loops(dtype: torch.dtype, backend: str, isa: str) -> None:
    random = Random(0)
    sizes = [(1, 1, 1, 1), (16, 8, 16, 15), (17, 40, 33, 2), (5, 3, 50, 15)]
    sizes += [tuple(random.randint(1, most) for most in (40, 30, 30, 17)) for _ in range(6)]
    for seed, size in enumerate(sizes):
        displacement, sigma, edges = problem(*size, dtype=dtype, seed=seed)
        wanted = oracle(displacement, sigma, edges)
        for index in (torch.int32, torch.int64):
            with ops.use_backend(backend):
                assert_close(ops.collapse_parents(displacement, sigma, edges.to(index)), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_product_of_the_parents_gaussians(backend: str) -> None:
    """On a grid: the M-th root of the product of SciPy's densities is the collapsed Gaussian times its factor."""
    stats = pytest.importorskip("scipy.stats")
    displacement, sigma, edges = problem(3, 20, 4, 7, torch.float64)
    with ops.use_backend(backend):
        shift, collapsed, agreement = ops.collapse_parents(displacement / 4, sigma, edges)
    mean = torch.tensor([100.0, 60.0], dtype=torch.float64)  # of every node
    axis = np.linspace(-30, 30, 13)
    grid = mean.numpy() + np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    for i in range(3):
        for v, parents in enumerate(edges.tolist()):
            places = [(mean + displacement[i, u] / 4).numpy() for u in parents]
            normals = zip(places, sigma[parents].tolist(), strict=True)
            product = sum(stats.multivariate_normal(at, s**2).logpdf(grid) for at, s in normals) / len(parents)
            factor = agreement[i, v].item() - float((2 * math.pi * sigma[parents] ** 2).log().mean())
            squares = ((grid - (mean + shift[i, v]).numpy()) ** 2).sum(-1)
            one = factor - squares / (2 * collapsed[v].item() ** 2)
            np.testing.assert_allclose(np.exp(one), np.exp(product), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parents_who_agree_give_their_displacement_and_zero_to_the_bit(dtype: torch.dtype, isa: str) -> None:
    _, sigma, edges = problem(1, 50, 70, 15, dtype)
    for size in (1e-20, 1.0, 1e6, 1e15):
        displacement = (size * torch.randn(20, 1, 2, dtype=torch.float64)).to(dtype).expand(20, 50, 2)
        shift, _, agreement = ops.collapse_parents(displacement, sigma, edges)
        assert torch.equal(shift, displacement[:, :1].expand(20, 70, 2))
        assert not agreement.any()


@pytest.mark.parametrize("middle", [0.0, 1e3, 1e5])
def test_large_displacements_that_nearly_agree_lose_no_digit(middle: float, isa: str) -> None:
    """A spread of a few roundings about a large mean: what the difference of two squares would lose altogether."""
    displacement, sigma, edges = problem(40, 30, 60, 15)
    displacement = (middle + displacement / 100).float()
    _, _, found = ops.collapse_parents(displacement, sigma, edges)
    wanted = oracle(displacement, sigma, edges)[2]
    assert ((found - wanted).abs() <= 1e-6 * wanted.abs()).all()


def test_a_first_parent_far_from_the_others_costs_no_more_digits(isa: str) -> None:
    displacement, sigma, edges = problem(20, 31, 40, 15)
    displacement[:, 30] = 1e4
    sigma[30] = 1e4
    edges = torch.cat([torch.full((40, 1), 30), edges % 30], 1)
    found = ops.collapse_parents(displacement, sigma, edges)
    wanted = oracle(displacement, sigma, edges)
    assert_close(found, wanted, 1e-6)
    assert (found.log_agreement <= 0).all()


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_belongs(backend: str, isa: str) -> None:
    displacement, sigma, edges = problem(20, 10, 30, 3)
    displacement[3, 4, 1] = math.nan
    sigma[7] = math.nan
    with ops.use_backend(backend):
        shift, collapsed, agreement = ops.collapse_parents(displacement, sigma, edges)
    of_place, of_sigma = (edges == 4).any(1), (edges == 7).any(1)
    assert of_place.any() and of_sigma.any()
    assert torch.equal(collapsed.isnan(), of_sigma)
    for i in range(20):
        assert torch.equal(agreement[i].isnan(), of_sigma | (of_place & (i == 3)))
        assert torch.equal(shift[i, :, 0].isnan(), of_sigma)
        assert torch.equal(shift[i, :, 1].isnan(), of_sigma | (of_place & (i == 3)))


def test_an_image_gives_the_same_bits_in_any_company_and_on_any_threads(isa: str) -> None:
    displacement, sigma, edges = problem(37, 50, 300, 15)
    whole = ops.collapse_parents(displacement, sigma, edges)
    for part in (slice(0, 1), slice(5, 21), slice(30, 37)):
        found = ops.collapse_parents(displacement[part], sigma, edges)
        assert torch.equal(found.shift, whole.shift[part]) and torch.equal(found.log_agreement, whole.log_agreement[part])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, ops.collapse_parents(displacement, sigma, edges), whole))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_and_nothing_else(dtype: torch.dtype, backend: str, isa: str) -> None:
    displacement, sigma, edges = problem(19, 13, 37, 4, dtype)
    wanted = oracle(displacement, sigma, edges)
    with packed_in_guards(*(x.to(dtype) for x in wanted)) as views, ops.use_backend(backend):
        found = ops.collapse_parents(displacement, sigma, edges, out=views)
        assert all(a is b for a, b in zip(found, views, strict=True))
        assert_close(found, wanted, TOLERANCE[dtype])
    strided = (torch.zeros(2, 37, 19, dtype=dtype).permute(2, 1, 0), torch.zeros(74, dtype=dtype)[::2])
    with ops.use_backend(backend):
        ops.collapse_parents(displacement, sigma, edges, out=(*strided, views[2]))
    assert_close((*strided, views[2]), wanted, TOLERANCE[dtype])


def test_inputs_of_any_strides() -> None:
    displacement, sigma, edges = problem(6, 11, 9, 3)
    wanted = ops.collapse_parents(displacement, sigma, edges)
    moved = displacement.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    spread, turned = torch.stack([sigma, sigma], 1)[:, 0], edges.t().contiguous().t()
    assert all(map(torch.equal, ops.collapse_parents(moved, spread, turned), wanted))
    with torch.no_grad():
        assert_same(ops.collapse_parents(torch._neg_view(displacement), sigma, edges).shift, -wanted.shift)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    displacement, sigma, edges = problem(4, 5, 6, 3)
    with ops.use_backend(backend):
        for none in (displacement[:0], torch.empty(2, 5, 0).permute(2, 1, 0)):
            found = ops.collapse_parents(none, sigma, edges)
            assert found.shift.shape == (0, 6, 2) and found.log_agreement.shape == (0, 6)
            assert_same(found.sigma, ops.collapse_parents(displacement, sigma, edges).sigma)
        found = ops.collapse_parents(displacement[:, :0], sigma[:0], edges[:0])
        assert [list(x.shape) for x in found] == [[4, 0, 2], [0], [4, 0]]


def test_other_libraries_arrays() -> None:
    displacement, sigma, edges = problem(2, 5, 6, 3)
    found = ops.collapse_parents(displacement.numpy(), sigma.numpy(), edges.numpy())
    assert all(isinstance(x, np.ndarray) for x in found)
    for a, b in zip(found, ops.collapse_parents(displacement, sigma, edges), strict=True):
        np.testing.assert_array_equal(a, b)


# --- torch ----------------------------------------------------------------------------------------


def test_opcheck() -> None:
    args = problem(3, 5, 6, 2)
    operator = torch.ops.conelens.collapse_parents
    torch.library.opcheck(operator.default, args)
    shift, sigma, agreement = ops.collapse_parents(*args)
    torch.library.opcheck(operator.out, args, {"out_shift": shift, "out_sigma": sigma, "out_log_agreement": agreement})


def test_compiles_as_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def chain(displacement: Tensor, sigma: Tensor, edges: Tensor) -> Tensor:
        found = ops.collapse_parents(displacement * 2, sigma, edges)
        return found.shift.sum(-1) + found.log_agreement

    for nodes in (6, 9):
        displacement, sigma, edges = problem(nodes - 3, nodes, nodes, 3)
        wanted = ops.collapse_parents(displacement * 2, sigma, edges)
        assert torch.equal(chain(displacement, sigma, edges), wanted.shift.sum(-1) + wanted.log_agreement)


def test_a_gradient_is_refused() -> None:
    displacement, sigma, edges = problem(3, 5, 6, 2)
    shift = ops.collapse_parents(displacement.requires_grad_(), sigma, edges).shift
    with pytest.raises(NotImplementedError, match="collapse_parents has no gradient"):
        shift.sum().backward()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [5, -1, 2**31 - 1])
def test_a_parent_that_is_not_there_is_named(wrong: int, index: torch.dtype, backend: str) -> None:
    displacement, sigma, edges = problem(2, 5, 6, 3)
    edges[4, 2] = wrong
    message = rf"edges\[4, 2\] is {wrong}, but displacement has 5 parents"
    with ops.use_backend(backend), pytest.raises(ArgumentError, match=message):
        ops.collapse_parents(displacement, sigma, edges.to(index))
    with ops.use_backend(backend), pytest.raises(ArgumentError, match=r"edges\[0, 0\] is .*has 0 parents"):
        ops.collapse_parents(displacement[:, :0], sigma[:0], edges)


def test_bad_arguments_are_named() -> None:
    displacement, sigma, edges = problem(2, 5, 6, 3)
    out = tuple(ops.collapse_parents(displacement, sigma, edges))
    for args, message in (
        (([1.0], sigma, edges), "displacement must be a tensor or a DLPack array, got list"),
        ((displacement[..., 0], sigma, edges), r"displacement must be \[I,U,2\], \(y, x\) last, got shape \[2, 5\]"),
        ((displacement[..., :1], sigma, edges), r"got shape \[2, 5, 1\]"),
        ((displacement.half(), sigma.half(), edges), r"displacement must be float32 or float64, got torch.float16"),
        ((displacement, 1.0, edges), "sigma must be a tensor or a DLPack array, got float"),
        ((displacement, sigma[:4], edges), r"sigma must have shape \[5\], got \[4\]"),
        ((displacement, sigma.double(), edges), "sigma must be torch.float32, got torch.float64"),
        ((displacement, sigma, edges.float()), r"edges must be an int32 or int64 tensor \[V,M\], got torch.float32 \[6, 3\]"),
        ((displacement, sigma, edges[0]), r"edges must be .* got torch.int64 \[3\]"),
        ((displacement, sigma, None), "edges must be .* got NoneType"),
        ((displacement, sigma, edges[:, :0]), r"edges has shape \[6, 0\]: every node needs at least one parent"),
        ((displacement, sigma, edges.to("meta")), "edges is on meta but displacement is on cpu"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ops.collapse_parents(*args)  # type: ignore[arg-type]
    for wrong, message in (
        (out[:2], r"out must be \(shift, sigma, log_agreement\), got tuple"),
        ((out[0][:1], *out[1:]), r"out\[0\] must have shape \[2, 6, 2\], got \[1, 6, 2\]"),
        ((*out[:2], out[2].double()), r"out\[2\] must be torch.float32"),
        ((*out[:2], out[0][..., 0]), r"out\[0\] shares memory with out\[2\]"),
        ((out[0], sigma.new_zeros(1).expand(6), out[2]), r"out\[1\] has several cells in one place"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ops.collapse_parents(displacement, sigma, edges, out=wrong)  # type: ignore[arg-type]
