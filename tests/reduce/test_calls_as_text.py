"""Methods as text, and how many tokens they leave, which is known before an image is encoded."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from vlmfast.reduce import (
    SCOPE,
    DivPrune,
    EvenTokens,
    FastV,
    Method,
    PruningMethod,
    PyramidDrop,
    RandomTokens,
    VisionZip,
    VisualTokens,
)
from vlmfast.reduce.spelling import parse, spell_call

METHODS = (
    VisionZip(54, 10),
    VisionZip(0.3, 0.1, merge="mean", packing="model"),
    DivPrune(64, centered=True),
    SCOPE(0.2, alpha=0.5),
    EvenTokens(1.0),
    RandomTokens(8, seed=3),
    FastV(2, 0.5),
    PyramidDrop((8, 16), (0.5, 0.25)),
)


@dataclass(frozen=True)
class Own(PruningMethod):
    """A user's method."""

    power: int = 1

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.scores() ** self.power


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_text_makes_the_method_again(method):
    assert parse(spell_call(method)) == method


def test_a_method_of_another_module_is_imported_for_a_configuration_and_never_for_a_request(monkeypatch):
    module = ModuleType("somebodys_methods")
    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_methods", module)
    monkeypatch.setattr(Own, "__module__", "somebodys_methods")
    text = spell_call(Own(8, power=2))
    assert text == "somebodys_methods.Own(keep=8, power=2)"
    assert parse(text, trusted=True) == Own(8, power=2)
    with pytest.raises(ValueError, match=r"must name one of .*VisionZip.* got somebodys_methods\.Own"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DivPrune(keep=print)", "literal"),
        ("DivPrune(**{'keep': 3})", "literal"),
        ("DivPrune(", "literal"),
        ("(3)", "literal"),
        ("DivPrune(keep=3, other=4)", "unexpected keyword argument 'other'"),
        ("DivPrune(keep=-3)", "keep must be an int of at least 0"),
        ("os.system('true')", "must name one of"),
        ("visionzip:54", "visionzip is written visionzip:DOMINANT"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_trusted_text_names_a_method():
    for text, message in (("os.system('true')", "os.system is no method"), ("nowhere.Own(3)", "no method nowhere.Own")):
        with pytest.raises(ValueError, match=message):
            parse(text, trusted=True)


def test_methods_that_other_processes_cannot_find_are_not_written(monkeypatch):
    class Plain(Method):
        def budget(self, count, has_cls, crops=1):
            return 1, 0

    with pytest.raises(TypeError, match="must be a dataclass"):
        spell_call(Plain())
    monkeypatch.setattr(Own, "__module__", "__main__")
    with pytest.raises(TypeError, match="module that can be imported"):
        spell_call(Own(3))


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("method", [VisionZip(5, 3), VisionZip(40, 3), EvenTokens(0.5), DivPrune(40)], ids=repr)
def test_counts_are_what_is_left(method, has_cls):
    rows = torch.randn(2, 16, 4)
    tokens = VisualTokens(
        hidden=rows,
        grid=(1, 4, 4),
        scores=lambda: rows.mean(2),
        metric=lambda: rows,
        features=lambda: rows,
        pixels=lambda: rows,
        has_cls=has_cls,
    )
    selection = method.select(tokens)
    counts = method.counts(16, has_cls, 16)
    assert counts == (selection.kept.shape[1], selection.contextual, selection.keep_cls)
    assert sum(counts) <= 16
