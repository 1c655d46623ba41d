"""FlashVID against a float64 loop, written only from its rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import video_oracle
from vlmfast.reduce import FlashVID, Selection, VisualTokens

SHAPES = [
    (1, 6, 16),
    (2, 5, 16),
    (3, 7, 16),
    (5, 4, 16),
    (9, 12, 16),
    (13, 3, 4),
    (24, 9, 16),
    (16, 12, 16),
]  # ones are exact
KEEPS: list[int | float] = [0.0, 0.05, 0.2, 0.3, 0.5, 0.77, 0.9, 1.0, 0, 1, 2, 3, 100]


def videos(shape: tuple[int, int, int], batch: int = 3) -> tuple[Tensor, Tensor]:
    """Make (B, T, n, D) videos of scenes whose tokens drift, with something new now and then, and their scores."""
    frames, n, size = shape
    torch.manual_seed(0)
    scenes = 2 * torch.randn(batch, frames, n, size)
    scene = (torch.rand(batch, frames) < 0.2).cumsum(1).clamp(max=frames - 1)
    scene = scene[..., None, None].expand(-1, -1, n, size)
    drift = torch.rand(batch, frames, n, 1) * torch.randn(batch, frames, n, size)
    drift[0] *= 0.1  # a calm one
    drift[0, :, ::5] *= 40  # with places that flicker
    rows = scenes.gather(1, scene) + drift + 0.5 * torch.randn(batch, 1, 1, size)
    rows[1] = 1.0  # one in which all are alike
    return rows, torch.rand(batch, frames, n) / n


def selected(method: FlashVID, rows: Tensor, scores: Tensor) -> Selection:
    flat = rows.flatten(1, 2)

    def never() -> Tensor:
        raise AssertionError("it asked for what it does not need")

    tokens = VisualTokens(
        hidden=flat,
        grid=(rows.shape[1], 1, rows.shape[2]),
        scores=lambda: scores.flatten(1),
        metric=never,
        features=lambda: flat,
        pixels=never,
        crops=rows.shape[1],
    )
    return method.select_videos(tokens)


@pytest.mark.parametrize("merge", ["reference", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.9, 1, 4])
def test_what_is_left_is_what_the_rule_says(keep: int | float, shape: tuple[int, int, int], merge: str):
    rows, scores = videos(shape)
    wanted = [video_oracle.flashvid(*video, keep, merge) for video in zip(rows, scores, strict=True)]
    for dtype in (torch.float32, torch.float64):
        selection = selected(FlashVID(keep, merge=merge), rows.to(dtype), scores)
        positions, order = selection.positions().sort(1)
        assert positions.tolist() == [sorted(parts) for parts in wanted]
        got = selection.apply(rows.to(dtype).flatten(1, 2)).take_along_dim(order[..., None], 1).double()
        for number, parts in enumerate(wanted):
            flat = rows[number].double().flatten(0, 1)
            merged = [sum(flat[token] * weight for token, weight in parts[place].items()) for place in sorted(parts)]
            torch.testing.assert_close(got[number], torch.stack(merged), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", KEEPS)
def test_totals_are_exact(shape: tuple[int, int, int], keep: int | float):
    frames, n, _ = shape
    rows, scores = videos(shape)
    rows[0, :, 1:] = rows[0, :, :1]  # duplicates, and what is not finite
    rows[1, -1, -1, 0] = torch.inf
    rows[2, 0] = 0
    total = keep * frames if isinstance(keep, int) else int(keep * frames * n)
    selection = selected(FlashVID(keep), rows, scores)
    positions = selection.positions()
    assert positions.shape[1] == min(frames * n, max(frames, total))
    assert bool((positions.sort(1).values.diff(dim=1) > 0).all())
    assert bool((positions < frames * n).all())


def test_keeping_everything_changes_no_bit():
    rows, scores = videos((3, 7, 16))
    for dtype in (torch.float32, torch.bfloat16):
        selection = selected(FlashVID(1.0), rows.to(dtype), scores)
        order = selection.positions().argsort(1)
        flat = rows.to(dtype).flatten(1, 2)
        assert torch.equal(selection.apply(flat).take_along_dim(order[..., None], 1), flat)


def test_what_is_merged_in_half_precision_and_its_gradient():
    """Rows are merged as in float32, and their gradient is that of the weighted sums."""
    rows, scores = (part[2:] for part in videos((9, 12, 16)))
    selection = selected(FlashVID(0.3), rows.bfloat16(), scores)
    flat = rows.bfloat16().flatten(1, 2)
    got, want = selection.apply(flat), selection.apply(flat.float())
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=2**-7)
    leaf = flat.double().requires_grad_()
    torch.autograd.gradcheck(selection.apply, leaf, nondet_tol=0.0, fast_mode=True)


def test_weights_of_frames_are_those_of_their_videos():
    slots = torch.tensor([[-1, 0, 1], [0, -1, 1], [-1, 0, 1], [0, 1, -1]]).int()
    kept = torch.tensor([[0], [1], [0], [2]])
    of_frames = Selection(kept, slots, 1, merge="mean", weights=torch.rand(4, 3))
    frames = torch.randn(4, 3, 5)
    want = of_frames.apply(frames).view(2, 2, 2, 5).transpose(1, 2).reshape(2, 4, 5)  # kept ones, then merged ones
    assert torch.equal(of_frames.of_videos(2).apply(frames.view(2, 6, 5)), want)


def test_the_cases_are_hard_enough():
    """Chains are long and branch, clusters have several chains, thresholds rise, frames are left without a cluster."""
    longest, most, widest, dropped = 0, 0, 0.0, 0
    for shape in SHAPES[4:]:
        for video, score in zip(*videos(shape), strict=True):
            n = shape[1]
            for keep in (0.3, 1):
                left = video_oracle.flashvid(video, score, keep, "reference")
                spans = [max(members) // n - min(members) // n for members in left.values()]
                longest, most = max(longest, *spans), max(most, *map(len, left.values()))
                widest = max(widest, *(sum(members.values()) for members in left.values()))
                dropped += shape[0] * n - sum(map(len, left.values()))
    assert longest >= 3
    assert most >= 8
    assert widest > 1.5  # a chain's sum over fewer than its tokens
    assert dropped


def test_the_same_alone_and_in_a_batch():
    rows, scores = videos((9, 12, 32))
    together = selected(FlashVID(0.3), rows, scores)
    for number in range(len(rows)):
        alone = selected(FlashVID(0.3), rows[number : number + 1], scores[number : number + 1])
        assert torch.equal(alone.slots[0], together.slots[number])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="merge must be one of"):
        FlashVID(0.5, merge="sum")
    with pytest.raises(ValueError, match=r"keep must be an int of at least 0 or a float within 0.0 and 1.0, got 1.5"):
        FlashVID(1.5)
