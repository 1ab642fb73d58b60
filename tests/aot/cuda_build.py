"""Compiles a CUDA kernel for sm_90 and reads its machine code back; builds the emulated module."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
FOLDERS = sorted(path for path in KERNELS.iterdir() if path.is_dir())
INCLUDES = [f"-I{path}" for path in (ROOT / "csrc", KERNELS, *FOLDERS)]


@dataclass
class Compiled:
    """One __global__ function: demangled name, stack and local bytes, and how often each access occurs."""

    name: str
    stack: int
    accesses: Counter[str]  # "LDG.128", "STG.32", "LDL.32", "HMMA" ...


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton's package carries."""
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None:
        carried = Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found


def _demangle(text: str) -> str:
    plain = subprocess.run(["c++filt", "-p"], input=text, capture_output=True, text=True, check=True).stdout
    for noise in ("conelens::", "cuda::", "(anonymous namespace)::"):
        plain = plain.replace(noise, "")
    return plain


def compile_kernels(nvcc: str, source: Path, folder: Path, arch: int = 90) -> list[Compiled]:
    """All kernels of one .cu file; raises on a compiler warning."""
    cubin = folder / (source.parent.name + source.stem + ".cubin")
    report = _run(nvcc, "-std=c++17", f"-arch=sm_{arch}", "-O3", f"-I{source.parent}", *INCLUDES, "-cubin",
                  "-Xcompiler=-Wall,-Wextra", "-o", cubin, source)  # fmt: skip
    if "warning" in report:
        raise RuntimeError(f"nvcc warns:\n{report}")
    tool = disassembler()
    assert tool is not None
    usage = _demangle(_run(tool, "-res-usage", cubin))
    stacks = {
        name.strip(): int(stack) + int(local)
        for name, stack, local in re.findall(r"Function (.*):\n.*?STACK:(\d+).*?LOCAL:(\d+)", usage)
    }
    kernels = []
    for part in _demangle(_run(tool, "-sass", cubin)).split("Function : ")[1:]:
        name = part.partition("\n")[0].strip()
        accesses: Counter[str] = Counter()
        for operation, modifiers in re.findall(r"\b(LDG|STG|LDL|STL|HMMA|LDGSTS)((?:\.\w+)*)", part):
            width = next((m for m in modifiers.split(".") if m in ("128", "64", "U8", "S8", "U16")), "32")
            accesses[operation if operation == "HMMA" else f"{operation}.{width}"] += 1
        kernels.append(Compiled(name, stacks[name], accesses))
    return kernels


def problems(kernels: list[Compiled], wanted: dict[str, set[str]]) -> list[str]:
    """What is wrong: spills anywhere, and for each name pattern the accesses that its kernels lack."""
    found = [f"{k.name} spills: {k.stack} bytes of stack" for k in kernels if k.stack]
    found += [f"{k.name} loads from local memory" for k in kernels if k.accesses["LDL.32"]]
    for pattern, needs in wanted.items():
        matching = [k for k in kernels if re.match(pattern, k.name)]
        if not matching:
            found.append(f"no kernel is called {pattern}")
        found += [f"{k.name} has no {need}" for k in matching for need in needs if not k.accesses[need]]
    return found


def build_emulated(folder: Path) -> ModuleType:
    """The CUDA kernels as a host module (tests/aot/emulation): same source, one fiber per thread."""
    emulation = Path(__file__).parent / "emulation"
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    flags += [f"-I{emulation}", *INCLUDES]
    objects = []
    for source in sorted(KERNELS.glob("*/cuda*.cu")):
        objects.append(folder / f"{source.parent.name}_{source.stem}.o")
        _run("g++", *flags, f"-I{source.parent}", "-x", "c++", "-c", source, "-o", objects[-1])
    python = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    library = folder / "emulated.so"
    _run("g++", *flags, *python, "-shared", emulation / "emulated.cpp", *objects, "-o", library)
    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emulated"] = module
    spec.loader.exec_module(module)
    return module
