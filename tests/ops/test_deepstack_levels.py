"""DeepStack's sampling of a high-resolution image against a loop over its pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vlmfast


def naive_levels(features: Tensor, height: int, width: int, side: int) -> Tensor:
    pixels = {
        (row * side + y, column * side + x): features[row * width + column, y * side + x]
        for row in range(height)
        for column in range(width)
        for y in range(side)
        for x in range(side)
    }
    return torch.stack(
        [
            torch.stack([pixels[y, x] for y in range(i, height * side, height) for x in range(j, width * side, width)])
            for i in range(height)
            for j in range(width)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width", "side"), [(2, 2, 4), (1, 3, 2), (3, 2, 5), (1, 1, 3), (4, 1, 1)])
def test_levels(height: int, width: int, side: int, dtype: torch.dtype):
    features = torch.randn(height * width, side * side, 10, dtype=dtype)[..., 3:]
    levels = vlmfast.deepstack_levels(features, (height, width), side)
    want = naive_levels(features, height, width, side)
    assert levels.dtype == dtype
    assert levels.is_contiguous()
    assert torch.equal(levels, want)
    padded = vlmfast.deepstack_levels(features, (height, width), side, pad_to=7)
    assert torch.equal(padded, torch.cat([want, want.new_zeros(7 - height * width, side * side, 7)]))
    assert torch.equal(vlmfast.deepstack_levels(features, (height, width), side, pad_to=height * width), want)


def test_gradient_of_levels():
    features = torch.randn(6, 4, 3, requires_grad=True)
    weight = torch.randn(8, 4, 3)
    (got,) = torch.autograd.grad(vlmfast.deepstack_levels(features, (3, 2), 2, pad_to=8), features, weight)
    (want,) = torch.autograd.grad(naive_levels(features, 3, 2, 2), features, weight[:6])
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, (2, 3), 2), TypeError, "features must be a torch.Tensor, got NoneType"),
        ((torch.ones(6, 4, 3).double(), (2, 3), 2), TypeError, "features must be float32, float16 or bfloat16"),
        ((torch.ones(6, 4, 3), 6, 2), TypeError, r"grid must be a pair \(height, width\), got 6"),
        ((torch.ones(6, 4, 3), (2, 3, 1), 2), TypeError, "grid must be a pair"),
        ((torch.ones(6, 4, 3), (2, 3.0), 2), TypeError, r"grid\[1\] must be an int, got float"),
        ((torch.ones(6, 4, 3), (0, 3), 2), ValueError, r"grid\[0\] must be at least 1, got 0"),
        ((torch.ones(6, 4, 3), (2, 3), True), TypeError, "side must be an int, got bool"),
        ((torch.ones(6, 4, 3), (2, 3), 0), ValueError, "side must be at least 1, got 0"),
        ((torch.ones(6, 4, 3), (2, 2), 2), ValueError, r"features must have shape \(4, 4, C\), .* got \(6, 4, 3\)"),
        ((torch.ones(6, 4, 3), (2, 3), 3), ValueError, r"features must have shape \(6, 9, C\), .* got \(6, 4, 3\)"),
        ((torch.ones(6, 4), (2, 3), 2), ValueError, r"features must have shape \(6, 4, C\), .* got \(6, 4\)"),
        ((torch.ones(6, 4, 3), (2, 3), 2, 5), ValueError, "pad_to must be at least 6, got 5"),
    ],
)
def test_bad_levels(arguments: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        vlmfast.deepstack_levels(*arguments)
