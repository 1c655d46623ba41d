"""CUDA kernels as nvcc compiled them; `make test-ptx` runs all of them by the generated tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.emulation import build
from tests.emulation.harness import DIFFER, PAIRS, WRONG, Fault, compare, plant, sample_calls
from tests.helpers.cases import outputs, require, run, runnable, widened
from tests.helpers.rounding import assert_within
from tests.ptx.nvcc import Family, compiled, split, unified
from tests.ptx.parse import PtxError
from vlmfast.registry import OPS


@pytest.mark.parametrize("name", ["row_index", "top_tokens"])
def test_samples(name: str) -> None:
    """Two ops whose sources compile soon and whose kernels have barriers, shared memory and atomics."""
    op = OPS[name]
    for args in runnable(op, "ptx_nvcc", op.cases.samples("cpu", torch.bfloat16)):
        assert_within(run(op, "ptx_nvcc", args), outputs(op.reference(*args)), outputs(op.reference(*widened(args))))


def test_names_of_both_compilers() -> None:
    """The name of an anonymous namespace, a function that is static, and template arguments with an L of their own."""
    gcc = "_ZN7vlmfast12_GLOBAL__N_1L11norm_kernelI6__halfLi8ELb1EEEvPKT_"
    nvcc = "_ZN7vlmfast44_GLOBAL__N__75fd4552_7_cuda_cu_95eec473_469111norm_kernelI6__halfLi8ELb1EEEvPKT_"
    assert unified(gcc) == unified(nvcc) == "_ZN7vlmfast9anonymous11norm_kernelI6__halfLi8ELb1EEEvPKT_"
    assert unified(gcc) != unified(gcc.replace("Li8", "Li4"))


def test_a_module_is_split() -> None:
    kernels = "".join(f".visible .entry {name}(\n.param .u64 {name}_0\n)\n{{\nret;\n\n}}\n" for name in ("one", "two"))
    head, entries = split(f'.version 9.0\n{kernels}.section .debug_str\n{{\n.b8 1\n}}\n.file 1 "cuda.cu"\n')
    assert head.split() == [".version", "9.0", ".file", "1", '"cuda.cu"']
    assert list(entries) == ["one", "two"]
    assert entries["two"][1] == ".visible .entry two(\n.param .u64 two_0\n)\n{\nret;\n\n}"


BOUNDS = "outside all tensors|between the elements of a tensor"
FAULTS = [
    Fault(
        "barrier missing",
        "merge_rows.cuh",
        "    __syncthreads();\n    const int64_t out_column",
        "    const int64_t out_column",
        "a race: a load of what another warp stores|a load of what nobody has written",
    ),
    Fault(
        "vector too many loaded",
        "merge_rows.cuh",
        "k * kStep < loaded",
        "k * kStep <= loaded",
        BOUNDS,
    ),
    Fault(
        "vector too many stored",
        "merge_rows.cuh",
        "< left) {",
        "<= left) {",
        f"a race: two warps store, |{BOUNDS}",
    ),
    Fault(
        "own lane counted",
        "common.cuh",
        "(1u << threadIdx.x % kWarp) - 1",
        "(2u << threadIdx.x % kWarp) - 1",
        f"{DIFFER}|{BOUNDS}",
    ),
    # Inline PTX, in whose place the emulation has its own code.
    Fault("operands swapped", "cuda_compat.h", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', WRONG),
]


@pytest.mark.planted
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    require(OPS["top_tokens"], "ptx_nvcc")
    family = "attention_scores" if fault.file == "cuda_compat.h" else "token_merge"
    csrc, namespace = plant(fault, family, tmp_path), f"vlmfast_nvcc_{fault.name.replace(' ', '_')}"
    library = build.build("plain", bfloat16_alone=True, library=namespace, csrc=csrc, cache=tmp_path)
    kernels = Family(library, namespace, compiled(csrc / family / "cuda.cu", csrc, tmp_path))
    with pytest.raises((AssertionError, PtxError), match=fault.notice):
        compare(kernels, sample_calls(family, PAIRS, torch.bfloat16))
