"""The count of executed instructions, and its report."""

from __future__ import annotations

import json

import torch

from tests.helpers.cases import PRIMITIVE
from tests.ptx.small import BEGIN, run
from vlmfast.benchmarks.ops import STATIC_REPORT


def test_an_instruction_has_run_if_one_thread_ran_it() -> None:
    body = """setp.eq.u32 %p1, %r0, 63; setp.gt.u32 %p2, %r0, 63;
    @%p1 st.global.b32 [%d3], 1; @%p2 st.global.b32 [%d3], 2; @%p2 bra END; bra END; trap; END: ret;"""
    ran = run(body, torch.zeros(64), torch.zeros(64)).ran[BEGIN.count(";") :]
    assert ran.tolist() == [64, 64, 1, 0, 0, 64, 0, 64]


def test_report_is_of_every_op() -> None:
    """benchmarks/results/static.json, which `make static` writes, has every op."""
    executed = json.loads(STATIC_REPORT.read_text())["executed"]
    assert {record["op"] for record in executed} == {op.name for op in PRIMITIVE}
    for record in executed:
        assert 0.7 * record["instructions"] < record["ran"] <= record["instructions"], record
