"""Compile csrc/*/*.cu and the emulation's runtime with g++ into one shared library."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
CXX = os.environ.get("CXX", "g++")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
COMMON += ["-fno-gnu-unique"]  # otherwise several loaded builds would share the statics of templates
COMMON += ["-DVLMFAST_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
UNDEFINED = "alignment,bounds,float-cast-overflow,integer-divide-by-zero,return,shift,signed-integer-overflow"
CHECK = ["-O0", "-g1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]  # a hook for every access
CHECK += [f"-fsanitize={UNDEFINED}", "-ftrivial-auto-var-init=pattern"]  # variables start as garbage, not as zero
MODES = {"plain": ["-O1"], "check": CHECK}
RUNTIME = ("scheduler.cpp", "warp.cpp", "memory.cpp")


def missing() -> str | None:
    """Say why the emulation cannot be compiled here; None if it can."""
    if shutil.which(CXX) is None:
        return f"there is no compiler {CXX}"
    return None


@functools.cache
def _cache() -> Path:
    """Return the cache folder in build/, or a temporary one where that cannot be written."""
    directory = CSRC.parent / "build" / "emulation"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix="vlmfast-emulation-"))
    return directory


def compiled(
    command: Sequence[str | Path], inputs: Iterable[Path], suffix: str, cache: Path, version: str = torch.__version__
) -> Path:
    """Run a compiler command; the output comes from the cache where command, version and inputs are unchanged."""
    key = hashlib.sha256(repr([*map(str, command), version]).encode())
    for path in sorted(inputs):
        key.update(path.read_bytes())
    output = cache / (key.hexdigest()[:32] + suffix)
    if output.exists():  # before the lock, because the folder may be read-only
        return output
    with open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, so that only one process builds the output
        if not output.exists():
            partial = output.with_suffix(f".partial{suffix}")
            result = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{command[0]} failed:\n{result.stderr}")
            os.replace(partial, output)  # atomic, because this process may be stopped
    return output


def _in_any_order(sources: Iterable[Path]) -> list[Path]:
    """Shuffle the sources, so that processes that build at the same time begin with different files."""
    return sorted(sources, key=lambda source: hashlib.sha256(f"{source} {os.getpid()}".encode()).digest())


def build(
    mode: str = "plain",
    *,
    bfloat16_alone: bool = False,
    library: str = "vlmfast_emulated",
    csrc: Path = CSRC,
    sources: Iterable[Path] | None = None,
    cache: Path | None = None,
) -> Path:
    """Compile the kernels for the CPU.

    Args:
        mode: "plain" is fast; "check" checks every access.
        bfloat16_alone: whether kernels for other dtypes are left out, which halves the time.
        library: the namespace of the ops under ``torch.ops``; a process may load several libraries.
        csrc: the folder of sources and headers.
        sources: the .cu files; by default all of ``csrc``.
        cache: the folder for outputs from ``csrc``, by default build/emulation, where the runtime's always go.

    Returns:
        The path of the shared library, whose name is a hash of its content.

    Raises:
        RuntimeError: if the compiler fails, with its message.
    """

    def compile_source(source: Path, flags: Sequence[str], headers: Iterable[Path], cache: Path) -> Path:
        return compiled([CXX, *COMMON, *flags, "-x", "c++", "-c", source], [source, *headers], ".o", cache)

    own_headers = list(HERE.glob("*.h"))
    headers = [*own_headers, *csrc.glob("*/*.h"), *csrc.glob("*/*.cuh")]
    flags = [*MODES[mode], f"-I{HERE}", f"-I{csrc}", "-isystem", str(TORCH / "include")]
    flags += [f"-DVLMFAST_CUDA_LIBRARY={library}", *["-DVLMFAST_BFLOAT16_ALONE"] * bfloat16_alone]
    cache, sources = cache or _cache(), list(sources or csrc.glob("*/*.cu"))
    objects = [compile_source(HERE / name, ["-O2"], own_headers, _cache()) for name in RUNTIME]
    by_source = {source: compile_source(source, flags, headers, cache) for source in _in_any_order(sources)}
    objects += [by_source[source] for source in sorted(by_source)]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}", "-ldl"]
    return compiled([CXX, "-shared", "-Wl,-Bsymbolic,--no-undefined", *objects, *libraries], objects, ".so", cache)
