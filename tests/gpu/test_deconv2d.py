"""deconv2d on a GPU, each backend against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conelens import ops
from conelens.kernels.deconv2d import reference

NO_POOL = None
CASES = {  # c_in, c_out, size, kernel, stride, padding, dilation, groups, pool, windowed
    "vgg_under_a_pool": (64, 64, (28, 28), 3, 1, 1, 1, 1, ((2, 2), (2, 2), (0, 0), (1, 1)), False),
    "overlapping_pool": (96, 80, (13, 13), 5, 1, 2, 1, 1, ((3, 3), (2, 2), (0, 0), (1, 1)), False),
    "windows": (128, 96, (9, 7), 3, 1, 1, 1, 1, ((2, 2), (2, 2), (0, 0), (1, 1)), True),
    "windows_without_pool": (64, 64, (9, 7), 3, 2, 1, 1, 1, NO_POOL, True),
    "stride_2": (64, 48, (15, 17), 3, 2, 1, 1, 1, NO_POOL, False),
    "dilated_groups": (64, 64, (15, 17), 3, 1, 2, 2, 4, NO_POOL, False),
    "depthwise": (64, 64, (15, 17), 3, 1, 1, 1, 64, NO_POOL, False),
    "pixels": (64, 3, (61, 67), 3, 1, 1, 1, 1, NO_POOL, False),
    "pixels_windows": (64, 3, (14, 14), 3, 1, 1, 1, 1, NO_POOL, True),
    "pixels_stem": (64, 3, (28, 28), 7, 2, 3, 1, 1, NO_POOL, False),
    "pixels_stem_under_a_pool": (64, 3, (13, 13), 11, 4, 2, 1, 1, ((3, 3), (2, 2), (0, 0), (1, 1)), False),
    "one_channel": (30, 1, (20, 20), 3, 1, 1, 1, 1, NO_POOL, False),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def build(name: str, dtype: torch.dtype) -> tuple[dict[str, object], tuple[Tensor, Tensor], dict[str, object]]:
    """(arguments of the reference, (y, weight), keyword arguments of the operation)."""
    c_in, c_out, size, k, s, p, d, groups, pool, windowed = CASES[name]
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, c_in, *size, generator=generator).to(dtype)
    weight = torch.randn(c_in, c_out // groups, k, k, generator=generator).to(dtype)
    switches = origin = None
    on = size
    if pool is not None:
        switches = torch.randint(0, pool[0][0] * pool[0][1], y.shape, generator=generator).to(torch.uint8)
        on = tuple((size[a] - 1) * pool[1][a] + pool[0][a] for a in (0, 1))
    if windowed:
        origin = torch.tensor([[-2, 1], [0, 0], [2, -1]])
    to = tuple((on[a] - 1) * s - 2 * p + d * (k - 1) + 1 for a in (0, 1))
    window = ((s, s), (p, p), groups, (d, d), to, on)
    wanted = reference.deconv2d(y.double(), weight.double(), *window, pool, switches, True, origin)
    keywords = {
        "groups": groups,
        "dilation": d,
        "output_size": to,
        "map_size": on,
        "pool": pool,
        "relu": True,
    }
    keywords |= {"stride": s, "padding": p}
    keywords["switches"] = None if switches is None else switches.cuda()
    keywords["origin"] = None if origin is None else origin.cuda()
    return {"wanted": wanted}, (y.cuda(), weight.cuda()), keywords


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["triton", "compiled", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(
    name: str, backend: str, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected, (y, weight), keywords = build(name, dtype)
    y = y.contiguous(memory_format=layout)
    if keywords["switches"] is not None:
        keywords["switches"] = keywords["switches"].contiguous(memory_format=layout)  # type: ignore[attr-defined]
    with ops.use_backend(backend):
        got = ops.deconv2d(y, weight, **keywords)
        again = ops.deconv2d(y, weight, **keywords)
    assert torch.equal(got, again), "the same input gave other bits"
    wanted = expected["wanted"]
    error = float((got.double().cpu() - wanted).norm() / wanted.norm())  # type: ignore[operator]
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["triton", "compiled"])
def test_tf32_where_torch_allows_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    expected, (y, weight), keywords = build("vgg_under_a_pool", torch.float32)
    with ops.use_backend(backend):
        got = ops.deconv2d(y, weight, **keywords)
    wanted = expected["wanted"]
    error = float((got.double().cpu() - wanted).norm() / wanted.norm())  # type: ignore[operator]
    assert error < 2e-3


def test_float64_on_cuda() -> None:
    expected, (y, weight), keywords = build("stride_2", torch.float64)
    got = ops.deconv2d(y, weight, **keywords)
    torch.testing.assert_close(got.cpu(), expected["wanted"], rtol=1e-12, atol=1e-12)


def test_operations_compile_and_pass_opcheck() -> None:
    _, (y, weight), keywords = build("vgg_under_a_pool", torch.float16)
    compiled = torch.compile(lambda a, b: ops.deconv2d(a, b, **keywords), fullgraph=True)
    assert torch.equal(compiled(y, weight), ops.deconv2d(y, weight, **keywords))
    x = torch.randn(2, 8, 12, 12, device="cuda")
    pooled, switches = ops.max_pool2d_with_switches(x, 2, relu=True)
    overload = torch.ops.conelens.max_unpool2d.default
    window = ([2, 2], [2, 2], [0, 0], [1, 1], [12, 12])
    torch.library.opcheck(overload, (pooled, switches, *window, True, None, False))
