"""DivPrune, Cen-Prune and SCOPE on the outputs of a model, against plain loops that state their rules."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.qwen_models import SMALL, WIDE, inputs_of, model_of
from tests.helpers.reduce_models import EACH_TYPE, Talk
from tests.ops.test_greedy_selection import coverage_by_rule, covers, farthest_by_rule
from vlmfast.reduce import Selection, VisualTokens
from vlmfast.reduce.families import REDUCERS, qwen
from vlmfast.reduce.text import Text

COUNT, KEEP = 18, 7


def tokens_of(**given: Any) -> VisualTokens:
    """Make two images of random tokens; a method that reads the wrong input chooses other tokens."""
    lazy: dict[str, Any] = {name: lambda: None for name in ("metric", "pixels")}
    shown = {"features": torch.randn(2, COUNT, 5), "scores": torch.rand(2, COUNT), "hidden": torch.randn(2, COUNT, 6)}
    shown |= given
    lazy |= {name: lambda value=shown[name]: value for name in ("features", "scores", "text") if name in shown}
    return VisualTokens(hidden=shown["hidden"], grid=(1, 3, 6), **lazy)


def cosines(rows: list[list[float]]) -> list[list[float]]:
    """Compute the cosine similarities of one image's rows in Python's float64."""
    length = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]
    return [
        [
            math.fsum(a * b for a, b in zip(one, other, strict=True)) / (length[i] * length[j])
            for j, other in enumerate(rows)
        ]
        for i, one in enumerate(rows)
    ]


def test_divprune_follows_the_rule():
    tokens = tokens_of()
    kept = vlmfast.DivPrune(KEEP).select(tokens).kept
    for image, rows in enumerate(tokens.features().tolist()):
        assert kept[image].tolist() == farthest_by_rule(rows, KEEP, [1.0] * COUNT)


def test_cen_prune_follows_the_rule():
    tokens = tokens_of(features=torch.randn(2, COUNT, 5) + 1)
    kept = vlmfast.DivPrune(KEEP, centered=True).select(tokens).kept
    for image, rows in enumerate(tokens.features().tolist()):
        alike = [-(math.fsum(row) - row[i]) / (COUNT - 1) for i, row in enumerate(cosines(rows))]
        quality = [(x - min(alike)) / (max(alike) - min(alike)) for x in alike]
        mean = [math.fsum(column) / COUNT for column in zip(*rows, strict=True)]
        centered = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]
        assert kept[image].tolist() == farthest_by_rule(centered, KEEP, quality, first_by_quality=False)


def test_tokens_that_are_alike_have_one_distinctiveness():
    """Rounding must not matter; also for one token and for none."""
    directions = torch.linalg.qr(torch.randn(8, 8)).Q[None].repeat(1, 2, 1) * torch.rand(1, 16, 1)
    for features in (directions, directions[:, :1], torch.rand(1, 16, 1), directions[:, :0]):
        count = features.shape[1]
        tokens = tokens_of(features=features, hidden=features, scores=torch.ones(1, count))
        kept = vlmfast.DivPrune(9, centered=True).select(tokens).kept
        assert kept.shape == (1, min(9, count))
    from vlmfast.reduce.methods.divprune import distinctiveness

    assert distinctiveness(directions).eq(1).all()


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2])
def test_scope_follows_the_rule(alpha: float):
    tokens = tokens_of()
    kept = vlmfast.SCOPE(KEEP, alpha=alpha).select(tokens).kept
    for image, rows in enumerate(tokens.hidden.tolist()):
        quality = [score**alpha for score in tokens.scores()[image].tolist()]
        assert kept[image].tolist() == coverage_by_rule(cosines(rows), KEEP, [1.0] * COUNT, quality)


def test_scope_without_attention_asks_for_none():
    """Two tokens may cover equally much, so the choice is compared by its coverage, not by its tokens."""
    tokens = tokens_of(scores=torch.full((2, COUNT), torch.nan))
    kept = vlmfast.SCOPE(KEEP, alpha=0).select(tokens).kept
    for image, rows in enumerate(tokens.hidden.tolist()):
        ones = [1.0] * COUNT
        want = covers(cosines(rows), ones, coverage_by_rule(cosines(rows), KEEP, ones, ones))
        assert covers(cosines(rows), ones, kept[image].tolist()) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("videos", [False, True])
@pytest.mark.parametrize(
    ("method", "op"),
    [
        (vlmfast.DivPrune(0.4), "farthest"),
        (vlmfast.DivPrune(3, centered=True), "farthest"),
        (vlmfast.SCOPE(0.4), "coverage"),
        (vlmfast.CDPruner(0.4), "dpp_map"),
        (vlmfast.EADP(0.4), "coverage"),
    ],
    ids=str,
)
def test_images_of_all_sizes_are_one_choice(method: vlmfast.reduce.Method, op: str, videos: bool, monkeypatch):
    """And each gets the tokens that it gets alone; of an image without tokens none are chosen."""
    groups = []
    for batch, grid in ((2, (2, 3, 6)), (1, (4, 1, 5)), (1, (2, 0, 3)), (3, (2, 2, 4))):
        shape = batch, math.prod(grid), 5
        words = torch.randn(batch, 4, 5), torch.ones(batch, 4, dtype=torch.bool)
        given = {"hidden": torch.randn(shape), "features": torch.randn(shape), "text": Text(*words)}
        tokens = tokens_of(scores=torch.rand(shape[:2]), **given)
        groups.append(dataclasses.replace(tokens, grid=grid, crops=grid[0] if videos else 1))
    want = [method.select_videos(tokens) if videos else method.select(tokens) for tokens in groups]
    function, calls = getattr(vlmfast, op), list[int]()

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(sys.modules[type(method).__module__], op, counted)
    found = method.select_each(groups, videos)
    assert len(calls) == 1
    for selection, alone, tokens in zip(found, want, groups, strict=True):
        assert torch.equal(selection.kept, alone.kept)
        assert torch.equal(selection.apply(tokens.hidden), alone.apply(tokens.hidden))


def test_slots_of_a_video_number_the_tokens_that_are_kept():
    """By these numbers a Triton kernel moves rows, and the backward pass their gradients."""
    shape = 4, 36, 5
    tokens = tokens_of(scores=torch.rand(shape[:2]), hidden=torch.randn(shape), features=torch.randn(shape))
    found = vlmfast.DivPrune(0.4).select_videos(dataclasses.replace(tokens, grid=(3, 3, 4), crops=3))
    count = found.kept.shape[1]
    assert torch.equal(found.slots.gather(1, found.kept), torch.arange(-count, 0).expand(4, -1).int())
    dropped = found.slots.scatter(1, found.kept, -count - 1)
    assert (dropped == -count - 1).all()


class First(vlmfast.DivPrune):
    """Chooses the first tokens."""

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.arange(k).expand(tokens.batch, -1)


class Selecting(vlmfast.SCOPE):
    """Selects the first tokens."""

    def select(self, tokens: VisualTokens) -> Selection:
        return First(self.keep).select(tokens)


class Twice(vlmfast.DivPrune):
    """Chooses the first token again and again."""

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.zeros(tokens.batch, k, dtype=torch.int64)


def of_qwen(method: vlmfast.reduce.Method) -> list[list[int]]:
    """Reduce images of two sizes."""
    model = model_of("qwen2_5_vl")
    with torch.no_grad():
        return [image.kept[0].tolist() for image in qwen.reduce(model.model, inputs_of(model, (SMALL, WIDE)), method)]


@pytest.mark.parametrize("cls", [First, Selecting])
def test_a_subclass_decides_by_its_own_lines_in_qwen_too(cls: type[vlmfast.reduce.Method]):
    assert of_qwen(cls(3)) == [[0, 1, 2]] * 2
    tokens = dataclasses.replace(tokens_of(), grid=(2, 3, 3), crops=2)
    (found,) = cls(3).select_each([tokens], videos=True)
    assert found.kept.tolist() == [[0, 1, 2, 9, 10, 11]] * 2


def test_a_subclass_may_select_from_videos_by_its_own_lines():
    class OfVideos(vlmfast.DivPrune):
        def select_videos(self, tokens: VisualTokens) -> Selection:
            return First(3).select(tokens)

    tokens = tokens_of()
    assert OfVideos(3).select_each([tokens], videos=True)[0].kept.tolist() == [[0, 1, 2]] * 2


def test_what_a_subclass_chooses_is_checked():
    class Mixed(Twice):
        pass

    for cls in (Twice, Mixed):
        with pytest.raises(ValueError, match="must return ascending positions within 0 and 17, each once"):
            cls(3).select(tokens_of())
        with pytest.raises(ValueError, match="must return ascending positions"):
            of_qwen(cls(3))


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="centered must be a bool, got 1"):
        vlmfast.DivPrune(4, centered=1)
    with pytest.raises(TypeError, match="alpha must be a number, got '1'"):
        vlmfast.SCOPE(4, alpha="1")
    for alpha in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be finite and not negative"):
            vlmfast.SCOPE(4, alpha=alpha)


METHODS = [vlmfast.DivPrune(1.0), vlmfast.DivPrune(1.0, centered=True), vlmfast.SCOPE(1.0)]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_all_tokens_change_no_bit(model_type: str, method: vlmfast.reduce.Method):
    talk = Talk.of(model_type)
    inputs = talk.batch((10, 0, 11), (12, 1, 13))
    want = talk.model(**inputs).logits
    with vlmfast.patch(talk.model, exclude="*", reduce=method):
        assert torch.equal(talk.model(**inputs).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_an_image_gets_its_tokens_alone_and_in_a_batch(model_type: str):
    talk = Talk.of(model_type)
    base, reduce = talk.model.base_model, REDUCERS[model_type].reduce
    for method in (vlmfast.DivPrune(0.5), vlmfast.DivPrune(0.5, centered=True), vlmfast.SCOPE(0.5)):
        together = reduce(base, talk.vision(0, 1, 2), method)
        for number, image in enumerate(together):
            (alone,) = reduce(base, talk.vision(number), method)
            assert torch.equal(alone.kept[0], image.kept[0])
