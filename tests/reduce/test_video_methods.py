"""EVS and V-CAST against float64 loops, written only from their rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import video_oracle
from vlmfast.reduce import EVS, VCAST, DivPrune, Method, VideoMethod, VisualTokens
from vlmfast.reduce.methods import CLASSES

SHAPES = [(1, 6, 8), (2, 5, 8), (3, 7, 16), (5, 4, 8), (8, 12, 32), (13, 3, 4), (24, 9, 8)]
KEEPS: list[int | float] = [0.0, 0.05, 0.2, 0.3, 0.5, 0.77, 0.9, 1.0, 0, 1, 2, 3, 100]


def videos(shape: tuple[int, int, int], batch: int = 3, seed: int = 0) -> Tensor:
    """Make (B, T, n, D) videos whose neighbouring frames are similar, some equal."""
    frames, count, size = shape
    torch.manual_seed(seed)
    rows = torch.randn(batch, frames, count, size).cumsum(1) + 3 * torch.randn(batch, 1, count, size)
    same = torch.rand(batch, frames, count) < 0.2
    for frame in range(1, frames):
        rows[:, frame] = torch.where(same[:, frame, :, None], rows[:, frame - 1], rows[:, frame])
    return rows


def tokens_of(rows: Tensor) -> VisualTokens:
    """Describe (B, T, n, D) videos as a reducer does."""

    def never() -> Tensor:
        raise AssertionError("it asked for what it does not need")

    flat = rows.flatten(1, 2)
    grid = (rows.shape[1], 1, rows.shape[2])
    features = {"hidden": torch.zeros_like(flat), "features": lambda: flat}
    return VisualTokens(**features, grid=grid, scores=never, metric=never, pixels=never, crops=rows.shape[1])


def kept(method: Method, rows: Tensor) -> list[list[int]]:
    selection = method.select_videos(tokens_of(rows))
    assert selection.contextual == 0
    assert not selection.keep_cls
    found: list[list[int]] = selection.kept.tolist()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evs_keeps_what_the_rule_says(shape: tuple[int, int, int], dtype: torch.dtype):
    rows = videos(shape).to(dtype)
    for keep in KEEPS:
        got = kept(EVS(keep), rows)
        assert got == [video_oracle.evs(video, keep) for video in rows]
        frames, count, _ = shape
        total = keep * frames if isinstance(keep, int) else int(frames * count * keep)
        assert {len(video) for video in got} == {min(frames * count, max(count, total))}
        assert all(video[:count] == list(range(count)) for video in got)


@pytest.mark.parametrize("remainder", ["largest", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vcast_keeps_what_the_rule_says(shape: tuple[int, int, int], dtype: torch.dtype, remainder: str):
    rows = videos(shape).to(dtype)
    frames, count, _ = shape
    for keep in KEEPS:
        got = kept(VCAST(keep, remainder=remainder), rows)
        assert got == [video_oracle.vcast(video, keep, remainder) for video in rows], keep
        total = keep * frames if isinstance(keep, int) else round(frames * count * keep)
        wanted = frames * count if frames == 1 else min(frames * count, max(frames, total))
        assert {len(video) for video in got} == {wanted}
        for video in got:
            assert len({position // count for position in video}) == frames, "each frame has a token"


def test_the_cases_are_hard_enough():
    """Some frames are full, the remainder goes around more than once, and the two ways of dealing it differ."""
    rounds, differ = [], 0
    for shape in SHAPES[1:]:
        frames, count, _ = shape
        for video in videos(shape):
            for keep in (0.3, 0.5, 0.77, 0.9):
                total = max(frames, round(frames * count * keep))
                largest, most = video_oracle.quotas(video, total, "largest")
                rounds.append(most)
                differ += largest != video_oracle.quotas(video, total, "reference")[0]
    assert max(rounds) > 2
    assert differ > 20


def test_a_video_that_stands_still():
    """EVS keeps the first frame, then the earliest tokens; V-CAST equally many of each frame, here the longest."""
    torch.manual_seed(0)
    still = torch.randn(1, 1, 8, 1024).expand(2, 5, 8, 1024)
    assert kept(EVS(0.2), still) == [list(range(8))] * 2
    assert kept(EVS(0.5), still) == [list(range(20))] * 2
    lengths = torch.tensor([3.0, 1, 7, 2, 6, 4, 8, 5])
    parallel = lengths[:, None] * torch.randn(1024)
    longest = [frame * 8 + position for frame in range(5) for position in (2, 4, 6)]
    assert kept(VCAST(3), parallel.expand(1, 5, 8, 1024)) == [longest]
    # 17 tokens of 5 frames: the remainder of two goes to the first two frames, or both to the first.
    counts = [4, 4, 3, 3, 3], [5, 3, 3, 3, 3]
    for remainder, wanted in zip(("largest", "reference"), counts, strict=True):
        (got,) = kept(VCAST(17 / 40, remainder=remainder), parallel.expand(1, 5, 8, 1024))
        assert [sum(position // 8 == frame for position in got) for frame in range(5)] == wanted


def test_tokens_that_are_nothing_are_no_error():
    zeros = torch.zeros(1, 3, 4, 8)
    assert kept(EVS(0.5), zeros) == [list(range(6))]
    assert kept(VCAST(0.5), zeros) == [[0, 1, 4, 5, 8, 9]]


def test_a_turn_gets_more_tokens():
    """All frames move on evenly, except one that goes back."""
    torch.manual_seed(1)
    base, way = torch.randn(8, 64), torch.randn(64)
    places = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.2, 0.1])
    video = base + places[:, None, None] * way
    (got,) = kept(VCAST(0.5), video[None])
    counts = [sum(position // 8 == frame for position in got) for frame in range(6)]
    assert counts[3] == max(counts) > counts[2]


@pytest.mark.parametrize("method", [EVS, VCAST])
def test_arguments_are_checked(method: type[VideoMethod]):
    assert issubclass(method, VideoMethod)
    assert method.takes == ("video",)
    assert CLASSES[method.__name__] is method
    with pytest.raises(
        TypeError, match=r"keep must be a number of tokens \(int\) or a share of them \(float\), got '1'"
    ):
        method("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep must be an int of at least 0 or a float within 0.0 and 1.0, got 1.5"):
        method(1.5)
    with pytest.raises(ValueError, match="remainder must be one of"):
        VCAST(0.5, remainder="all")


def test_nothing_is_kept_of_a_video():
    assert kept(DivPrune(0), videos((3, 7, 16))) == [[], [], []]


def test_what_is_not_finite_is_unlike_all():
    rows = videos((3, 7, 16), batch=1)
    rows[0, 2, 4, 0] = torch.inf
    assert 2 * 7 + 4 in kept(EVS(3), rows)[0]
