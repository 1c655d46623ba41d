"""Rules for every file and op, and checks of every Triton kernel as compiled for GPUs that this machine lacks."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.cases import EACH_OP, PRIMITIVE, each, require
from vlmfast.architectures import GPUS
from vlmfast.registry import Op

ROOT = Path(vlmfast.__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("vlmfast", "kernels", "csrc", "tests", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}
    and path.relative_to(ROOT).parts[:2] not in {("vlmfast", "kernels"), ("vlmfast", "benchmarks")}  # symbolic links
)
TARGETS = tuple(GPUS)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parameters(function) -> list:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("op", each(PRIMITIVE))
def test_triton_launcher_has_the_signature_of_the_definition(op: Op):
    require(op, "triton")
    backend = op.backend("triton")
    assert parameters(backend.run) == parameters(op.reference)


@pytest.mark.parametrize("backend", ["native", "emulated"])
@pytest.mark.parametrize("op", each(PRIMITIVE))
def test_compiled_op_has_the_schema_of_the_definition(op: Op, backend: str):
    require(op, backend)
    compiled, defined = (
        str(getattr(getattr(torch.ops, namespace), op.name).default._schema).partition("::")[2]
        for namespace in (f"vlmfast_{backend}", "vlmfast")
    )
    assert compiled == defined


@pytest.mark.parametrize("op", EACH_OP)
def test_op_is_documented(op: Op):
    for part in ("Args:", "Returns:", "Raises:", "Source:", *inspect.signature(op.reference).parameters):
        assert part in op.reference.__doc__, part


def test_public_names_are_documented():
    for name in vlmfast.__all__:
        assert getattr(vlmfast, name).__doc__, name


def test_docs_show_the_kinds_of_parameters():
    def function(a: Tensor, /, b: int | None = None, *args: Any, c: str = "x", **kwargs: Any) -> Tensor:
        raise NotImplementedError

    signature = runpy.run_path(str(ROOT / "scripts" / "docs_methods.py"))["signature"]
    want = "f(a: Tensor, /, b: int | None = None, *args: Any, c: str = 'x', **kwargs: Any) -> Tensor"
    assert signature("f", function) == want


def test_kernels_is_not_an_importable_package():
    """In the root of the repository, kernels/__init__.py would shadow the Hugging Face package ``kernels``."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "vlmfast" / "kernels").resolve() == ROOT / "kernels"


def test_file_length():
    assert not [name_of(path) for path in SOURCES if len(path.read_text().splitlines()) > 400]


def long_functions(path: Path) -> Iterator[str]:
    """Name the functions of a Python file with 80 lines or more, not counting docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            prose = first.end_lineno - first.lineno if isinstance(first, ast.Expr) else 0
            if node.end_lineno - node.lineno - prose >= 80:
                yield f"{name_of(path)}: {node.name}"


def long_compiled_functions(path: Path) -> Iterator[str]:
    """Name the long functions of a C++ or CUDA file, by clang-format's indentation.

    A function begins in the last line before its opening brace that has the brace's indentation.
    """
    lines = path.read_text().splitlines()
    depths = [len(line) - len(line.lstrip()) for line in lines]
    for end in (index for index, line in enumerate(lines) if line.lstrip().startswith("}") and depths[index] <= 4):
        start = max(i for i in range(end) if lines[i] and lines[i][0] != "#" and depths[i] <= depths[end])
        kind = re.match(r" *(namespace|struct|class|enum|union|extern|template|public|private|\})", lines[start])
        if not kind and end - start >= 80:
            yield f"{name_of(path)}: {lines[start]}"


def test_function_length():
    assert not [name for path in PYTHON for name in long_functions(path)]
    assert not [name for path in SOURCES if path.suffix != ".py" for name in long_compiled_functions(path)]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name in {"cpu.cpp", "cuda.cu"}], ids=name_of)
def test_compiled_ops_declare_their_arguments_once(path: Path):
    """Only the family's ops.h declares names, shapes and dtypes of tensors, for both the CPU and CUDA."""
    assert not re.findall(r"\b(?:View|Size)\b[^;]*?[({]\"\w+\"", path.read_text())


def test_users_meet_no_assert():
    """An assert disappears under ``python -O``, and its error does not help a user."""
    product = [
        (path, ast.walk(ast.parse(path.read_text()))) for path in PYTHON if path.is_relative_to(ROOT / "vlmfast")
    ]
    assert not [(name_of(path), n.lineno) for path, nodes in product for n in nodes if isinstance(n, ast.Assert)]


# Compiling takes minutes: `make test` compiles what workloads launch on one GPU, `make test-thorough` the rest.
COMPILED = [pytest.param(["--workloads", "sm_90"], marks=pytest.mark.xdist_group("compiled"), id="workloads")]
COMPILED += [
    pytest.param([name], marks=[pytest.mark.xdist_group(name), pytest.mark.thorough], id=name) for name in TARGETS
]


