"""The backend `ptx_nvcc` of the generated tests: CUDA kernels as nvcc compiled them to PTX, executed by the machine.

The host code of csrc/*/cuda.cu, compiled by g++ for tests/emulation, checks arguments, allocates outputs and chooses
the launches. Each launch is then handed to the machine instead of running the g++ code of the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import runpy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.emulation import backend as emulation
from tests.emulation import build
from tests.helpers.cases import outputs
from tests.ptx.compile import ROOT, cache
from tests.ptx.machine import Machine, assembled
from tests.ptx.memory import READ, WRITE, GlobalMemory
from tests.ptx.parse import PtxError
from vlmfast import backends
from vlmfast.architectures import NVCC_FLAGS

TARGET = "sm_90"
FAR = 2**20  # bytes between rows, from which on it is not recorded that those between are nobody's
# The kernel, addresses of its arguments, their number, grid and block, bytes of dynamic shared memory; returns 0 if all
# is well.
Executor = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
)


@functools.cache
def find_nvcc() -> str | None:
    return runpy.run_path(str(ROOT / "scripts" / "compile_cuda.py"))["find_nvcc"]()


@functools.cache
def _version(nvcc: str) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def compiled(source: Path, csrc: Path = build.CSRC, folder: Path | None = None) -> str:
    """Compile a .cu file to PTX with source lines, or find it in the cache.

    Args:
        source: the file.
        csrc: the folder of its headers.
        folder: the cache; by default build/ptx.

    Raises:
        RuntimeError: if nvcc fails, with its message.
    """
    nvcc = find_nvcc()
    inputs = [source, *csrc.glob("*/*.h"), *csrc.glob("*/*.cuh")]
    command = [nvcc, *NVCC_FLAGS, "-w", "-lineinfo", "-ptx", f"-arch={TARGET}"]
    command += [f"-I{csrc}", f"-I{build.TORCH / 'include'}", str(source)]
    version = f"{torch.__version__} {_version(nvcc)}"
    return build.compiled(command, inputs, ".ptx", folder or cache(), version).read_text()


def unified(name: str) -> str:
    """Return a mangled name without what g++ and nvcc encode differently.

    That is the name of an anonymous namespace, with its length in front, and the L of names that only their file knows.
    """
    pieces, at = [], 0
    for found in re.finditer(r"(\d+)_GLOBAL__N_", name):
        pieces += [name[at : found.start()], "9anonymous"]
        at = found.end(1) + int(found[1])
    return re.sub(r"L(?=\d)", "", "".join([*pieces, name[at:]]))


def split(ptx: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """Split a module into what all its kernels share, and the name and text of each kernel, by its unified name."""
    ptx = re.sub(r"^\s*\.section\b.*?^\s*\}", "", ptx, flags=re.S | re.M)  # debug information
    entry = re.compile(r"^(?:\.visible |\.weak )?\.entry (\w+)\(.*?^\}", re.S | re.M)
    return entry.sub("", ptx), {unified(found[1]): (found[1], found[0]) for found in entry.finditer(ptx)}


def symbols(library: Path) -> dict[str, int]:
    """Return the address of each function of a library, relative to its begin."""
    lines = subprocess.run(["nm", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    return {name: int(address, 16) for address, kind, name in map(str.split, lines.splitlines()) if kind in "tTwW"}


class Family:
    """The kernels of one family: a library with their host code, its ops, and the PTX of the kernels."""

    def __init__(self, library: Path, namespace: str, ptx: str) -> None:
        torch.ops.load_library(str(library))
        self.library, self.ops = emulation.open_library(library), getattr(torch.ops, namespace)
        known = symbols(library)
        anchor = ctypes.cast(self.library.vlmfast_emulation_execute_by, ctypes.c_void_p).value
        begin = anchor - known["vlmfast_emulation_execute_by"]
        self.names = {begin + offset: unified(name) for name, offset in known.items()}
        self.head, self.entries = split(ptx)
        self.machines: dict[str, Machine] = {}  # of the kernels that have run
        self.executor = Executor(self._execute)
        self.error: BaseException | None = None

    def __call__(self, name: str, *args: Any) -> tuple[torch.Tensor, ...]:
        """Run an op, as `harness.Kernels` does."""
        with self.executing():
            return outputs(getattr(self.ops, name)(*args))

    def machine(self, name: str) -> Machine:
        """Return the machine of a kernel, assembling it on first use."""
        if name not in self.machines:
            if name not in self.entries:
                raise PtxError(f"nvcc has compiled no kernel {name}")
            own, text = self.entries[name]
            self.machines[name] = assembled(f"{self.head}\n{text}", own)
        return self.machines[name]

    def memory(self) -> GlobalMemory:
        """Return the memory that the launcher allows its kernels to access."""
        memory, facts = GlobalMemory(ordered=True), (ctypes.c_int64 * 5)()
        number = 0
        while self.library.vlmfast_emulation_region(ctypes.c_size_t(number), facts):
            begin, rows, row_bytes, pitch, writable = facts
            allowed = READ | WRITE * writable
            if pitch > FAR:
                for row in range(rows):
                    memory.allow(begin + row * pitch, np.full(row_bytes, allowed, np.uint8))
            else:
                flags = np.zeros(max(0, (rows - 1) * pitch + row_bytes), np.uint8)
                np.lib.stride_tricks.as_strided(flags, (rows, row_bytes), (pitch, 1))[:] = allowed
                memory.allow(begin, flags)
            number += 1
        return memory

    def _execute(self, kernel: int, arguments: Any, count: int, shape: Any, shared: int) -> int:
        """Run a launch; an error is kept, because none can pass through the launcher's C++."""
        try:
            machine = self.machine(self.names[kernel])
            places = machine.kernel.params.values()
            if len(places) != count:
                raise PtxError(f"{machine.kernel.name} has {len(places)} parameters, and is called with {count}")
            params = bytearray(machine.kernel.param_size)
            for index, (offset, size) in enumerate(places):
                params[offset : offset + size] = ctypes.string_at(arguments[index], size)
            machine.launch(self.memory(), tuple(shape[:3]), tuple(shape[3:6]), bytes(params), shared)
        except BaseException as error:
            self.error = error
            return 1
        return 0

    @contextlib.contextmanager
    def executing(self) -> Iterator[None]:
        """Execute the launches of the block by the machine, and raise what they raise."""
        self.error = None
        self.library.vlmfast_emulation_execute_by(self.executor)
        try:
            yield
        except RuntimeError:
            if self.error is None:
                raise
            raise self.error from None
        finally:
            self.library.vlmfast_emulation_execute_by(None)


def parts(name: str) -> tuple[Path, str, str]:
    """Compile csrc/<name>/cuda.cu, or find it compiled; return what `Family` is made of."""
    return build.build("plain"), "vlmfast_emulated", compiled(build.CSRC / name / "cuda.cu")


@functools.cache
def family(name: str) -> Family:
    return Family(*parts(name))


def loader(op: str, family_name: str, reference: Callable[..., Any]) -> backends.Backend | str:
    """Load an op, as the loaders of `backends.LOADERS` do."""
    if find_nvcc() is None:
        return "there is no nvcc on PATH or in CUDA_HOME"
    found = emulation.loader(op, family_name, reference)
    if isinstance(found, str):
        return found

    @functools.wraps(found.run)
    def run(*args: Any) -> Any:
        with family(family_name).executing():
            return found.run(*args)

    return backends.Backend("ptx_nvcc", run, found.unsupported, found.absent_on)
