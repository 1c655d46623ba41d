"""Edge cases of the attention scores that the generated tests do not reach."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

import vlmfast
from tests.helpers.cases import DTYPES, family, require
from vlmfast.registry import OPS

FAMILY = family("attention_scores")


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cls_by_the_rules(query: torch.Tensor, key: torch.Tensor, scale: float, index: int) -> torch.Tensor:
    """Compute the attention of one query in plain Python, token by token."""
    rows = []
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        maps = [softmax([scale * dot(q[h], token) for token in k[h]]) for h in range(len(q))]
        sums = [math.fsum(row[token] for row in maps) for token in range(len(k[0]))]
        rows.append(sums[:index] + sums[index + 1 :])
    return torch.tensor(rows, dtype=torch.float64)


def received_by_the_rules(
    query: torch.Tensor, key: torch.Tensor, bounds: list[int], group: int, scale: float
) -> torch.Tensor:
    received = [0.0] * query.shape[1]
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        for begin, end in itertools.pairwise(bounds):
            for row in range(begin, end):
                weights = softmax([scale * dot(q[row], k[column]) for column in range(begin, end)])
                for column, weight in enumerate(weights, begin):
                    received[column] += weight / query.shape[0]
    groups = [received[i : i + group] for i in range(0, len(received), group)]
    return torch.tensor([sum(values) / group for values in groups], dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "index"), [(None, 0), (-0.4, 3), (0.0, 10)], ids=str)
def test_cls_attention_by_the_rules(backend: str, dtype: torch.dtype, scale: float | None, index: int):
    query, key = torch.randn(2, 3, 20).to(dtype), torch.randn(2, 3, 11, 20).to(dtype)
    want = cls_by_the_rules(query, key, 20**-0.5 if scale is None else scale, index)
    torch.testing.assert_close(vlmfast.cls_attention(query, key, scale, index).double(), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, -0.4, 0.0], ids=str)
def test_last_row_attention_by_the_rules(backend: str, dtype: torch.dtype, scale: float | None):
    query, key = torch.randn(2, 6, 20).to(dtype), torch.randn(2, 2, 11, 20).to(dtype)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, :4], valid[1, 9:] = False, False
    want = torch.zeros(2, 11, dtype=torch.float64)
    for sample in range(2):
        seen = valid[sample].nonzero()[:, 0].tolist()
        for head in range(6):
            keys = key[sample, head // 3].tolist()
            factor = 20**-0.5 if scale is None else scale
            row = softmax([factor * dot(query[sample, head].tolist(), keys[token]) for token in seen])
            want[sample, seen] += torch.tensor(row, dtype=torch.float64) / 6
    got = vlmfast.last_row_attention(query, key, valid, scale)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)
    assert not got[~valid].any()
    whole = vlmfast.last_row_attention(query, key, None, scale)
    assert torch.equal(whole, vlmfast.last_row_attention(query, key, torch.ones_like(valid), scale))
    assert not vlmfast.last_row_attention(query, key, torch.zeros_like(valid), scale).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bounds", "group", "scale"), [([0, 24], 1, None), ([0, 4, 4, 20, 24], 4, -0.4), ([0, 1, 24], 2, 0.0)], ids=str
)
def test_received_attention_by_the_rules(
    backend: str, dtype: torch.dtype, bounds: list[int], group: int, scale: float | None
):
    query, key = (torch.randn(2, 24, 20).to(dtype) for _ in range(2))
    want = received_by_the_rules(query, key, bounds, group, 20**-0.5 if scale is None else scale)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = vlmfast.received_attention(query, key, cu_seqlens, group, scale)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)


def test_every_query_gives_one(backend: str):
    """The attention received in a segment sums to its number of queries, whatever the keys are."""
    query, key = 5 * torch.randn(3, 40, 16), torch.randn(3, 40, 16)
    bounds = [0, 7, 8, 40]
    got = vlmfast.received_attention(query, key, torch.tensor(bounds, dtype=torch.int32))
    for begin, end in itertools.pairwise(bounds):
        assert float(got[begin:end].sum()) == pytest.approx(end - begin, rel=1e-5)


def test_segments_are_as_good_as_separate_calls(backend: str):
    query, key = torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    got = vlmfast.received_attention(query, key, torch.tensor([0, 10, 30], dtype=torch.int32))
    apart = [vlmfast.received_attention(query[:, part], key[:, part]) for part in (slice(0, 10), slice(10, 30))]
    torch.testing.assert_close(got, torch.cat(apart), rtol=1e-6, atol=1e-7)


def test_images_are_independent(backend: str):
    query, key, order = torch.randn(4, 2, 16), torch.randn(4, 2, 19, 16), torch.tensor([2, 0, 3, 1])
    got = vlmfast.cls_attention(query, key)
    assert torch.equal(vlmfast.cls_attention(query[order], key[order]), got[order])


def test_a_token_that_is_not_a_number_is_seen(backend: str):
    """NaN must show in the result, not look like a token without attention."""
    query, key = torch.randn(1, 2, 16), torch.randn(1, 2, 40, 16)
    key[0, 1, 5, 3] = math.nan
    assert vlmfast.cls_attention(query, key).isnan().all()
    got = vlmfast.received_attention(key[0], key[0], torch.tensor([0, 8, 40], dtype=torch.int32))
    assert got[:8].isnan().all()


def test_the_native_kernel_stores_no_map():
    """The peak memory of the process rises by less than a twentieth of the map, which is less than one head's map."""
    require(OPS["received_attention"], "native")
    mark, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not mark.exists():
        pytest.skip("the system does not tell")
    query, key = (torch.randn(8, 2048, 32) for _ in range(2))

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])

    with vlmfast.use("native"):
        vlmfast.received_attention(query[:, :64], key[:, :64])
        mark.write_text("5")  # resets the peak to the present memory
        before = kilobytes("VmRSS")
        vlmfast.received_attention(query, key)
    assert 1024 * (kilobytes("VmHWM") - before) < 0.05 * 4 * 8 * 2048**2


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_native_threads_give_the_same_bits(threads: int):
    """Also where a head is split into parts that different threads compute."""
    for op in FAMILY:
        require(op, "native")
    query, key = (torch.randn(3, 1100, 24) for _ in range(2))
    cu_seqlens = torch.tensor([0, 30, 1100], dtype=torch.int32)
    before = torch.get_num_threads()

    def both():
        with vlmfast.use("native"):
            yield vlmfast.received_attention(query, key, cu_seqlens)
            yield vlmfast.cls_attention(query[None, :, 0].expand(5, -1, -1), key.expand(5, -1, -1, -1))

    try:
        torch.set_num_threads(1)
        want = list(both())
        torch.set_num_threads(threads)
        for g, w in zip(both(), want, strict=True):
            assert torch.equal(g, w)
    finally:
        torch.set_num_threads(before)
    exact = OPS["received_attention"].reference(query.double(), key.double(), cu_seqlens)
    torch.testing.assert_close(want[0].double(), exact, rtol=1e-5, atol=0.0)


def test_a_native_call_refuses_segments_that_do_not_fit():
    """The kernel itself checks them, because in a graph no check runs before it."""
    require(OPS["received_attention"], "native")
    query = torch.randn(1, 8, 4)
    for bounds in ([0, 9], [0, 8, 4, 8], [1, 8], [-1, 8], []):
        with vlmfast.use("native"), pytest.raises(RuntimeError, match="cu_seqlens must"):
            OPS["received_attention"].run(query, query, torch.tensor(bounds, dtype=torch.int32))
