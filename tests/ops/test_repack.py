"""`repack` against a loop over tokens, and on a causal language model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers import tiny_models as tiny

VALID = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def naive(values: Tensor, valid: Tensor, side: str, keep: int, fill: float) -> Tensor:
    """Repack ``values`` (B, T, ...) by a loop over tokens."""
    result = torch.full((values.shape[0], keep, *values.shape[2:]), fill, dtype=values.dtype)
    for row, (line, mask) in enumerate(zip(values, valid.bool(), strict=True)):
        kept = [value for value, wanted in zip(line, mask, strict=True) if wanted]
        first = keep - len(kept) if side == "left" else 0
        for position, value in enumerate(kept, first):
            result[row, position] = value
    return result


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("keep", [None, 6, 4], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repack(dtype: torch.dtype, mask_dtype: torch.dtype, keep: int | None, side: str):
    embeds = torch.randn(3, 6, 16, dtype=dtype)[..., ::2]
    mask = VALID.to(mask_dtype)
    positions, labels = torch.randint(1, 99, (4, 3, 6)), torch.randint(1, 99, (3, 6))
    got = vlmfast.repack(embeds, mask, side, position_ids=positions, labels=labels, keep=keep)
    length = keep or 6
    assert torch.equal(got.inputs_embeds, naive(embeds, VALID, side, length, 0))
    assert torch.equal(got.attention_mask, naive(mask, VALID, side, length, 0))
    want = torch.stack([naive(axis, VALID, side, length, 0) for axis in positions])
    assert torch.equal(got.position_ids, want)
    assert torch.equal(got.labels, naive(labels, VALID, side, length, -100))
    found = (got.inputs_embeds.dtype, got.attention_mask.dtype, got.position_ids.dtype, got.labels.dtype)
    assert found == (dtype, mask_dtype, torch.int64, torch.int64)
    for axes in (positions[:3], positions[0]):
        again = vlmfast.repack(embeds, mask, side, position_ids=axes, keep=keep)
        assert torch.equal(again.position_ids, want[:3] if axes.dim() == 3 else want[0])
        assert again.labels is None


def test_only_embeddings():
    got = vlmfast.repack(torch.randn(3, 6, 8), VALID)
    assert got.position_ids is None
    assert got.labels is None
    assert torch.equal(got.attention_mask, naive(VALID, VALID, "right", 6, 0))


def test_padding_leaves_no_trace():
    embeds = torch.randn(3, 6, 8)
    embeds[VALID == 0] = torch.nan
    assert vlmfast.repack(embeds, VALID).inputs_embeds.isfinite().all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradient(side: str):
    embeds = torch.randn(3, 6, 8, requires_grad=True)
    weight = torch.randn(3, 4, 8)
    (got,) = torch.autograd.grad(vlmfast.repack(embeds, VALID, side, keep=4).inputs_embeds, embeds, weight)
    (want,) = torch.autograd.grad(naive(embeds, VALID, side, 4, 0), embeds, weight)
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)], ids=str)
def test_empty(shape: tuple[int, ...]):
    ones = torch.ones(shape[:2], dtype=torch.int64)
    got = vlmfast.repack(torch.randn(shape), ones, labels=ones)
    assert got.inputs_embeds.shape == shape
    assert got.labels.shape == shape[:2]


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_model_gives_the_same_logits(side: str):
    model = tiny.model("llama", **tiny.text())
    mask = VALID[:2]
    ids = torch.randint(7, 64, mask.shape)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = model.get_input_embeddings()(ids)
    got = vlmfast.repack(embeds, mask, side, position_ids=positions, labels=ids, keep=4)
    with torch.no_grad():
        want = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
        found = model(
            inputs_embeds=got.inputs_embeds, attention_mask=got.attention_mask, position_ids=got.position_ids
        ).logits
    torch.testing.assert_close(found[got.attention_mask.bool()], want[mask.bool()])
    assert torch.equal(got.labels[got.attention_mask.bool()], ids[mask.bool()])


EMBEDS, MASK = torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"side": "middle"}, ValueError, "side must be one of 'right', 'left', got 'middle'"),
        ({"inputs_embeds": EMBEDS.double()}, TypeError, "^inputs_embeds must be float32, float16 or bfloat16"),
        ({"inputs_embeds": [1.0]}, TypeError, "^inputs_embeds must be a torch.Tensor, got list"),
        ({"inputs_embeds": EMBEDS[0]}, ValueError, r"^inputs_embeds must have shape \(B, T, D\), got \(3, 8\)"),
        ({"attention_mask": None}, TypeError, "attention_mask must be a torch.Tensor, got NoneType"),
        ({"attention_mask": MASK.float()}, TypeError, "attention_mask must be bool or integers, got torch.float32"),
        ({"attention_mask": MASK[0]}, ValueError, r"attention_mask must have shape \(B, T\), got \(3,\)"),
        ({"attention_mask": MASK[:, 1:]}, ValueError, r"^attention_mask must have shape \(2, 3\), .* got \(2, 2\)"),
        ({"attention_mask": MASK.to("meta")}, ValueError, "^attention_mask must be on the device of inputs_embeds"),
        ({"attention_mask": 2 * MASK}, ValueError, "attention_mask must hold 0 and 1 only, got 2"),
        ({"attention_mask": -MASK}, ValueError, "attention_mask must hold 0 and 1 only, got -1"),
        ({"position_ids": 5}, TypeError, "position_ids must be a torch.Tensor, got int"),
        ({"position_ids": MASK[:1]}, ValueError, r"position_ids must have shape \(2, 3\), .*, got \(1, 3\)"),
        ({"position_ids": MASK[None, None]}, ValueError, r"position_ids must have shape .* got \(1, 1, 2, 3\)"),
        ({"position_ids": MASK.expand(7, 2, 3)}, ValueError, r"position_ids must have shape .* got \(7, 2, 3\)"),
        ({"position_ids": MASK.to("meta")}, ValueError, "position_ids must be on the device of attention_mask, cpu"),
        ({"labels": 5}, TypeError, "labels must be a torch.Tensor, got int"),
        ({"labels": MASK.float()}, TypeError, "labels must be int64, int32 or int16, got torch.float32"),
        ({"labels": MASK[:, :2]}, ValueError, r"labels must have the shape of attention_mask, \(2, 3\), got \(2, 2\)"),
        ({"keep": 2}, ValueError, "keep must be at least 3, the most valid tokens that a sequence has, got 2"),
        ({"keep": 4}, ValueError, "keep must be within 0 and 3"),
        ({"keep": -1}, ValueError, "keep must be within 0 and 3"),
        ({"keep": 2.0}, TypeError, "keep must be an int, got float"),
    ],
)
def test_bad_calls(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        vlmfast.repack(**{"inputs_embeds": EMBEDS, "attention_mask": MASK, **arguments})


def test_compiled_calls_assert():
    """In a graph and on a GPU, where the host cannot read values, the checks are part of the computation."""
    compiled = torch.compile(vlmfast.repack, backend="aot_eager", fullgraph=True)
    found = compiled(EMBEDS, MASK.clone().fill_diagonal_(0), keep=2)
    assert torch.equal(found.inputs_embeds, torch.ones(2, 2, 8))
    with pytest.raises(RuntimeError, match="attention_mask must hold 0 and 1"):
        compiled(EMBEDS, 2 * MASK, keep=2)
    with pytest.raises(RuntimeError, match="keep must be at least"):
        compiled(EMBEDS, MASK, keep=2)
