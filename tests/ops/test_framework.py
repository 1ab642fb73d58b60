"""Choice of backend, arrays of other libraries, layouts and reports: what all operations share."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import conelens
from conelens import _native, ops
from conelens.errors import ArgumentError, BackendError
from conelens.ops import _arguments, _register


class Foreign:
    """An array of a library that knows nothing but DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self) -> type:
        return ForeignNamespace


class ForeignNamespace:
    @staticmethod
    def from_dlpack(array: Any) -> Foreign:
        return Foreign(torch.from_dlpack(array))


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cpu", lambda: _native.Native(None, "taken away by a test"))


def test_kernels_run_by_default() -> None:
    with ops.require_kernels():
        ops.max_pool2d_with_switches(torch.zeros(1, 1, 4, 4), 2)


@pytest.mark.usefixtures("no_native")
def test_reference_stands_in_unless_kernels_are_required() -> None:
    x = torch.zeros(1, 1, 4, 4)
    assert ops.max_pool2d_with_switches(x, 2).pooled.shape == (1, 1, 2, 2)
    with (
        ops.require_kernels(),
        pytest.raises(BackendError, match=r"would run its reference.*taken away by a test"),
    ):
        ops.max_pool2d_with_switches(x, 2)
    with (
        ops.use_backend("compiled"),
        pytest.raises(BackendError, match=r"'compiled' was asked for.*taken away"),
    ):
        ops.max_pool2d_with_switches(x, 2)


def test_explicit_reference_is_a_reference() -> None:
    x = torch.zeros(1, 1, 4, 4)
    with (
        ops.use_backend("reference"),
        ops.require_kernels(),
        pytest.raises(BackendError, match="kernels are required"),
    ):
        ops.max_pool2d_with_switches(x, 2)


def test_choice_ends_with_its_block() -> None:
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ZeroDivisionError), ops.use_backend("triton"), ops.require_kernels():
        raise ZeroDivisionError
    with ops.use_backend("reference"):
        ops.max_pool2d_with_switches(x, 2)


def test_backends_tell_reasons() -> None:
    x = torch.zeros(1, 1, 4, 4)
    for name in _register.OPERATORS:
        reasons = ops.backends(name, x)
        assert reasons["reference"] is None
        assert set(reasons) <= {"compiled", "triton", "reference"}
    found = ops.backends("max_pool2d_with_switches", x)
    assert found["compiled"] is None
    assert "triton" in (found["triton"] or "").lower()
    with pytest.raises(ArgumentError, match=r"operation is 'max_pool'; wanted one of .*max_unpool2d"):
        ops.backends("max_pool", x)
    with pytest.raises(ArgumentError, match="wants the operation's tensors"):
        ops.backends("max_unpool2d")


def test_unknown_backend_is_named() -> None:
    with (
        pytest.raises(ArgumentError, match="backend is 'cuda'; wanted one of 'auto', 'compiled'"),
        ops.use_backend("cuda"),
    ):
        pass


def test_numpy_in_numpy_out() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 10)).astype(np.float32)
    expected = ops.max_pool2d_with_switches(torch.from_numpy(x), 2)
    result = ops.max_pool2d_with_switches(x, 2)
    assert type(result) is type(expected)
    assert isinstance(result.pooled, np.ndarray)
    np.testing.assert_array_equal(result.pooled, expected.pooled.numpy())
    np.testing.assert_array_equal(result.switches, expected.switches.numpy())
    back = ops.max_unpool2d(*result, 2, output_size=(8, 10))
    assert isinstance(back, np.ndarray)
    assert back.shape == x.shape
    by_name = ops.max_pool2d_with_switches(x=x, kernel_size=2)
    assert isinstance(by_name.pooled, np.ndarray)


def test_numpy_out_argument_flipped_and_read_only_inputs() -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 6, 6)).astype(np.float64)[..., ::-1]
    frozen = x.copy()
    frozen.flags.writeable = False
    pooled, switches = np.empty((1, 2, 3, 3)), np.empty((1, 2, 3, 3), np.uint8)
    result = ops.max_pool2d_with_switches(x, 2, out=(pooled, switches))
    assert result.pooled is pooled
    np.testing.assert_array_equal(pooled, ops.max_pool2d_with_switches(frozen, 2).pooled)
    pooled.flags.writeable = False
    with pytest.raises(ArgumentError, match="read-only"):
        ops.max_pool2d_with_switches(x, 2, out=(pooled, switches))


