"""Every number of the Gram matrices that the greedy selections choose by."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.cases import DTYPES, few_calls, outputs, require, widened
from tests.helpers.rounding import assert_within
from tests.ptx.gram import gram
from vlmfast.registry import OPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "backend", ["triton", *(pytest.param(f"ptx_{x}", marks=pytest.mark.ptx) for x in ("sm_90", "sm_80"))]
)
def test_every_product_of_two_tokens(backend: str, dtype: torch.dtype) -> None:
    require(OPS["farthest"], backend)
    op = gram()
    for args in few_calls(op, ("cpu", backend), dtype):
        want = op.reference(*args), op.reference(*widened(args))
        assert_within(outputs(op.backend(backend).run(*args)), *([one] for one in want), composed=True)
