"""CUDA kernels as nvcc compiled them; `make test-ptx` runs all of them by the generated tests."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.cases import outputs, run, runnable, widened
from tests.helpers.rounding import assert_within
from tests.ptx.nvcc import split, unified
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
