"""Edge cases of the ops on masked rows that the generated tests do not reach."""

from __future__ import annotations

import pytest
import torch

import vlmfast
from tests.helpers.cases import DTYPES, WAITING, Recorder, family, outputs, require
from vlmfast.registry import OPS, Op

FAMILY = family("masked_rows")


def prompt(masked: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make hidden states, a mask that is true at ``masked`` of 10 positions, and ``masked`` rows of features."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask.view(-1)[torch.randperm(10)[:masked]] = True
    return torch.randn(2, 5, 64), mask, torch.randn(masked, 64)


def test_row_index_numbers_the_rows(backend: str):
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert vlmfast.row_index(mask).tolist() == [[~0, 0, 1], [~2, 2, ~3]]


@pytest.mark.parametrize("op", [vlmfast.deepstack_add, vlmfast.place_embeddings])
def test_an_empty_mask_changes_nothing(backend: str, op):
    x, mask, embeds = prompt(masked=0)
    got = op(x, mask, embeds)
    assert torch.equal(got, x)
    assert got.data_ptr() != x.data_ptr()


def test_a_placeholder_leaves_no_trace(backend: str):
    """Not even a NaN; InternVL's own code multiplies the placeholder by zero, which keeps a NaN."""
    x, mask, embeds = prompt()
    x[mask] = float("nan")
    assert torch.equal(vlmfast.place_embeddings(x, mask, embeds)[mask], embeds)
    grad = torch.full_like(x, float("nan"))
    _, rest = OPS["split_rows"].function(grad, mask, 3)
    assert rest[mask].eq(0).all()


def test_an_index_is_as_good_as_its_mask(backend: str):
    x, mask, embeds = prompt()
    index = vlmfast.row_index(mask)
    for op in (vlmfast.deepstack_add, vlmfast.place_embeddings):
        assert torch.equal(op(x, mask, embeds), op(x, mask, embeds, index))


@pytest.mark.parametrize("rows", [2, 4, 0])
@pytest.mark.parametrize("given", [False, True], ids=["mask", "index"])
def test_a_kernel_refuses_a_wrong_number_of_rows(backend: str, rows: int, given: bool):
    """The kernel itself checks it, because in a graph no check runs before it."""
    x, mask, _ = prompt()
    index = vlmfast.row_index(mask) if given else None
    embeds = torch.randn(rows, 64)
    for op in (vlmfast.deepstack_add, vlmfast.place_embeddings):
        with pytest.raises((RuntimeError, AssertionError)):
            op.op.run(x, mask, embeds, index)
    with pytest.raises((RuntimeError, AssertionError)):
        OPS["split_rows"].run(x, mask, rows, index)


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 3, 8), (2, 3, 0)], ids=str)
def test_a_kernel_refuses_rows_where_there_is_no_place_for_them(backend: str, shape: tuple[int, ...]):
    x, mask, embeds = torch.ones(shape), torch.zeros(shape[:2], dtype=torch.bool), torch.ones(3, shape[2])
    for args in [("deepstack_add", x, mask, embeds), ("place_embeddings", x, mask, embeds), ("split_rows", x, mask, 3)]:
        with pytest.raises((RuntimeError, ValueError)):
            OPS[args[0]].run(*args[1:])


def test_vmap_over_a_mask():
    """vmap runs the definition, which cannot count the mask there."""
    x, mask, embeds = (torch.stack(values) for values in zip(*(prompt() for _ in range(3)), strict=True))
    got = torch.vmap(vlmfast.place_embeddings)(x, mask, embeds)
    for g, *args in zip(got, x, mask, embeds, strict=True):
        assert torch.equal(g, vlmfast.place_embeddings(*args))


def test_an_order_of_the_callers_own_has_a_gradient(backend: str):
    """Also where the order takes a token twice."""
    invalid = torch.tensor([[False, False, True, False]])
    tokens = torch.randn(1, 4, 8, requires_grad=True)
    packed, _, _ = vlmfast.compact_tokens(tokens, invalid, 3, torch.tensor([[3, 2, 3]]))
    grad = torch.randn(1, 3, 8)
    (got,) = torch.autograd.grad(packed, tokens, grad)
    want = torch.zeros_like(got)
    want[0, 3] = grad[0, 0] + grad[0, 2]
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_are_rounded_before_they_are_added(dtype: torch.dtype):
    """Features of a float32 tower are cast to the bfloat16 of the language model first, as transformers does."""
    x, mask, embeds = prompt()
    x = x.to(dtype)
    want = x.clone()
    want[mask] += embeds.to(dtype)
    for function in (vlmfast.deepstack_add, vlmfast.deepstack_add.op.reference):
        assert torch.equal(function(x, mask, embeds), want)
    leaf = embeds.requires_grad_()
    vlmfast.deepstack_add(x, mask, leaf).sum().backward()
    assert leaf.grad.dtype == torch.float32
    assert torch.equal(leaf.grad, torch.ones_like(embeds))


