"""Compiles what `launch` would run for a GPU that is not here, and reads the machine code back.

A test module that imports it is skipped where Triton is missing, or interprets: so it comes before any Triton kernel.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs conelens[triton]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile: run without TRITON_INTERPRET=1", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 227 * 1024


@dataclass
class Built:
    """One compiled kernel: its PTX, disassembly, registers per thread, spilled and shared bytes."""

    name: str
    grid: tuple[int, ...]
    ptx: str
    sass: str
    registers: int
    spilled: int
    shared: int


class _AbsentGpu:
    """What compiling needs of Triton's driver interface, for a device that is not in this machine."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """Stands in for a kernel: `kernel[grid](...)` compiles instead of running."""

    def __init__(self, kernel: Any, built: list[Built]) -> None:
        self.kernel, self.built = kernel, built

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            usage, sass = read_cubin(compiled.asm["cubin"])
            self.built.append(
                Built(
                    name=compiled.metadata.name,
                    grid=grid,
                    ptx=compiled.asm["ptx"],
                    sass=sass,
                    registers=usage["REG"],
                    spilled=usage["LOCAL"] + usage["STACK"],
                    shared=compiled.metadata.shared,
                )
            )

        return compile_only


def read_cubin(cubin: bytes) -> tuple[dict[str, int], str]:
    """({"REG": ..., "LOCAL": ..., "STACK": ...}, disassembly) of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = str(TOOLS / "cuobjdump")
        report, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    line = next(line for line in report.splitlines() if "REG:" in line)
    fields = (part.split(":") for part in line.split() if part[0].isalpha())
    usage = {field[0]: int(field[1]) for field in fields if len(field) == 2}
    return usage, sass


@contextmanager
def compile_instead_of_running(module: Any, names: tuple[str, ...], arch: int = 90) -> Iterator[list[Built]]:
    """Inside, launching any of the module's kernels `names` appends to the returned list."""
    built: list[Built] = []
    kernels = {name: getattr(module, name) for name in names}
    before = driver._active
    driver.set_active(_AbsentGpu(arch))
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, built))
        yield built
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
            kernel.device_caches.clear()  # binaries of this target must not be found by a real launch
        driver._active = before
