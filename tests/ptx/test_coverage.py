"""The count of executed instructions, and its report."""

from __future__ import annotations

import json

import torch

from tests.helpers.cases import PRIMITIVE
from tests.ptx.coverage import of_assertions
from tests.ptx.parse import parse
from tests.ptx.small import BEGIN, module, run
from vlmfast.benchmarks.ops import STATIC_REPORT
from vlmfast.registry import OPS

MEMORY_BOUND, OTHERS = 0.95, 0.9  # the least share of a kernel's instructions that the samples must run


def test_an_instruction_has_run_if_one_thread_ran_it() -> None:
    body = """setp.eq.u32 %p1, %r0, 63; setp.gt.u32 %p2, %r0, 63;
    @%p1 st.global.b32 [%d3], 1; @%p2 st.global.b32 [%d3], 2; @%p2 bra END; bra END; trap; END: ret;"""
    ran = run(body, torch.zeros(64), torch.zeros(64)).ran[BEGIN.count(";") :]
    assert ran.tolist() == [64, 64, 1, 0, 0, 64, 0, 64]


def test_what_runs_when_an_assertion_fails_is_not_counted() -> None:
    body = """mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 1; @%p1 bra FINE;
    st.param.b32 [message], 36; trap; FINE: @%p1 bra END; bra.uni WRONG; WRONG: mov.u32 %r0, 1; trap; END: ret;"""
    assert of_assertions(parse(module(body), "kernel")) == {3, 4, 7, 8}


def test_report_is_of_every_op() -> None:
    """benchmarks/results/static.json, which `make static` writes, has every op; its samples run nearly all code."""
    executed = json.loads(STATIC_REPORT.read_text())["executed"]
    assert {record["op"] for record in executed} == {op.name for op in PRIMITIVE}
    for record in executed:
        least = MEMORY_BOUND if OPS[record["op"]].cases.compute_bound is None else OTHERS
        assert least * record["instructions"] <= record["ran"] <= record["instructions"], record
