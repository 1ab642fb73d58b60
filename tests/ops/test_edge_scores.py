"""edge_scores against plain loops, and what it promises: exactness, sums of parts, NaN in its place."""

from __future__ import annotations

import math
import sys
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.errors import ArgumentError
from conelens.kernels.edge_scores import products, reference
from tests.kit.compare import assert_same, packed_in_guards

pytestmark = pytest.mark.usefixtures("two_threads")

BACKENDS = ("compiled", "reference")
DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(images: int, nodes: int, parents: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Displacements of 3 px about what an image's object did as a whole, weights, bandwidths."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    moved = 20 * noise(images, 1, 2)
    displacement, parent = moved + 3 * noise(images, nodes, 2), moved + 3 * noise(images, parents, 2)
    weight, bandwidth = noise(images, nodes).abs(), 1 + 20 * noise(nodes).abs()
    return tuple(x.to(dtype) for x in (displacement, weight, parent, bandwidth))  # type: ignore[return-value]


def oracle(displacement: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores, and the sums of what matrix products would add up, or of weights; in Python's floats, with exact sums."""
    images, nodes, parents = *weight.shape, parent.shape[1]
    scores, scale = (torch.zeros(nodes, parents, dtype=torch.float64) for _ in range(2))
    d, w, p = displacement.tolist(), weight.tolist(), parent.tolist()
    centre = parent.double().mean(1).tolist()
    for v in range(nodes):
        for u in range(parents):
            squares = [(d[i][v][0] - p[i][u][0]) ** 2 + (d[i][v][1] - p[i][u][1]) ** 2 for i in range(images)]
            if bandwidth is None:
                terms = [w[i][v] * squares[i] for i in range(images)]
                around = [[x[i][k][a] - centre[i][a] for x, k in ((d, v), (p, u)) for a in (0, 1)] for i in range(images)]
                scale[v, u] = math.fsum(w[i][v] * x * x for i in range(images) for x in around[i])
            else:
                terms = [w[i][v] * math.exp(-squares[i] / (2 * float(bandwidth[v]))) for i in range(images)]
                scale[v, u] = math.fsum(row[v] for row in w)
            scores[v, u] = math.fsum(terms)
    return scores, scale


def turned(args: Problem) -> Problem:
    """The same with the order of axes in memory reversed."""
    back = (torch.empty(x.shape[::-1], dtype=x.dtype).permute(*reversed(range(x.dim()))) for x in args)
    return tuple(y.copy_(x) for x, y in zip(args, back, strict=True))  # type: ignore[return-value]


def run(args: Problem, kernel: bool, backend: str = "auto", out: Tensor | None = None) -> Tensor:
    with ops.use_backend(backend):
        return ops.edge_scores(*args[:3], bandwidth=args[3] if kernel else None, out=out)


def assert_close(found: Tensor, args: Problem, kernel: bool, products: bool = False) -> None:
    """In parts of the score; in parts of its terms where these are exponentials, or come from matrix products."""
    wanted, scale = oracle(*args[:3], args[3] if kernel else None)
    scale = scale if kernel or products else wanted
    assert found.shape == wanted.shape and found.dtype == args[0].dtype
    assert (found >= 0).all(), "below 0, or NaN"
    apart = ((found.double() - wanted).abs() / scale).max().item() if found.numel() else 0.0
    assert apart <= TOLERANCE[found.dtype], f"differs by {apart:.1e} of its terms"


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_loops(dtype: torch.dtype, backend: str, kernel: bool, isa: str) -> None:
    random = Random(0)
    sizes = [(1, 1, 1), (9, 16, 32), (5, 17, 33), (257, 3, 2), (130, 5, 40)]
    sizes += [tuple(random.randint(1, most) for most in (20, 30, 70)) for _ in range(3)]
    for seed, size in enumerate(sizes):
        args = problem(*size, dtype=dtype, seed=seed)
        assert_close(run(args, kernel, backend), args, kernel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_exponential_is_good_to_its_rounding(dtype: torch.dtype, isa: str) -> None:
    """One image of weight 1: the kernel itself, from 1 down to the smallest normal numbers and to 0."""
    most = 80.0 if dtype == torch.float32 else 700.0
    distance = torch.linspace(0, math.sqrt(2 * most), 4001, dtype=torch.float64).to(dtype)
    parent = torch.stack([distance, torch.zeros_like(distance)], -1)[None]
    one = torch.ones(1, 1, dtype=dtype)
    found = ops.edge_scores(torch.zeros(1, 1, 2, dtype=dtype), one, parent, bandwidth=one[0])[0]
    exponent = distance.double().square() / 2
    wanted = torch.exp(-exponent)
    allowed = torch.finfo(dtype).eps * (1.5 + 2 * exponent)  # of which 2 * exponent is the rounding of its argument
    assert ((found.double() - wanted).abs() <= allowed * wanted).all()
    assert found[0] == 1
    for far in (1e3, 1e10, math.inf):
        moved = torch.tensor([[[far, 0.0]]], dtype=dtype)
        assert ops.edge_scores(torch.zeros(1, 1, 2, dtype=dtype), one, moved, bandwidth=one[0] / 2).item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
def test_what_an_image_does_as_a_whole_does_not_count(kernel: bool, backend: str, isa: str) -> None:
    """Displacements of 2^12 px common to node and parents: nothing of their squares may be left in the result."""
    args = problem(60, 6, 7)
    displacement, parent = ((x * 64).round() / 64 for x in (args[0], args[2]))
    far = torch.tensor([4096.0, -8192.0])  # exactly added
    near, moved = (displacement, *args[1:2], parent, args[3]), (displacement + far, args[1], parent + far, args[3])
    assert_close(run(moved, kernel, backend), near, kernel)


def test_a_parent_that_is_the_node_scores_nothing_and_never_less(isa: str) -> None:
    displacement, weight, _, _ = problem(40, 30, 1)
    assert (ops.edge_scores(displacement, weight, displacement.clone()).diagonal() == 0).all()


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
def test_negative_weights_count_as_they_are(kernel: bool) -> None:
    displacement, weight, parent, bandwidth = problem(9, 10, 11, torch.float64)
    args = (displacement, -weight, parent, bandwidth)
    torch.testing.assert_close(run(args, kernel), -run((displacement, weight, parent, bandwidth), kernel))


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_add_up_to_the_whole(dtype: torch.dtype, kernel: bool, isa: str) -> None:
    args = problem(301, 20, 40, dtype)
    whole = run(args, kernel)
    total = torch.zeros_like(whole)
    for images in (slice(0, 7), slice(7, 200), slice(200, 200), slice(200, 301)):
        total += run((*(x[images] for x in args[:3]), args[3]), kernel)  # type: ignore[arg-type]
    scale = oracle(*(x[:, :1] for x in args[:3]), args[3][:1] if kernel else None)[1].item()
    assert (whole - total).abs().max() <= 50 * torch.finfo(dtype).eps * max(scale, float(whole.max()))


def test_the_reference_takes_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(50, 9, 11, torch.float64)
    calls = []
    real = reference.edge_scores
    monkeypatch.setattr(reference, "edge_scores", lambda *part: calls.append(len(part[0])) or real(*part))
    behind = sys.modules["conelens.ops.edge_scores"]  # the package's own name for it is the function
    monkeypatch.setattr(behind, "_REFERENCE_CELLS", 9 * 11 * 4)
    assert_close(run(args, False, "reference"), args, False)
    assert calls == [4] * 12 + [2]


# --- matrix products: what CUDA runs for the quadratic criterion ----------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_products_equal_plain_loops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (3 * 33 * 8, 1 << 24):  # a few images at a time, all at once
        monkeypatch.setattr(products, "_BLOCK", block)
        for seed, size in enumerate([(1, 1, 1), (9, 16, 32), (5, 17, 33), (257, 3, 2), (130, 5, 40)]):
            args = problem(*size, dtype=dtype, seed=seed)
            assert_close(products.squared_differences(*args[:3]), args, False, products=True)
    for images, nodes, parents in ((0, 4, 5), (3, 0, 5), (3, 4, 0)):
        assert_same(products.squared_differences(*problem(images, nodes, parents)[:3]), torch.zeros(nodes, parents))


def test_matrix_products_are_about_the_parents_mean_and_never_negative() -> None:
    args = problem(60, 6, 7)
    displacement, parent = ((x * 64).round() / 64 for x in (args[0], args[2]))
    far = torch.tensor([4096.0, -8192.0])  # exactly added
    found = products.squared_differences(displacement + far, args[1], parent + far)
    assert_close(found, (displacement, args[1], parent, args[3]), False, products=True)
    for seed in range(20):
        displacement, weight, _, bandwidth = problem(40, 30, 1, seed=seed)
        own = (displacement[:, :1], weight[:, :1], displacement, bandwidth)
        assert_close(products.squared_differences(displacement, weight, displacement)[:1], own, False, products=True)


def test_matrix_products_keep_nan_in_its_place_and_negative_weights() -> None:
    displacement, weight, parent, _ = problem(30, 20, 50, torch.float64)
    negative = products.squared_differences(displacement, -weight, parent)
    torch.testing.assert_close(negative, -products.squared_differences(displacement, weight, parent))
    displacement[3, 4, 1] = weight[7, 9] = parent[2, 33, 0] = math.nan
    wanted = torch.zeros(20, 50, dtype=torch.bool)
    wanted[[4, 9]] = wanted[:, 33] = True
    assert torch.equal(products.squared_differences(displacement, weight, parent).isnan(), wanted)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_belongs(backend: str, kernel: bool, isa: str) -> None:
    displacement, weight, parent, bandwidth = problem(30, 20, 50)
    displacement[3, 4, 1] = weight[7, 9] = parent[2, 33, 0] = bandwidth[11] = math.nan
    found = run((displacement, weight, parent, bandwidth), kernel, backend)
    wanted = torch.zeros_like(found, dtype=torch.bool)
    wanted[[4, 9]] = wanted[:, 33] = True
    wanted[11] |= kernel
    assert torch.equal(found.isnan(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bandwidth_of_zero_is_nan_where_they_agree(backend: str, isa: str) -> None:
    displacement, parent = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    with ops.use_backend(backend):
        found = ops.edge_scores(displacement, torch.ones(1, 1), parent, bandwidth=torch.zeros(1))
    assert found[0, 0].isnan() and found[0, 1] == 0


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str, kernel: bool) -> None:
    for images, nodes, parents in ((0, 4, 5), (3, 0, 5), (3, 4, 0)):
        args = problem(images, nodes, parents)
        for given in (args, turned(args)):
            found = run(given, kernel, backend, out=torch.full((nodes, parents), math.nan))
            assert_same(found, torch.zeros(nodes, parents))


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_and_nothing_else(dtype: torch.dtype, backend: str, kernel: bool, isa: str) -> None:
    args = problem(20, 17, 37, dtype)
    with packed_in_guards(torch.empty(17, 37, dtype=dtype)) as (out,):
        assert run(args, kernel, backend, out) is out
    assert_close(out, args, kernel)
    strided = torch.full((37, 17), math.nan, dtype=dtype).t()
    assert_close(run(args, kernel, backend, strided), args, kernel)


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
def test_inputs_of_any_strides(kernel: bool) -> None:
    args = problem(6, 11, 9)
    torch.testing.assert_close(run(turned(args), kernel), run(args, kernel))
    with torch.no_grad():
        negated = (torch._neg_view(args[0]), args[1], torch._neg_view(args[2]), args[3])
        torch.testing.assert_close(run(negated, kernel), run(args, kernel))


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
def test_same_bits_on_every_run(kernel: bool, isa: str) -> None:
    args = problem(150, 70, 90)
    first = run(args, kernel)
    assert torch.equal(first, run(args, kernel))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(first, run(args, kernel))


def test_other_libraries_arrays() -> None:
    args = problem(3, 4, 5)
    arrays = [x.numpy() for x in args]
    for bandwidth in (None, arrays[3]):
        found = ops.edge_scores(*arrays[:3], bandwidth=bandwidth)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, run(args, bandwidth is not None))


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
def test_opcheck(kernel: bool) -> None:
    displacement, weight, parent, bandwidth = problem(3, 4, 5)
    args = (displacement, weight, parent, bandwidth if kernel else None)
    torch.library.opcheck(torch.ops.conelens.edge_scores.default, args)
    torch.library.opcheck(torch.ops.conelens.edge_scores.out, args, {"out_out": torch.zeros(4, 5)})


@pytest.mark.parametrize("kernel", [False, True], ids=["quadratic", "kernel"])
def test_compiles_as_one_graph(kernel: bool) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def chain(displacement: Tensor, weight: Tensor, parent: Tensor, bandwidth: Tensor | None) -> Tensor:
        return ops.edge_scores(displacement * 2, weight, parent * 2, bandwidth=bandwidth) + 1

    for size in (4, 6):
        displacement, weight, parent, bandwidth = problem(size - 1, size, size + 1)
        wanted = run((displacement * 2, weight, parent * 2, bandwidth), kernel) + 1
        torch.testing.assert_close(chain(displacement, weight, parent, bandwidth if kernel else None), wanted)


def test_a_gradient_is_refused() -> None:
    displacement, weight, parent, _ = problem(3, 4, 5)
    scores = ops.edge_scores(displacement, weight.requires_grad_(), parent)
    with pytest.raises(NotImplementedError, match="edge_scores has no gradient"):
        scores.sum().backward()


# --- bad input ------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    d, w, p, b = problem(2, 5, 6)
    for args, keywords, message in (
        ((1.0, w, p), {}, "displacement must be a tensor or a DLPack array, got float"),
        ((d[..., 0], w, p), {}, r"displacement must be \[I,V,2\], \(y, x\) last, got shape \[2, 5\]"),
        ((d, w, p[..., :1]), {}, r"parent must be \[I,U,2\], \(y, x\) last, got shape \[2, 6, 1\]"),
        ((d.half(), w, p), {}, r"displacement must be float32 or float64, got torch.float16"),
        ((d, w, p[:1]), {}, r"parent must have shape \[2, 6, 2\], got \[1, 6, 2\]"),
        ((d, w, p.double()), {}, "parent must be torch.float32, got torch.float64"),
        ((d, w[:, :4], p), {}, r"weight must have shape \[2, 5\], got \[2, 4\]"),
        ((d, None, p), {}, "weight must be a tensor or a DLPack array, got NoneType"),
        ((d, w, p), {"bandwidth": 3.0}, "bandwidth must be a tensor or a DLPack array, got float"),
        ((d, w, p), {"bandwidth": b[:4]}, r"bandwidth must have shape \[5\], got \[4\]"),
        ((d, w, p), {"bandwidth": b.double()}, "bandwidth must be torch.float32"),
        ((d, w.to("meta"), p), {}, "weight is on meta but displacement is on cpu"),
        ((d, w, p), {"out": torch.zeros(6, 5)}, r"out must have shape \[5, 6\], got \[6, 5\]"),
        ((d, w, p), {"out": torch.zeros(1, 6).expand(5, 6)}, "out has several cells in one place"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ops.edge_scores(*args, **keywords)  # type: ignore[arg-type]
    parent = torch.zeros(1, 20, 2)
    with pytest.raises(ArgumentError, match="out shares memory with parent"):
        ops.edge_scores(torch.zeros(1, 2, 2), torch.ones(1, 2), parent, out=parent.view(2, 20))
