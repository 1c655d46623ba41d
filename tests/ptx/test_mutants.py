"""Every barrier, wait and commit of a kernel is needed: without one of them a test of the op fails."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.helpers.cases import PRIMITIVE, each, require
from tests.ptx.mutants import survivors_of_drops
from vlmfast.registry import Op

PLACES = ("ptx_sm_90", "ptx_sm_80")
OWN = "each warp stores where it alone has loaded since the barrier before"
# Kernel -> (the most barriers that the samples of an op do not need, for either target, and why). Most, because each op
# has other specialisations of a kernel, and the compiler makes other barriers for each target.
IDLE = {
    "row_logits_kernel": (1, "nothing has been stored before it"),
    "frame_mean_kernel": (1, OWN),
    "row_scores_kernel": (2, OWN),
    "normaliser_kernel": (1, "others stand between the loads of its loop and the copies behind it"),
    "coverage_kernel": (
        8,
        f"{OWN}, or nobody reads what is stored before it; two order accesses of global memory, where no races of "
        "Triton's kernels are looked for",
    ),
    "received_kernel": (3, f"as in normaliser_kernel; {OWN}"),
    "farthest_kernel": (2, "as in dpp_map_kernel"),
    "dpp_map_kernel": (3, "others stand between what it separates"),
    "merge_slots_kernel": (1, "what is loaded after the barrier before it lies elsewhere"),
    "merge_rows_kernel": (1, OWN),
    "pack_kernel": (1, "it follows an assertion, and the kernel has no shared memory"),
    "pixel_shuffle_norm_kernel": (1, OWN),
    "pixel_shuffle_norm_backward_kernel": (2, OWN),
    "rms_norm_kernel": (1, OWN),
    "rms_norm_backward_kernel": (4, f"{OWN}, or each loads what it has copied itself; on sm_90 one is needed"),
    "qk_norm_rope_backward_kernel": (8, f"{OWN}, or what is loaded after that barrier lies elsewhere"),
    "sum_partials_kernel": (2, f"{OWN}; samples have partial sums for one step of its loop"),
}


@pytest.mark.planted
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("op", each(PRIMITIVE))
def test_nothing_that_synchronises_can_be_left_out(op: Op, place: str) -> None:
    require(op, place)
    alive = survivors_of_drops(op, place, torch.bfloat16)
    assert not [str(mutant) for mutant in alive if mutant.was.name != "bar" and not mutant.excuse]
    for kernel, count in Counter(mutant.kernel for mutant in alive if mutant.was.name == "bar").items():
        most, _ = IDLE.get(kernel, (0, ""))
        assert count <= most, "\n".join(str(mutant) for mutant in alive if mutant.kernel == kernel)