def test_any_dlpack_library_gets_its_own_arrays_back() -> None:
    x = torch.randn(1, 2, 6, 6)
    result = ops.max_pool2d_with_switches(Foreign(x), 3)
    assert isinstance(result.pooled, Foreign)
    assert torch.equal(result.pooled.tensor, ops.max_pool2d_with_switches(x, 3).pooled)


def test_native_arguments_are_checked_once_more() -> None:
    """Below torch nothing is trusted either: a wrong pointer must not be reached."""
    core: Any = _native.cpu().module
    x = np.zeros((1, 2, 4, 4), np.float32)
    pooled, switches = np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2), np.uint8)
    rest = ((2, 2), (2, 2), (0, 0), (1, 1), False, 1)
    core.max_pool2d_with_switches(x, pooled, switches, *rest)
    for arguments, message in (
        ((x[0], pooled, switches), "x has shape .*wanted 4 axes"),
        ((x.astype(np.int32), pooled, switches), "x has DLPack dtype 0:32"),
        ((x, pooled.astype(np.float64), switches), "pooled has DLPack dtype 2:64"),
        ((x, pooled, switches[:, :1]), r"switches has shape \[1, 1, 2, 2\], wanted \[1, 2, 2, 2\]"),
        ((x, pooled, switches.astype(np.int64)), "switches has DLPack dtype 0:64"),
        ((x, np.zeros((1, 2, 9, 9), np.float32), np.zeros((1, 2, 9, 9), np.uint8)), "windows without a cell"),
        ((x, torch.zeros(1, 2, 2, 2, device="meta"), switches), "."),
    ):
        with pytest.raises((ValueError, RuntimeError, BufferError, NotImplementedError), match=message):
            core.max_pool2d_with_switches(*arguments, *rest)
    frozen = pooled.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="pooled is read-only"):
        core.max_pool2d_with_switches(x, frozen, switches, *rest)
    with pytest.raises(TypeError):
        core.max_pool2d_with_switches(x, "pooled", switches, *rest)


def test_large_outputs_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    core: Any = _native.cpu().module
    monkeypatch.setattr(core, "advise_huge_pages", lambda address, size: asked.append(size))
    ops.max_pool2d_with_switches(torch.zeros(1, 1, 4, 4), 2)
    assert asked == []
    ops.max_pool2d_with_switches(torch.zeros(1, 8, 1024, 1024), 2)
    assert asked == [8 << 20]


def test_layouts() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert not _arguments.is_channels_last(x)
    assert _arguments.is_channels_last(x.contiguous(memory_format=torch.channels_last))
    assert _arguments.readable(x[:, :, 1:, 1:]).data_ptr() == x[:, :, 1:, 1:].data_ptr()
    assert _arguments.readable(x[..., ::2]).is_contiguous()


def test_capabilities() -> None:
    report = conelens.capabilities()
    assert report["cpu"]["isa"] in report["cpu"]["available"]
    assert report["cpu"]["reason"] is None
    assert (report["cuda"]["reason"] is None) == (report["cuda"]["devices"] > 0)
    text = str(report)
    assert report["cpu"]["isa"] in text
    assert [line.split()[0] for line in text.splitlines()] == ["conelens", "torch", "cpu", "cuda", "triton"]


