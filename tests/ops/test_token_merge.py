"""Edge cases of the choice and the merging of tokens that the generated tests do not reach."""

from __future__ import annotations

import math

import pytest
import torch

import vlmfast
from tests.helpers.cases import DTYPES, family, require
from vlmfast.registry import OPS

FAMILY = family("token_merge")
MERGES = ("reference", "mean")
merge_slots, merge_rows = OPS["merge_slots"].function, OPS["merge_rows"].function


# ---- the rules, in plain Python, token by token ----


def kept_by_the_rules(scores: list[float], k: int) -> list[int]:
    best = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    return sorted(best[:k])


def cosine(a: list[float], b: list[float]) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return product / lengths if lengths else 0.0


def assigned_by_the_rules(metric: list, kept: list[int], contextual: int) -> tuple[list[int], list[list[int]]]:
    """Return the positions of the targets, and those of the tokens that are merged into each."""
    others = [token for token in range(len(metric)) if token not in kept]
    targets = [others[number * (len(others) // contextual)] for number in range(contextual)]
    joined: list[list[int]] = [[] for _ in targets]
    for token in others:
        if token not in targets:
            similar = [cosine(metric[token], metric[target]) for target in targets]
            joined[similar.index(max(similar))].append(token)
    return targets, joined


def merged_by_the_rules(hidden: list, metric: list, kept: list[int], contextual: int, merge: str) -> list:
    rows = [hidden[token] for token in kept]
    for target, joined in zip(*assigned_by_the_rules(metric, kept, contextual), strict=True):
        row = []
        for channel, own in enumerate(hidden[target]):
            total = math.fsum(hidden[token][channel] for token in joined)
            row.append((own + total) / (1 + len(joined)) if merge == "mean" else own + total / max(1, len(joined)))
        rows.append(row)
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (0, 6), (7, 9), (1, 1)])
def test_visionzip_by_the_rules(backend: str, dtype: torch.dtype, merge: str, dominant: int, contextual: int):
    hidden, metric, scores = (torch.randn(shape).to(dtype) for shape in [(3, 20, 10), (3, 20, 6), (3, 20)])
    tokens, kept = vlmfast.visionzip(hidden, metric, scores, dominant, contextual, merge)
    for image in range(3):
        want = kept_by_the_rules(scores[image].tolist(), dominant)
        assert kept[image].tolist() == want
        rows = merged_by_the_rules(hidden[image].tolist(), metric[image].tolist(), want, contextual, merge)
        exact = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(tokens[image].double(), exact, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-6)


# ---- which tokens ----


def test_equal_scores_go_to_the_lower_position(backend: str):
    scores = torch.tensor([[1.0, -0.0, 0.0, 2.0, 0.0, -0.0], [-0.0, 0.0, -1.0, -0.0, 0.0, 0.0]])
    assert vlmfast.top_tokens(scores, 3).tolist() == [[0, 1, 3], [0, 1, 3]]
    assert vlmfast.top_tokens(torch.zeros(1, 700), 300).tolist() == [list(range(300))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_all_kinds_of_scores(backend: str, dtype: torch.dtype):
    info = torch.finfo(dtype)
    rising = [-math.inf, info.min, -1.0, -info.tiny, 0.0, info.tiny, 1.0, info.max, math.inf]
    scores = torch.tensor(rising, dtype=dtype)
    order = torch.randperm(len(rising))
    for k in range(len(rising) + 1):
        want = sorted((order >= len(rising) - k).nonzero()[:, 0].tolist())
        assert vlmfast.top_tokens(scores[order][None], k).tolist() == [want]


def test_a_native_kernel_refuses_what_is_not_a_number():
    """The kernel itself checks it, because in a graph no check runs before it."""
    require(OPS["top_tokens"], "native")
    for position in (0, 8, 16):
        scores = torch.zeros(2, 17)
        scores[1, position] = -math.nan
        with vlmfast.use("native"), pytest.raises(RuntimeError, match="scores must not be NaN"):
            OPS["top_tokens"].run(scores, 3)


# ---- where each token goes ----


def nothing_kept(batch: int) -> torch.Tensor:
    return torch.zeros(batch, 0, dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_doubles_of_a_target_go_to_the_first(backend: str, dtype: torch.dtype):
    """Each of eleven targets is there three times, and the tokens equal targets up to a power of two."""
    rows = torch.randn(11, 37).to(dtype)
    metric = torch.cat([rows, rows, rows, 2 * rows, rows / 4])[None]
    slots = merge_slots(metric, nothing_kept(1), 33)  # 55 // 33 = 1: the first 33 are the targets
    assert slots[0, :33].tolist() == list(range(33))
    assert slots[0, 33:].tolist() == [33 + number for number in range(11)] * 2


def test_the_length_of_a_metric_is_of_no_account(backend: str):
    metric, kept = torch.randn(2, 50, 24), torch.tensor([[0, 7, 49], [3, 4, 5]])
    slots = merge_slots(metric, kept, 6)
    for factor in (2.0, 2.0**-60, 2.0**60):
        assert torch.equal(merge_slots(metric * factor, kept, 6), slots)


@pytest.mark.parametrize("contextual", [1, 5])
def test_zeros_join_the_first_target(backend: str, contextual: int):
    metric = torch.randn(1, 30, 8)
    metric[:, 1::2] = 0
    metric[:, 0::2, 0] = -metric[:, 0::2, 0].abs()
    slots = merge_slots(metric, nothing_kept(1), contextual)
    joins = [slot for slot in slots[0, 1::2].tolist() if slot >= contextual]
    assert set(joins) == {contextual}
    assert merge_slots(torch.zeros(1, 30, 8), nothing_kept(1), contextual).max() == contextual


def test_a_target_of_zeros_is_nearer_than_an_opposite(backend: str):
    metric = torch.tensor([[[1.0], [-1.0], [0.0], [-2.0]]])  # the first and the third are targets
    assert merge_slots(metric, nothing_kept(1), 2).tolist() == [[0, 3, 1, 3]]


def test_images_are_independent(backend: str):
    hidden, metric, scores = torch.randn(4, 33, 20), torch.randn(4, 33, 8), torch.randn(4, 33)
    order = torch.tensor([2, 0, 3, 1])
    for ours, theirs in zip(
        vlmfast.visionzip(hidden[order], metric[order], scores[order], 5, 4),
        vlmfast.visionzip(hidden, metric, scores, 5, 4),
        strict=True,
    ):
        assert torch.equal(ours, theirs[order])


# ---- the rows ----


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_many_targets_as_tokens_change_nothing(backend: str, dtype: torch.dtype, merge: str):
    hidden, metric, kept = torch.randn(2, 12, 40).to(dtype), torch.randn(2, 12, 8).to(dtype), torch.tensor([[1], [11]])
    left = torch.stack([torch.cat([x[:k], x[k + 1 :]]) for x, (k,) in zip(hidden, kept.tolist(), strict=True)])
    assert torch.equal(vlmfast.merge_tokens(hidden, metric, kept, 11, merge), left)


@pytest.mark.parametrize("slot", [-(2**31), -3, 6, 2**31 - 1])
def test_a_slot_out_of_range_is_no_ones(backend: str, slot: int):
    """A token with such a slot is merged into no row, and nothing is read or written out of bounds."""
    hidden, kept = torch.randn(2, 9, 16), torch.tensor([[0, 1], [0, 1]])
    slots = torch.tensor([[-2, -1, 0, 1, 2, 3, 4, 5, 3]] * 2, dtype=torch.int32)
    broken = slots.clone()
    broken[:, 8] = slot
    without = merge_rows(hidden[:, :8], kept, slots[:, :8], 3)
    torch.testing.assert_close(merge_rows(hidden, kept, broken, 3), without, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slot", [-(2**31), -3, 6, 2**31 - 1])
def test_a_native_gradient_of_a_slot_out_of_range_is_zero(slot: int):
    require(OPS["merge_rows_backward"], "native")
    slots = torch.tensor([[-2, -1, 0, 1, 2, 3, 4, 5, slot]], dtype=torch.int32)
    with vlmfast.use("native"):
        grad = OPS["merge_rows_backward"].function(torch.randn(1, 5, 16), slots, 3)
    assert grad[0, 8].eq(0).all()
    assert grad[0, :8].ne(0).all()


def test_a_native_kernel_refuses_positions_out_of_range():
    """The kernel itself checks them, because in a graph no check runs before it."""
    require(OPS["merge_slots"], "native")
    hidden, slots = torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.int32)
    for kept in ([[0, 5]], [[-1, 2]], [[2, 1]], [[1, 1]]):
        with vlmfast.use("native"):
            with pytest.raises(RuntimeError, match="kept must be ascending"):
                OPS["merge_slots"].run(hidden, torch.tensor(kept), 1)
            with pytest.raises(RuntimeError, match="kept must be ascending"):
                OPS["merge_rows"].run(hidden, torch.tensor(kept), slots, 1, "mean")


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_native_threads_give_the_same_bits(threads: int):
    for op in FAMILY:
        require(op, "native")
    hidden, metric, scores = torch.randn(3, 400, 300), torch.randn(3, 400, 40), torch.randn(3, 40000)
    grad = torch.randn(3, 32, 300)
    before = torch.get_num_threads()

    def results():
        with vlmfast.use("native"):
            yield vlmfast.top_tokens(scores, 1000)
            yield from vlmfast.visionzip(hidden, metric, scores[:, :400], 20, 12)
            slots = merge_slots(metric, vlmfast.top_tokens(scores[:, :400], 20), 12)
            yield slots
            yield OPS["merge_rows_backward"].function(grad, slots, 12)

    try:
        torch.set_num_threads(1)
        want = list(results())
        torch.set_num_threads(threads)
        for g, w in zip(results(), want, strict=True):
            assert torch.equal(g, w)
    finally:
        torch.set_num_threads(before)
