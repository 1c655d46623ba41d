"""Build vlmfast/_C.so: always the CPU kernels, and the CUDA kernels if nvcc and a CUDA build of torch are installed.

The library does not use Python's API and needs only torch's stable ABI, so one wheel serves every Python and torch >=
2.10, on one platform. If it cannot be built, the package installs without it and runs on its Triton and PyTorch
backends, from a wheel for every platform; with VLMFAST_REQUIRE_EXTENSION=1 that is an error instead.

A wheel has the CPU kernels for every instruction set. An editable installation has those that the machine it is made on
can run, and so is slower on a newer one than it could be. VLMFAST_HIGHEST_LEVEL, such as v4_bf16, names the highest
that is compiled instead.

The environment variables CXX, NVCC or CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

COMPILED = runpy.run_path(str(ROOT / "vlmfast" / "architectures.py"))
CXX_FLAGS = [*COMPILED["CXX_FLAGS"], f"-I{CSRC}", "-fPIC", "-fvisibility=hidden", "-Wall"]
# The kernels reproduce torch's arithmetic bit for bit, so the compiler may not fuse multiply and add on its own.
KERNEL_FLAGS = ["-fno-math-errno", "-ffp-contract=off"]
CUDA_FLAGS = [*COMPILED["NVCC_FLAGS"], f"-I{CSRC}"]
CUDA_ARCHITECTURES = COMPILED["CUDA"]
TORCH_LIBRARIES = ["-ltorch", "-ltorch_cpu", "-lc10"]

# csrc/*/*_kernels.cpp is compiled once per level; csrc/common/cpu.h chooses one at run time. Only families
# whose header says `kHasBf16Level` have code for the last level.
CPU_LEVELS = {
    "baseline": "-march=x86-64",
    "v3": "-march=x86-64-v3",
    "v4": "-march=x86-64-v4",
    "v4_bf16": "-march=x86-64-v4 -mavx512bf16",
}
HIGHEST_LEVEL = "v4_bf16"


class BuildError(Exception):
    """Why a part of the extension cannot be built."""


def import_torch() -> ModuleType:
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        raise BuildError(f"no torch in the build's environment ({error}); pip needs --no-build-isolation") from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        raise BuildError(f"torch >= 2.10 is needed, got {torch.__version__}")
    return torch


def find_program(variable: str, names: list[str]) -> list[str]:
    """Return the command line of a compiler: the environment variable's, or the first of the names on PATH."""
    command = shlex.split(os.environ.get(variable, "")) or next(([name] for name in names if shutil.which(name)), [])
    if not command or not shutil.which(command[0]):
        raise BuildError(f"there is no compiler ({' or '.join(names)} on PATH, or {variable})")
    return command


def find_compiler() -> list[str]:
    return find_program("CXX", ["c++", "g++", "clang++"])


def architecture_flags(architectures: str) -> list[str]:
    """Translate a list like "8.0;9.0+PTX" into nvcc's flags."""
    flags = []
    for name in re.findall(r"[^;, ]+", architectures):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def output_of(command: list[str]) -> str:
    """Run a command and return what it printed."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def include_flags(torch: ModuleType) -> list[str]:
    return [f"-I{path}" for path in torch.utils.cpp_extension.include_paths("cpu")]


def has_levels() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def level_of_this_machine(compiler: list[str]) -> str:
    """Return the highest level that this machine can run, by the compiler's macros for instruction sets."""

    def macros(flags: str) -> set[str]:
        listed = output_of([*compiler, *flags.split(), "-dM", "-E", "-x", "c++", os.devnull])
        return set(re.findall(r"^#define (\w+)", listed, re.M))

    baseline, own = macros(CPU_LEVELS["baseline"]), macros("-march=native")
    return [level for level, flags in CPU_LEVELS.items() if macros(flags) - baseline <= own][-1]


def levels_up_to(highest: str) -> dict[str, str]:
    """Return the levels to compile, the lowest first, and their flags."""
    if highest not in CPU_LEVELS:
        raise BuildError(f"VLMFAST_HIGHEST_LEVEL must be one of {', '.join(CPU_LEVELS)}, got {highest}")
    names = list(CPU_LEVELS)
    return {name: CPU_LEVELS[name] for name in names[: names.index(highest) + 1]}


def cpu_commands(torch: ModuleType, compiler: list[str], highest: str = HIGHEST_LEVEL) -> list[list[str]]:
    """Make the command that compiles each object file of the CPU part, for the levels up to the highest."""
    levels = levels_up_to(highest) if has_levels() else {"baseline": ""}
    commands = []
    for source in sorted(CSRC.glob("*/*.cpp")):
        variants = [[*include_flags(torch), f"-DVLMFAST_HIGHEST_LEVEL={list(levels)[-1]}"]]
        if source.stem.endswith("_kernels"):
            variants = [
                [*KERNEL_FLAGS, *flags.split(), f"-DVLMFAST_ISA={level}"]
                for level, flags in levels.items()
                if level != "v4_bf16" or "kHasBf16Level" in source.with_suffix(".h").read_text()
            ]
        commands += [[*compiler, *CXX_FLAGS, *flags, "-c", str(source)] for flags in variants]
    return commands


def default_architectures(compiler: list[str]) -> str:
    """Return those of CUDA_ARCHITECTURES that this nvcc knows; an unknown one would make the whole build fail."""
    known = output_of([*compiler, "--list-gpu-arch"]).split()
    names = [f"{number // 10}.{number % 10}" for number in CUDA_ARCHITECTURES if f"compute_{number}" in known]
    return ";".join(names) + "+PTX" if names else ""  # PTX of the newest, for GPUs that are newer still