def test_import_is_light() -> None:
    code = (
        "import sys, conelens; assert 'torch' not in sys.modules; import conelens.ops; "
        "heavy = {'triton', 'matplotlib', 'typer', 'jinja2', 'scipy', 'sklearn', 'captum'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_choices_of_two_threads_end_in_any_order() -> None:
    first, second = ops.use_backend("triton"), ops.use_backend("reference")
    x = torch.zeros(1, 1, 4, 4)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with ops.require_kernels(), pytest.raises(BackendError, match="would run its reference"):
        ops.max_pool2d_with_switches(x, 2)  # the second still holds
    second.__exit__(None, None, None)
    with ops.require_kernels():
        ops.max_pool2d_with_switches(x, 2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_without_gradients_vmap_and_lazy_negation_are_seen() -> None:
    x = torch.randn(3, 2, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.vmap(lambda t: ops.channel_peaks(t).values)(x), x.amax((-1, -2)))
        negated, weight = torch._neg_view(x[0]), torch._neg_view(torch.randn(2, 3, 3, 3))
        assert torch.equal(ops.channel_peaks(negated).values, (-x[0]).amax((-1, -2)))
        got, wanted = ops.deconv2d(x[0], weight, relu=True), ops.deconv2d(x[0], weight.resolve_neg(), relu=True)
        assert torch.equal(got, wanted) and bool(got.any())


@pytest.mark.parametrize("window", [(3, 1, 0, 2**62), (2**40, 1, 2**39, 1), (3, 2**62, 1, 1), (2**16, 1, 0, 1)])
def test_windows_beyond_the_kernels_arithmetic_are_refused(window: tuple[int, int, int, int]) -> None:
    x, switches = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=r"must (be|have) at most 2147483647"):
        ops.max_pool2d_with_switches(x, *window)
    with pytest.raises(ArgumentError, match=r"must (be|have) at most 2147483647"):
        ops.max_unpool2d(x, switches, *window, output_size=(8, 8))


def test_out_whose_cells_share_memory_is_refused() -> None:
    x, switches = torch.randn(2, 1, 8, 8), torch.empty(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=r"out\[0\].*several cells in one place"):
        ops.max_pool2d_with_switches(x, 2, out=(torch.empty(1, 1, 4, 4).expand(2, 1, 4, 4), switches))


def _pool_into_one_place(x: torch.Tensor) -> None:
    pooled = torch.empty_like(x)
    ops.max_pool2d_with_switches(x, 1, out=(pooled, pooled.view(torch.uint8)[..., ::4]))


@pytest.mark.parametrize(
    ("call", "shared"),
    [
        (lambda x, s, w: ops.max_pool2d_with_switches(x, 1, out=(x, s)), r"out\[0\] shares memory with x"),
        (lambda x, s, w: _pool_into_one_place(x), r"out\[0\] shares memory with out\[1\]"),
        (lambda x, s, w: ops.max_unpool2d(x, s, 1, output_size=(4, 4), out=x), "out shares memory with pooled"),
        (lambda x, s, w: ops.deconv2d(x, w, out=x), "out shares memory with y"),
        (lambda x, s, w: ops.deconv2d(x[:, :4], w[:4, :4], out=x[:, 3:7]), "out shares memory with y"),
        (lambda x, s, w: ops.deconv2d(w.view(1, 1, 8, 8), w[:1, :1], out=w.view(1, 1, 8, 8)), "out shares memory with y"),
        (
            lambda x, s, w: ops.deconv2d(x[:, :1].clone(), w[:1, :1], out=w.flatten()[:16].view(1, 1, 4, 4)),
            "out .* with weight",
        ),
        (lambda x, s, w: ops.channel_peaks(x, out=(x[..., 0, 0], torch.empty(1, 8, dtype=torch.int32))), r"out\[0\] .* with x"),
    ],
)
def test_out_that_shares_memory_with_an_input_is_refused(call: Any, shared: str) -> None:
    """A kernel would read what it has written, and the result would be wrong without a word."""
    x = torch.randn(1, 8, 4, 4)
    switches, weight = torch.zeros(1, 8, 4, 4, dtype=torch.uint8), torch.randn(8, 8, 1, 1)
    with pytest.raises(ArgumentError, match=shared):
        call(x, switches, weight)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_out_may_lie_between_the_cells_of_an_input(layout: torch.memory_format) -> None:
    """Slices of one buffer that touch no cell twice are welcome: a block that writes beside what it reads."""
    buffer = torch.randn(2, 8, 4, 4).contiguous(memory_format=layout)
    weight = torch.randn(4, 4, 1, 1)
    expected = ops.deconv2d(buffer[:, :4].clone(), weight)
    ops.deconv2d(buffer[:, :4], weight, out=buffer[:, 4:])
    torch.testing.assert_close(buffer[:, 4:], expected)


def test_out_that_shares_memory_is_seen_through_other_libraries() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
    with pytest.raises(ArgumentError, match="out shares memory with y"):
        ops.deconv2d(x, np.ones((2, 2, 1, 1), np.float32), out=x)


def test_arrays_that_torch_cannot_hold_are_named() -> None:
    x, weight = np.zeros((1, 2, 4, 4), np.float32), np.ones((2, 2, 1, 1), np.float32)
    with pytest.raises(ArgumentError, match=r"y is not in this machine's byte order \(>f4\); use y.astype\('<f4'\)"):
        ops.deconv2d(x.astype(">f4"), weight)
    with pytest.raises(ArgumentError, match="weight is not in this machine's byte order"):
        ops.deconv2d(x, weight=weight.astype(">f4"))
    with pytest.raises(ArgumentError, match="out is not in this machine's byte order"):
        ops.deconv2d(x, weight, out=x.astype(">f4"))
    with pytest.raises(ArgumentError, match="x is a NumPy array of object"):
        ops.channel_peaks(x.astype(object))
