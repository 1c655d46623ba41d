"""Saturation of an H200's memory: how it is computed from machine code, and the report on each kernel."""

from __future__ import annotations

import json
import re

import pytest

from tests.emulation import build
from tests.helpers import in_flight
from tests.helpers.cases import require
from tests.ptx import nvcc, saturation, saturation_nvcc
from vlmfast.benchmarks.ops import STATIC_REPORT
from vlmfast.benchmarks.predicted import GPUS
from vlmfast.registry import OPS


def code(*lines: str) -> str:
    return "\n".join(f"/*{16 * at:04x}*/  {line} ;" for at, line in enumerate(lines))


def test_a_load_is_under_way_until_its_register_is_used() -> None:
    apart = code("LDG.E.128 R4, desc[UR4][R2.64]", "FADD R8, R7, R8", "LDG.E.128 R4, desc[UR4][R2.64+0x10]")
    together = code("LDG.E.128 R4, desc[UR4][R2.64]", "@P0 LDG.E.64 R8, desc[UR4][R2.64]", "FADD R9, R9, R4")
    assert (in_flight.outstanding(apart), in_flight.outstanding(together)) == (16, 24)
    overwritten = code("LDG.E R4, desc[UR4][R2.64]", "CS2R R4, SRZ", "LDG.E.U16 R6, desc[UR4][R2.64]")
    assert in_flight.outstanding(overwritten) == 4
    stored = code("LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "LDG.E R8, desc[UR4][R2.64]")
    assert in_flight.outstanding(stored) == 16


def test_a_copy_is_under_way_until_its_group_is_waited_for() -> None:
    copy = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]"
    pipeline = code(copy, "LDGDEPBAR", copy, "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", copy, "LDGDEPBAR")
    assert in_flight.outstanding(pipeline) == 32
    assert in_flight.outstanding(pipeline.replace("0x1 ", "0x0 ")) == 32
    assert in_flight.outstanding(code(copy, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", copy, copy)) == 32
    assert in_flight.outstanding(code(copy, "LDGDEPBAR", copy, copy)) == 48


def test_registers_and_shared_memory_say_how_many_blocks_there_are() -> None:
    assert in_flight.resident(registers=32, warps=8, shared=0) == 8  # 64 warps
    assert in_flight.resident(registers=101, warps=8, shared=0) == 2
    assert in_flight.resident(registers=32, warps=1, shared=0) == 32
    assert in_flight.resident(registers=32, warps=4, shared=100 << 10) == 2
    assert in_flight.resident(registers=32, warps=4, shared=100 << 10, of_multiprocessor=GPUS["A100"].shared) == 1


@pytest.mark.parametrize("change", ["none", "one stage"])
def test_the_backward_of_a_norm_keeps_memory_busy(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2048 columns it prefetches the next rows; without, it has a third of the bytes in flight that it needs."""
    op = OPS["rms_norm_backward"]
    require(op, saturation.PLACE)
    if change == "one stage":
        monkeypatch.setattr("vlmfast.kernels.rms_norm.stages_for", lambda *_: 1)
    (args, moved), *_ = [(args, moved) for label, args, moved in saturation.shapes(op) if label == "600x2048"]
    launch, *_ = saturation.launches_on(op, args, GPUS["H200"])
    assert launch.kernel == "rms_norm_backward_kernel"
    record = saturation.saturation(op, "600x2048", launch, moved)
    assert saturation.falls_short(record) == (change == "one stage")
    if change == "none":
        assert record["in_flight"] >= GPUS["H200"].needed


@pytest.mark.ptx
def test_cuda_kernels_are_launched_as_on_a_whole_gpu() -> None:
    """In the emulation no launch has more than five blocks. Another test has nvcc compile the same family."""
    op = OPS["place_embeddings"]
    require(op, "ptx_nvcc")
    args, moved = next((args, moved) for label, args, moved in saturation.shapes(op) if label == "1x600x2048")
    launches = saturation_nvcc.launches_on(op, args)
    assert [(one.kernel, one.programs) for one in launches] == [("rank_kernel", 3), ("move_rows_kernel", 150)]
    assert moved - 4096 <= sum(one.read + one.stored for one in launches) <= moved  # but for ranks that are not loaded
    assert not saturation.falls_short(saturation.saturation(op, "1x600x2048", launches[1], moved, "cuda"))


def test_the_name_of_a_cuda_kernel() -> None:
    name = "_ZN7vlmfast9anonymous15rms_norm_kernelI13__nv_bfloat16NS_9RowPolicyILi8ELi64EEELb0EEEvPKT_"
    assert saturation_nvcc.name_of(nvcc.unified(name)) == "rms_norm_kernel"


def test_reasons_stand_beside_cuda_kernels() -> None:
    sources = "".join(path.read_text() for path in build.CSRC.glob("*/*.cu*"))
    kernels = {*re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources)}
    assert saturation_nvcc.limits()
    assert set(saturation_nvcc.limits()) <= kernels
    assert saturation_nvcc.limits()["rms_norm_backward_kernel"].endswith("the two of a block are in flight at once")


def test_report_says_why_a_kernel_falls_short() -> None:
    """benchmarks/results/static.json, which `make static` writes, has a reason for each."""
    found = json.loads(STATIC_REPORT.read_text())["saturation"]
    small = {"row_index", "top_tokens", "merge_slots"}  # of less than a megabyte
    assert {record["op"] for record in found} == {op.name for op in saturation.measured_ops()} - small
    assert not [record for record in found if saturation.falls_short(record) and "limited" not in record]
