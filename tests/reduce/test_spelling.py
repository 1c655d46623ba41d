"""Methods as they are typed, and what is measured of their choices."""

from __future__ import annotations

import re

import pytest
import torch

import vlmfast
from vlmfast.reduce import Selection, VisualTokens
from vlmfast.reduce.measures import kept, watched
from vlmfast.reduce.methods import METHODS
from vlmfast.reduce.spelling import at_budget, parse, spell, usage, written


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("visionzip:54+10", vlmfast.VisionZip(54, 10)),
        ("visionzip:0.4:0.1:merge=mean", vlmfast.VisionZip(0.4, 0.1, merge="mean")),
        ("divprune:64:centered=True", vlmfast.DivPrune(64, centered=True)),
        ("divprune:keep=64", vlmfast.DivPrune(64)),
        ("SCOPE:64:alpha=0.5", vlmfast.SCOPE(64, 0.5)),
        ("pyramiddrop:8,16:0.5,0.25", vlmfast.PyramidDrop((8, 16), (0.5, 0.25))),
        ("scope:0.3+fastv:8:0.5", [vlmfast.SCOPE(0.3), vlmfast.FastV(8, 0.5)]),
        ("visionzip:54+10+fastv:2+64", [vlmfast.VisionZip(54, 10), vlmfast.FastV(2, 64)]),
    ],
)
def test_what_is_typed(text: str, methods: object):
    assert parse(text) == methods


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scop:64", ["unknown method 'scop'", "known: ", "scope", "visionzip", "written as scope:64"]),
        ("visionzip:54", ["visionzip is written visionzip:DOMINANT:CONTEXTUAL[:merge=reference]", "'contextual'"]),
        ("divprune:64:center=True", ["divprune is written divprune:KEEP[:centered=False]", "center=True"]),
        ("divprune:64:centered=1", ["divprune is written", "centered must be a bool"]),
        ("scope:0.3+fastv:8,0.5", ["fastv is written fastv:LAYER:KEEP", "'fastv:8,0.5'"]),
        ("even:", ["even is written even:KEEP"]),
        ("evs:0.5", ["evs reduces videos, not images"]),
        ("even:-1", ["keep must be an int of at least 0"]),
    ],
)
def test_what_is_not_understood(text: str, words: list[str]):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        parse(text)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("keep", [16, 0.25])
def test_every_method_is_typed_and_has_a_budget(keep: float):
    """Read from the register: what `at_budget` makes is typed as it is spelled, and the help names it."""
    for name, cls in METHODS.items():
        method = at_budget(cls, keep, 64, 2)
        if method is not None:
            assert parse(spell(method), cls.takes[0]) == method
        assert all(written(cls) in usage(kind) for kind in cls.takes), name
    assert at_budget(METHODS["pyramiddrop"], 64, 260, 2).budget(0, 260) == 64
    assert spell([vlmfast.SCOPE(0.3), vlmfast.DivPrune(4, centered=True)]) == "scope:0.3+divprune:4:centered=True"


def test_what_is_kept():
    """Two of four tokens: 0.7 of the attention, and each of the others at 60 degrees or at a right angle."""
    rows = torch.tensor([[[1.0, 0.0], [0.5, 3**0.5 / 2], [0.0, -1.0], [2.0, 0.0]]])
    scores = torch.tensor([[0.4, 0.1, 0.2, 0.3]])
    none = dict.fromkeys(("metric", "features", "pixels"), lambda: rows)
    tokens = VisualTokens(hidden=rows, grid=(1, 2, 2), scores=lambda: scores, **none)
    found = kept(tokens, torch.tensor([[0, 3]]))
    assert found.attention == pytest.approx(0.7)
    assert found.coverage == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.worst == pytest.approx(0)
    method = vlmfast.SCOPE(2)
    noting, seen = watched(method)
    selection: Selection = noting.select(tokens)
    assert noting == method
    assert seen[0][0] is tokens
    assert torch.equal(seen[0][1].kept, selection.kept)
    (again,) = noting.select_each([tokens])
    assert (len(seen), seen[1][1].kept.tolist()) == (2, again.kept.tolist())
    assert "select" not in vars(method)