def test_compaction_is_stable(backend: str):
    invalid = torch.tensor([[True, False, True, False, False, True]])
    tokens = torch.arange(6.0).view(1, 6, 1) + 1
    for keep, pad_left, order in [
        (6, False, [1, 3, 4, 0, 2, 5]),
        (4, False, [1, 3, 4, 0]),
        (2, False, [1, 3]),
        (6, True, [0, 2, 5, 1, 3, 4]),
        (4, True, [0, 1, 3, 4]),
        (2, True, [1, 3]),
        (0, False, []),
    ]:
        packed, masked, got = vlmfast.compact_tokens(tokens, invalid, keep, pad_left=pad_left)
        assert got.tolist() == [order]
        assert masked.tolist() == [[position in (0, 2, 5) for position in order]]
        assert packed.flatten().tolist() == [0.0 if p in (0, 2, 5) else p + 1.0 for p in order]


@pytest.mark.parametrize("pad_left", [False, True])
def test_sequences_longer_than_a_kernel_counts_at_a_time(backend: str, pad_left: bool):
    invalid = torch.rand(2, 9001) < 0.5
    assert torch.equal(vlmfast.row_index(invalid), vlmfast.row_index.op.reference(invalid))
    args = torch.randn(2, 9001, 1), invalid, 6000, None, pad_left
    for got, want in zip(vlmfast.compact_tokens(*args), vlmfast.compact_tokens.op.reference(*args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["native", "torch"])  # the interpreted ones take too long for a million tokens
def test_compaction_of_more_than_a_million_tokens(backend: str):
    """4M's float32 key, mask + position * 1e-6, mixes valid and invalid tokens from 1e6 on."""
    require(OPS["compact_tokens"], backend)
    invalid = torch.rand(1, 2**20 + 9) < 0.5
    tokens = torch.arange(invalid.numel(), dtype=torch.float32).view(1, -1, 1)
    with vlmfast.use(backend):
        packed, masked, order = vlmfast.compact_tokens(tokens, invalid, invalid.numel())
    valid = (~invalid[0]).nonzero()[:, 0]
    assert torch.equal(order[0, : len(valid)], valid)
    assert torch.equal(packed[0, : len(valid), 0], valid.float())
    assert not masked[0, : len(valid)].any()
    assert packed[0, len(valid) :].eq(0).all()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_an_order_out_of_range_is_refused(backend: str):
    require(OPS["compact_tokens"], backend)
    with vlmfast.use(backend):
        for wrong in (3, -1):
            with pytest.raises(RuntimeError, match="order"):
                vlmfast.compact_tokens(
                    torch.ones(1, 3, 8), torch.zeros(1, 3, dtype=torch.bool), 1, torch.tensor([[wrong]])
                )


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("hidden", [1600, 1601], ids=["whole cache lines", "odd rows"])
def test_outputs_larger_than_the_caches(hidden: int):
    """The native ops write these by streaming stores; each thread needs the number of masked rows before its part."""
    for op in FAMILY:
        require(op, "native")
    x = torch.randn(2, 2050, hidden).bfloat16()
    mask = torch.rand(2, 2050) < 0.7
    embeds = torch.randn(int(mask.sum()), hidden).bfloat16()
    for args in (
        ("deepstack_add", x, mask, embeds),
        ("place_embeddings", x, mask, embeds),
        ("split_rows", x, mask, len(embeds)),
        ("compact_tokens", x, mask, 2050, None, True),
        ("compact_tokens_backward", x, mask),
    ):
        op = OPS[args[0]]
        with vlmfast.use("native"):
            got = outputs(op.function(*args[1:]))
        for g, want in zip(got, outputs(op.reference(*args[1:])), strict=True):
            assert torch.equal(g, want), op.name


@pytest.mark.parametrize("op", FAMILY, ids=lambda op: op.name)
def test_the_definition_waits_for_nothing(op: Op):
    """The definition, which runs where there is no kernel, calls no operator for which the host waits."""
    for args in op.cases.samples("cpu", torch.float32):
        with Recorder() as recorder:
            op.reference(*args)
        assert not recorder.names & WAITING


@pytest.mark.parametrize("op", [op for op in FAMILY if op.name != "row_index"], ids=lambda op: op.name)
def test_forward_mode(op: Op):
    """Forward mode runs the definition; the ops are linear, so the derivative along a change is the result's change."""
    args = list(op.cases.samples("cpu", torch.float32))[1]
    floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    tangents = [torch.randn_like(a) for a in floats]

    def call(*leaves):
        remaining = iter(leaves)
        full = [next(remaining) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return outputs(op.function(*full))[0]

    value, tangent = torch.func.jvp(call, tuple(floats), tuple(tangents))
    assert torch.equal(value, call(*floats))
    shifted = call(*[a + t for a, t in zip(floats, tangents, strict=True)])
    torch.testing.assert_close(tangent, shifted - value)
