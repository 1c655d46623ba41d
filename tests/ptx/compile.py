"""Compile Triton kernels to PTX, with a cache keyed by content.

The tests run under Triton's interpreter, which compiles nothing. So kernels missing in the cache are compiled by
another process, `python -m tests.ptx.compile`, which answers each line of input with a line of output.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# Launch arguments that are not parameters of the kernel but options of its compilation.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "debug", "sanitize_overflow")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what its launch needs."""

    ptx: str
    shared: int  # bytes of dynamic shared memory
    passed: list[str]  # the arguments that are parameters of the PTX, in order
    divisible: list[str]  # those of them that the compiler assumes to be multiples of 16
    registers: int = 0  # per thread; this and the machine code are there only where they were asked for
    code: str = ""


@functools.cache
def _sources(module: str) -> str:
    """Hash all inputs of a module's kernels: Triton's version, the specialisation, and the modules it imports."""
    digest = hashlib.sha256(metadata.version("triton").encode())
    modules, paths = [module], [ROOT / "tests/helpers/specialisation.py", Path(__file__)]
    for name in modules:  # the loop appends to the list
        path = Path(sys.modules[name].__file__)
        paths.append(path)
        found = re.findall(r"^from (vlmfast\.kernels[\w.]*) import", path.read_text(), re.M)
        modules += sorted(set(found) - set(modules))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def cache() -> Path:
    """Return the cache folder in build/, or a temporary one where that cannot be written."""
    directory = ROOT / "build" / "ptx"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix="vlmfast-ptx-"))
    return directory


def _kind(value: Any, specialised: bool) -> Any:
    """Return all that a specialisation depends on: a tensor's dtype and alignment, a number's size and divisors."""
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, float):
        return 0.5
    if isinstance(value, int) and not isinstance(value, bool) and not (specialised and value == 1):
        wide = 0 if -(2**31) <= value < 2**31 else 2**32
        return wide + (16 if specialised and value % 16 == 0 else 3)
    return value


@functools.cache
def _constants(function: Callable[..., None]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if "constexpr" in str(p.annotation)}


def compiled(
    kernel: Any, arguments: dict[str, Any], options: dict[str, Any], target: str, code: bool = False
) -> Compiled:
    """Compile a kernel, or find it compiled, as the JIT would for these arguments.

    Args:
        kernel: the interpreter's object, which holds the arguments of its decorator.
        arguments: the arguments of the launch, by name.
        options: the `OPTIONS` that the launch gives.
        target: such as "sm_90".
        code: whether the registers and the machine code are needed.
    """
    function, left = kernel.fn, kernel.kwargs.get("do_not_specialize") or ()
    constants = _constants(function)
    kinds = {n: value if n in constants else _kind(value, n not in left) for n, value in arguments.items()}
    request = {"module": function.__module__, "kernel": function.__name__, "arguments": kinds}
    return _compiled(json.dumps({**request, "options": options, "target": target, "code": code}))


@functools.cache
def _compiled(request: str) -> Compiled:
    path = cache() / (
        hashlib.sha256((_sources(json.loads(request)["module"]) + request).encode()).hexdigest()[:32] + ".json"
    )
    if not path.exists():
        answer = _ask(request)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(answer)
        os.replace(partial, path)  # atomic, because this process may be stopped
    return Compiled(**json.loads(path.read_text()))


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    """Start the process that compiles; it ends with its input, when this process ends."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.ptx.compile"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True
    )


def _ask(request: str) -> str:
    process = _compiler()
    print(request, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(
            f"the process that compiles Triton kernels ended: see its messages; it was asked for {request}"
        )
    if "error" in json.loads(answer):
        raise RuntimeError(f"{json.loads(answer)['error']}, asked for {request}")
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import importlib

    import triton

    from tests.helpers.specialisation import TARGETS, Unaligned, source_of

    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    arguments = {}
    for name, kind in request["arguments"].items():
        if isinstance(kind, dict):
            dtype = getattr(torch, kind["dtype"])
            arguments[name] = torch.empty(0, dtype=dtype, device="meta") if kind["aligned"] else Unaligned(dtype)
        else:
            arguments[name] = kind
    source = source_of(kernel, arguments, request["target"])
    triton.knobs.runtime.add_stages_inspection_hook = None if request["code"] else _without_ptxas
    found = triton.compile(source, target=TARGETS[request["target"]], options=request["options"])
    passed = [name for name, kind in source.signature.items() if kind != "constexpr"]
    divisible = [parameter.name for index, parameter in enumerate(kernel.params) if (index,) in source.attrs]
    answer = {"ptx": found.asm["ptx"], "shared": found.metadata.shared, "passed": passed, "divisible": divisible}
    return answer | (_code(found.asm["cubin"]) if request["code"] else {})


def _without_ptxas(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
    """Skip ptxas, as a hook of Triton's compiler stages; called without arguments, identify the hook."""
    if backend is None:
        return "without ptxas", "without ptxas"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def _code(cubin: bytes) -> dict[str, Any]:
    """Disassemble a kernel's machine code by the tools that come with Triton."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        pipe = {"env": environment, "capture_output": True, "text": True, "check": True}
        usage, code = (
            subprocess.run([folder / "cuobjdump", option, file.name], **pipe).stdout
            for option in ("-res-usage", "-sass")
        )
    code = "\n".join(line for line in code.splitlines() if ";" in line)  # drops lines with only the encoding
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "code": code}


def main() -> None:
    gc.disable()  # there is little garbage, and much that the collector would look at again and again
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception as error:  # the asking process raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