def check_cuda_version(torch: ModuleType, compiler: list[str]) -> None:
    """Refuse an nvcc of another major version than torch's CUDA, whose runtime the library is linked with."""
    release = re.search(r"release (\d+)\.", output_of([*compiler, "--version"]))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = "unknown" if release is None else release[1]
        raise BuildError(f"torch is built for CUDA {torch.version.cuda}, and the major version of nvcc is {found}")


def cuda_commands(torch: ModuleType, compiler: list[str]) -> list[list[str]]:
    """Make the command that compiles each object file of the CUDA part."""
    check_cuda_version(torch, compiler)
    architectures = architecture_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(compiler))
    flags = [*CUDA_FLAGS, *architectures, *include_flags(torch)]
    return [[*compiler, *flags, "-c", str(source)] for source in sorted(CSRC.glob("*/*.cu"))]


def compile_all(commands: list[list[str]], objects: Path, pool: Executor) -> Iterator[Path]:
    """Start the compilations, and return the objects as they are waited for.

    The name of an object has a hash of its command and of all of csrc, so that only what has changed is compiled again,
    whatever the times of the files are.
    """
    if not commands:
        raise BuildError(f"there are no sources in {CSRC}")
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(CSRC.glob("*/*"))))

    def compile_one(command: list[str]) -> Path:
        source, digest = Path(command[-1]), sources.copy()
        digest.update(shlex.join(command).encode())
        path = objects / f"{source.parent.name}.{source.stem}.{digest.hexdigest()[:12]}.o"
        if not path.exists():
            write(command, path)
        return path

    return pool.map(compile_one, commands)


def write(command: list[str], output: Path) -> None:
    """Run a command that writes a file; if it is stopped, there is not half of one."""
    partial = output.with_name(f"partial.{output.name}")
    output_of([*command, "-o", str(partial)])
    partial.replace(output)


def link(torch: ModuleType, linker: list[str], output: Path, objects: list[Path], libraries: list[str]) -> None:
    """Link the library against torch."""
    flags = ["-shared", "-Xlinker", "-s", *(f"-L{path}" for path in torch.utils.cpp_extension.library_paths("cpu"))]
    output.parent.mkdir(parents=True, exist_ok=True)
    write([*linker, *flags, *map(str, objects), *libraries], output)


def start_cuda(torch: ModuleType, objects: Path, pool: Executor) -> tuple[list[str], Iterator[Path]]:
    """Start to compile the CUDA part; return its compiler, which also links, and the objects."""
    home = torch.utils.cpp_extension.CUDA_HOME
    nvcc = find_program("NVCC", [*([str(Path(home) / "bin" / "nvcc")] if home else []), "nvcc"])
    return nvcc, compile_all(cuda_commands(torch, nvcc), objects, pool)


def build(output: Path, objects: Path, for_this_machine: bool = False) -> None:
    """Compile and link the extension; leave the CUDA kernels out if they cannot be built."""
    torch = import_torch()
    compiler = find_compiler()
    highest = HIGHEST_LEVEL  # a wheel has all
    if for_this_machine and has_levels():
        highest = os.environ.get("VLMFAST_HIGHEST_LEVEL") or level_of_this_machine(compiler)
    commands = cpu_commands(torch, compiler, highest)
    objects.mkdir(parents=True, exist_ok=True)
    cuda = None
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        try:
            if torch.version.cuda is not None and any(CSRC.glob("*/*.cu")):
                cuda = start_cuda(torch, objects, pool)  # first, because these take longest
        except BuildError as error:
            leave_out("the CUDA kernels", error)
        cpu = list(compile_all(commands, objects, pool))
        try:
            if cuda is not None:  # linked with the CUDA runtime that torch brings
                nvcc, of_cuda = cuda
                libraries = [*TORCH_LIBRARIES, "-ltorch_cuda", "-lc10_cuda"]
                link(torch, [*nvcc, "-cudart", "shared"], output, [*cpu, *of_cuda], libraries)
                return
        except BuildError as error:
            leave_out("the CUDA kernels", error)
    link(torch, compiler, output, cpu, TORCH_LIBRARIES)


def leave_out(part: str, reason: BuildError) -> None:
    """Print that a part is left out, and go on; with VLMFAST_REQUIRE_EXTENSION=1, stop."""
    if os.environ.get("VLMFAST_REQUIRE_EXTENSION") == "1":
        raise SystemExit(f"vlmfast: {part} cannot be built: {reason}")
    print(f"vlmfast: {part} are left out: {reason}", file=sys.stderr)


class BuildLibrary(build_ext):
    """Builds a plain shared library, not a Python extension module as setuptools does."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        if not self.inplace:
            output.unlink(missing_ok=True)  # of an earlier build: a wheel must not have it if this one fails
        stays = bool(self.editable_mode or self.inplace)
        try:
            build(output, Path(self.build_temp).absolute(), for_this_machine=stays)
        except BuildError as error:
            leave_out("the compiled kernels", error)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for every Python 3: on this platform, or on all where the extension was left out."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        library = self.get_finalized_command("build_ext").get_ext_fullpath("vlmfast._C")
        if not Path(library).exists():
            self.distribution.ext_modules = []  # the files then go where those of a pure package go
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # and not where `build` alone is wanted
    setup(
        ext_modules=[Extension("vlmfast._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
    )