@pytest.fixture(scope="session", params=COMPILED)
def compiled_kernels(request: pytest.FixtureRequest) -> list[dict]:
    """The records of every Triton kernel as compiled for one GPU."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, str(ROOT / "tests" / "helpers" / "compile_kernels.py"), *request.param]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_triton_kernels_of_every_op_compile(compiled_kernels: list[dict]):
    compiled = {record["op"] for record in compiled_kernels}
    assert compiled >= {op.name for op in PRIMITIVE if not op.backend("triton").absent}


def test_triton_kernels_spill_no_register(compiled_kernels: list[dict]):
    assert not [r for r in compiled_kernels if r["spills"]]


def test_triton_kernels_read_rows_in_vectors(compiled_kernels: list[dict]):
    """Workloads' rows, which are all multiples of 16 bytes (72 elements too), are loaded 16 bytes at a time.

    Kernels without a tensor of the call's dtype move single numbers, not rows, and are not checked. On gfx942 the limit
    is half as much: tiles are made for warps of 32 lanes, and a wave there has 64.
    """
    with_rows, narrow = {r["kernel"] for r in compiled_kernels if r["real"] and "*bf16" in r["types"]}, []
    for r in compiled_kernels:
        width = 8 if r["target"].startswith("gfx") else 16
        if r["real"] and r["kernel"] in with_rows and max(r["loads"]) < width:
            narrow.append((r["op"], r["kernel"], r["target"], r["types"], r["loads"]))
    assert not narrow


def test_triton_dots_of_half_precision_run_on_tensor_cores(compiled_kernels: list[dict]):
    found = [r for r in compiled_kernels if "bf16" in r["multiplied"]]
    assert found
    assert not [(r["kernel"], r["target"], r["constants"]) for r in found if not r["tensor_cores"]]


def test_a_record_of_the_report_keeps_its_order(monkeypatch):
    """Otherwise every line of the report would change whenever it is regenerated."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    summarised = runpy.run_path(str(ROOT / "scripts" / "static_report.py"))["summarised"]
    names = [f"name {index}" for index in range(9)]
    records = [{"kernel": "x", **dict.fromkeys(names, value)} for value in (2, 3)]
    (found,) = summarised(
        [{**record, "loads": [value]} for record, value in zip(records, (8, 4), strict=True)], ("kernel",)
    )
    assert found == {"kernel": "x", "specialisations": 2, **dict.fromkeys(names, 3), "loads": [4, 8]}
    assert list(found) == ["kernel", "specialisations", *names, "loads"]


def test_records_of_some_ops_are_replaced_in_their_place(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(str(ROOT / "scripts" / "static_report.py"))
    before = [{"op": name, "run": 1} for name in ("rms_norm", "coverage", "coverage", "silu_mul")]
    found = [{"op": name, "run": 2} for name in ("silu_mul", "silu_mul", "coverage")]
    now = script["replaced"](before, found, ("coverage", "silu_mul"))
    assert [(r["op"], r["run"]) for r in now] == [("rms_norm", 1), ("coverage", 2), ("silu_mul", 2), ("silu_mul", 2)]
    assert script["replaced"](before, found, ()) == found
    ops = ("coverage", "silu_mul")
    wanted = script["requested"](["saturation:coverage,silu_mul", "cuda"])
    assert wanted == {"saturation": ops, "predicted": ops, "cuda": ()}
    wrong = ["executed:coverage,nothing"], ["traffic:coverage"], ["saturation", "predicted:coverage"], ["sums:coverage"]
    for names in (*wrong, ["executed:coverage", "executed:farthest"]):
        with pytest.raises(SystemExit, match="static_report: "):
            script["requested"](names)


def test_faults_of_cuda_kernels_are_named():
    """scripts/compile_cuda.py finds the faults in the output of ptxas and cuobjdump for two kernels."""
    script = runpy.run_path(str(ROOT / "scripts" / "compile_cuda.py"))
    names = (
        "norm_kernel<__half, RowPolicy<8, 32, 2, 5, false> >",
        "norm_kernel<__half, RowPolicy<1, 32, 2, 5, false> >",
    )
    log = "".join(
        f"Compiling entry function '{name}' for 'sm_90'\n...\n {stack} bytes stack frame, 0 bytes spill stores, "
        f"0 bytes spill loads\nptxas info    : Used 40 registers, 64 bytes smem\n"
        for name, stack in (("vectors", 0), ("elements", 144))
    )
    disassembly = (
        "arch = sm_90\n Function : vectors\n LDG.E{} R4 ;\n STG.E.128 [R2] ;\n Function : elements\n LDG.E.U16 R4 ;"
    )
    for width, expected in ((".128.CONSTANT", []), (".64", [f"{names[0]} loads no 16 bytes at a time on sm_90"])):
        found = script["usages"](log, disassembly.format(width))
        assert found["elements"][90].loads == (2,)
        assert found["vectors"][90].stores == (16,)
        kernels = dict(zip(names, (found["vectors"], found["elements"]), strict=True))
        assert script["faults"](kernels) == [*expected, f"{names[1]} has a stack of 144 bytes on sm_90"]
