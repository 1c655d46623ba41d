"""Edge cases of the novelty of tokens that the generated tests do not reach."""

from __future__ import annotations

import math

import pytest
import torch

import vlmfast
from tests.helpers.cases import DTYPES, family
from tests.helpers.video_oracle import cosine, dot

FAMILY = family("frame_novelty")
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_the_rules(backend: str, dtype: torch.dtype):
    frames = torch.randn(2, 3, 6, 20).to(dtype)
    mean, novelty, length = vlmfast.frame_novelty(frames)
    change = vlmfast.frame_change(frames)
    for video, rows in enumerate(frames.tolist()):
        for number, frame in enumerate(rows):
            middle = [math.fsum(column) / 6 for column in zip(*frame, strict=True)]
            torch.testing.assert_close(mean[video, number].double(), torch.tensor(middle).double(), **CLOSE)
            for token, row in enumerate(frame):
                assert novelty[video, number, token].item() == pytest.approx(1 - cosine(row, middle), abs=1e-6)
                assert length[video, number, token].item() == pytest.approx(math.sqrt(dot(row, row)), rel=1e-6)
                if number:
                    wanted = 1 - cosine(row, rows[number - 1][token])
                    assert change[video, number - 1, token].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_the_same_has_not_changed(backend: str, dtype: torch.dtype):
    """The change of equal tokens is exactly zero, so that ties keep the earlier token."""
    frames = (torch.randn(1, 1, 9, 1160) * 3).to(dtype).repeat(2, 3, 1, 1)
    change = vlmfast.frame_change(frames)
    assert torch.equal(change, torch.zeros(2, 2, 9))


def test_large_and_small_numbers(backend: str):
    """The product of two sums of squares must not overflow, nor vanish for small numbers."""
    frames = torch.randn(1, 2, 3, 64)
    want = vlmfast.frame_change(frames), vlmfast.frame_novelty(frames)[1]
    for factor in (1e15, 1e-15):
        torch.testing.assert_close(vlmfast.frame_change(frames * factor), want[0], rtol=1e-5, atol=1e-6)
        _, novelty, length = vlmfast.frame_novelty(frames * factor)
        torch.testing.assert_close(novelty, want[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(length, frames.norm(dim=3) * factor)
    frames[:, 1] *= 1e-15
    torch.testing.assert_close(vlmfast.frame_change(frames), want[0], rtol=1e-5, atol=1e-6)


def test_tokens_that_are_nothing(backend: str):
    frames = torch.randn(1, 4, 3, 64)
    frames[:, 1:3] = 0
    assert torch.equal(vlmfast.frame_change(frames), torch.ones(1, 3, 3))
    _, novelty, length = vlmfast.frame_novelty(frames)
    assert torch.equal(novelty[:, 1:3], torch.ones(1, 2, 3))
    assert torch.equal(length[:, 1:3], torch.zeros(1, 2, 3))
