"""The native modules as files: instruction sets, symbols, threads after a fork, and use from C."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from conelens import _native, ops

core: Any = _native.cpu().module
LIBRARY = Path(core.__file__).with_name("libconelens.so")
ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# --- instruction sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", core.isa()["available"])
def test_environment_forces_an_instruction_set(name: str) -> None:
    done = run(sys.executable, "-c", "from conelens import _core; print(_core.isa()['active'])", CONELENS_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_unknown_instruction_set_is_an_error() -> None:
    done = run(sys.executable, "-c", "import conelens._core", CONELENS_ISA="sse9")
    assert done.returncode != 0
    assert "CONELENS_ISA is 'sse9', wanted one of:" in done.stderr
    with pytest.raises(ValueError, match="'sse9' is not available"):
        core.select_isa("sse9")


def test_same_bits_on_every_instruction_set() -> None:
    x = torch.randn(2, 5, 23, 37)
    before, results = core.isa()["active"], []
    for name in core.isa()["available"]:
        core.select_isa(name)
        pooled, switches = ops.max_pool2d_with_switches(x, 3, 2, relu=True)
        results.append((pooled, switches, ops.max_unpool2d(pooled - 0.7, switches, 3, 2, output_size=(23, 37))))
    core.select_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_vectors_are_used() -> None:
    """The interleaving inner loops must not fall back to single lanes."""
    if "avx512" not in core.isa()["available"]:
        pytest.skip("no AVX-512 here")
    text = run(tool("objdump"), "-d", "--no-show-raw-insn", "-C", LIBRARY).stdout
    functions = [part.partition("\n") for part in text.split("\n\n")]
    for kernel in ("pool_row<float, 2, 2>", "pool_row<float, 2, 3>", "stride2_row<float, 2, false>"):
        bodies = [body for name, _, body in functions if "avx512" in name and kernel in name]
        assert bodies, f"{kernel} is not in the library"
        assert any("vpermt2ps" in body and "zmm" in body for body in bodies), f"{kernel} has no vector shuffles"


# --- symbols --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", sorted(ROOT.glob("kernels/*/cpu*.cpp")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_isa_objects_share_no_inline_functions(source: Path, tmp_path: Path) -> None:
    """A weak symbol in an AVX-512 object could become everyone's copy and crash older machines. -O0 inlines nothing."""
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", ROOT / "kernels", *ROOT.glob("kernels/*/"))]
    flags = ["-std=c++17", "-O0", "-w", "-mavx2", "-mfma", "-mf16c", "-DCONELENS_ISA=avx2", "-fopenmp"]
    built = run(tool("c++"), *flags, *includes, "-c", source, "-o", tmp_path / "kernel.o")
    assert built.returncode == 0, built.stderr
    lines = run(tool("nm"), "-C", tmp_path / "kernel.o").stdout.splitlines()
    assert any(" T conelens::cpu::avx2::" in line for line in lines)
    # an exception table's personality is data that all objects share on purpose
    shared = [line for line in lines if any(kind in line for kind in (" W ", " V ", " u ")) and "DW.ref." not in line]
    assert shared == []


def test_only_the_interface_is_exported() -> None:
    text = run(tool("nm"), "-C", "-D", "--defined-only", LIBRARY).stdout
    names = [line.split(" ", 2)[2] for line in text.splitlines() if " T " in line]
    assert "conelens_max_unpool2d_cpu" in names
    assert all(
        name.startswith(("conelens_", "conelens::isa", "conelens::active_isa", "conelens::select_isa")) for name in names
    )


def test_threads_are_those_of_torch() -> None:
    needed = run(tool("readelf"), "-d", LIBRARY).stdout
    assert "libgomp.so.1" in needed, "a renamed OpenMP runtime would fight torch's over the cores"
    if Path("/proc/self/maps").exists():  # a process of its own: scikit-learn's wheel, in others, brings a runtime of its own
        code = "import conelens._core; print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
        loaded = run(sys.executable, "-c", f"import torch; {code}").stdout.strip()
        assert loaded.count("libgomp") == 1, loaded


def test_runs_in_a_forked_child() -> None:
    code = """
import os, torch
from conelens import ops
x = torch.randn(4, 8, 128, 128)
torch.set_num_threads(2)
a = ops.max_pool2d_with_switches(x, 2)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    b = ops.max_pool2d_with_switches(x, 2)
    os._exit(0 if torch.equal(a.pooled, b.pooled) else 1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(sys.executable, "-c", code).returncode == 0


# --- other tools ----------------------------------------------------------------------------------


def test_module_works_without_torch() -> None:
    code = f"""
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_core", {core.__file__!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
pooled, switches = np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.uint8)
core.max_pool2d_with_switches(x, pooled, switches, (2, 2), (2, 2), (0, 0), (1, 1), True, 1)
assert pooled.ravel().tolist() == [5, 7, 13, 15] and switches.ravel().tolist() == [3] * 4
assert "torch" not in sys.modules
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_windows_of_a_row_that_is_not_there() -> None:
    """The binding says so and writes nothing; the C launcher, which cannot name it, writes the fill."""
    base, out = np.ones((1, 2, 3, 3), np.float32), np.full((2, 2, 2, 2), 9, np.float32)
    origin, rows = np.zeros((2, 2), np.int64), np.array([0, 1], np.int32)
    assert core.gather_windows(base, None, None, origin, rows, out, 5.0, False, 1) is False
    assert (out == 9).all()
    params = GatherWindows(
        base=base.ctypes.data, window_origin=origin.ctypes.data, rows=rows.ctypes.data, out=out.ctypes.data,
        samples=1, units=2, channels=2, height=3, width=3, out_height=2, out_width=2,
        base_stride=(18, 9, 3, 1), out_stride=(8, 4, 2, 1), element_bytes=4, window_origin_bytes=8, rows_bytes=4,
        fill=int(np.float32(5).view(np.uint32)),
    )  # fmt: skip
    assert ctypes.CDLL(str(LIBRARY)).conelens_gather_windows_cpu(ctypes.byref(params), 1) == 0
    assert (out[0] == 1).all() and (out[1] == 5).all()


class GatherWindows(ctypes.Structure):
    """conelens_gather_windows_params of gather_windows.h"""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("base", "patch", "patch_origin", "window_origin", "rows", "out")),
        *((name, ctypes.c_int64) for name in ("samples", "units", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("patch_height", "patch_width", "out_height", "out_width")),
        *((name, ctypes.c_int64 * 4) for name in ("base_stride", "patch_stride", "out_stride")),
        ("fill", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("element_bytes", "dtype", "patch_origin_bytes", "window_origin_bytes")),
        *((name, ctypes.c_int32) for name in ("rows_bytes", "add")),
    ]


def test_c_program_uses_the_library(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or tool("gcc")
    source, program = tmp_path / "use.c", tmp_path / "use"
    source.write_text(
        """
#include "conelens.h"
#include <stdio.h>

int main(void) {
  float x[16], pooled[4];
  unsigned char switches[4];
  for (int i = 0; i < 16; ++i) x[i] = (float)(i % 5);
  conelens_max_pool2d_params p = {0};
  p.x = x, p.pooled = pooled, p.switches = switches;
  p.batch = p.channels = 1, p.height = p.width = 4, p.out_height = p.out_width = 2;
  for (int i = 0; i < 2; ++i) p.kernel[i] = p.stride[i] = 2, p.dilation[i] = 1;
  p.x_stride[0] = p.x_stride[1] = 16, p.x_stride[2] = 4, p.x_stride[3] = 1;
  p.pooled_stride[0] = p.pooled_stride[1] = p.switches_stride[0] = p.switches_stride[1] = 4;
  p.pooled_stride[2] = p.switches_stride[2] = 2, p.pooled_stride[3] = p.switches_stride[3] = 1;
  p.dtype = CONELENS_FLOAT32, p.switch_bytes = 1;
  int code = conelens_max_pool2d_with_switches_cpu(&p, 1);
  if (code) return puts(conelens_error_string(code)), 1;
  for (int i = 0; i < 4; ++i) printf("%g:%d ", pooled[i], switches[i]);
  p.dtype = 99;
  return conelens_max_pool2d_with_switches_cpu(&p, 1) != CONELENS_UNSUPPORTED_DTYPE;
}
"""
    )
    include, folder = LIBRARY.with_name("include"), LIBRARY.parent
    built = run(
        compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{include}", source, LIBRARY,
        f"-Wl,-rpath,{folder}", "-o", program,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    done = run(program)
    assert done.returncode == 0, done.stderr
    x = torch.tensor([float(i % 5) for i in range(16)]).reshape(1, 1, 4, 4)
    pooled, switches = ops.max_pool2d_with_switches(x, 2)
    expected = [f"{v:g}:{s}" for v, s in zip(pooled.flatten().tolist(), switches.flatten().tolist(), strict=True)]
    assert done.stdout.split() == expected
