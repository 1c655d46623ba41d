"""The interface of reduction methods: what they may ask and return, and that a new one is one file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.reduce_models import EACH_TYPE, Talk
from vlmfast.reduce import EvenTokens, Method, PruningMethod, RandomTokens, Selection, VisionZip, VisualTokens
from vlmfast.reduce.families import REDUCERS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Spy(EvenTokens):
    """Records the tokens that it was given."""

    asked: list[VisualTokens] = field(default_factory=list)

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        self.asked.append(tokens)
        return super().choose(tokens, k)


@torch.no_grad()
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_features_are_what_the_language_model_gets_of_all_tokens(model_type: str):
    talk = Talk.of(model_type)
    spy = Spy(1.0)
    base = talk.model.base_model
    (image,) = REDUCERS[model_type].reduce(base, talk.vision(1), spy)
    whole = base.get_image_features(**talk.vision(1), return_dict=True).pooler_output
    (tokens,) = spy.asked
    frames, rows, columns = tokens.grid
    assert tokens.count == frames * rows * columns
    assert (rows, columns) == image.grid
    assert tokens.features().shape[:2] == (tokens.batch, tokens.count)
    assert not tokens.features().requires_grad
    torch.testing.assert_close(tokens.features()[0], whole[0][: tokens.count])  # the overview is the first crop
    assert tokens.features() is tokens.features()
    assert tokens.scores().shape == (tokens.batch, tokens.count)


class Scored(Method):
    """A method as users write them, with a budget and scores."""

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        return 4, 0

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.scores()


class WithCls(Scored):
    def score(self, tokens: VisualTokens) -> Tensor:
        scores = tokens.scores()
        return torch.cat([scores.new_full((len(scores), 1), -1.0), scores], 1)


class Silent(Scored):
    def score(self, tokens: VisualTokens) -> None:
        pass


class Choosing(Scored):
    """Always chooses the given positions."""

    def __init__(self, *positions: float) -> None:
        self.positions = positions

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.tensor(self.positions).expand(tokens.batch, -1)


@torch.no_grad()
def test_budget_and_score_are_a_method_and_wrong_answers_are_refused():
    talk = Talk.of("llava")
    base, vision = talk.model.base_model, talk.vision(0, 1)
    reduce = REDUCERS["llava"].reduce
    for image, want in zip(reduce(base, vision, Scored()), reduce(base, vision, VisionZip(5, 0)), strict=True):
        assert torch.equal(image.kept[0], want.kept[0])
    with pytest.raises(ValueError, match=r"score of .* must be of the shape \(B, N\) = \(2, 16\), got \(2, 17\)"):
        reduce(base, vision, WithCls())
    with pytest.raises(TypeError, match="score of Silent must return a tensor, got NoneType"):
        reduce(base, vision, Silent())
    for wrong in ((0, 1, 2), (0, 1, 2, 3, 4)):
        with pytest.raises(ValueError, match=rf"choose of Choosing must return \(2, 4\), got \(2, {len(wrong)}\)"):
            reduce(base, vision, Choosing(*wrong))
    for wrong in ((0, 3, 2, 4), (0, 2, 2, 4), (-1, 0, 1, 2), (12, 13, 14, 16)):
        got = ", ".join(map(str, wrong))
        ascending = rf"choose of Choosing must return ascending positions within 0 and 15, each once, got \[{got}\]"
        with pytest.raises(ValueError, match=ascending):
            reduce(base, vision, Choosing(*wrong))
    with pytest.raises(ValueError, match=r"choose of Choosing must return int64 positions, got torch\.float32"):
        reduce(base, vision, Choosing(0.0, 1.0, 2.0, 3.0))
    for image in reduce(base, vision, Choosing(0, 5, 6, 15)):
        assert image.kept[0].tolist() == [0, 5, 6, 15]


def test_what_makes_no_method_is_refused_when_it_is_made():
    class Chose(PruningMethod):
        def chose(self, tokens: VisualTokens, k: int) -> None: ...

    with pytest.raises(TypeError, match=r"Chose must have score\(tokens\) or choose\(tokens, k\), and has neither"):
        Chose(4)
    with pytest.raises(TypeError, match="seed must be an int, got 'a'"):
        RandomTokens(4, seed="a")


def test_a_budget_is_at_least_nothing():
    class Negative(EvenTokens):
        def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
            return 3, -1

    talk = Talk.of("llava")
    with pytest.raises(ValueError, match=r"budget of .*Negative.* must be of at least 0 \+ 0 .*, got 3 \+ -1"):
        REDUCERS["llava"].reduce(talk.model.base_model, talk.vision(0), Negative(3))
    for wrong in (3, (3, 0, 1), (2.5, 0), None):
        odd = type("Odd", (EvenTokens,), {"budget": lambda self, *_: wrong})(3)  # noqa: B023
        with pytest.raises(TypeError, match=r"budget of .*Odd.* must return two ints, kept and contextual, got"):
            REDUCERS["llava"].reduce(talk.model.base_model, talk.vision(0), odd)
    with pytest.raises(ValueError, match=r"dominant and contextual must be shares of at most 1\.0 .*\[0\.8, 0\.3\]"):
        VisionZip(0.8, 0.3)
    assert VisionZip(0.7, 0.3).budget(10, False) == (7, 3)


@torch.no_grad()
@pytest.mark.parametrize("method", [EvenTokens(1000), vlmfast.RandomTokens(70), VisionZip(60, 1000)], ids=str)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_an_image_with_fewer_tokens_than_the_budget_keeps_what_it_has(model_type: str, method: Method):
    """A kept CLS token takes the place of a patch."""
    talk = Talk.of(model_type)
    images = REDUCERS[model_type].reduce(talk.model.base_model, talk.vision(0, 1), method)
    published = isinstance(method, VisionZip) and model_type.startswith("llava_next")  # three crops without newlines
    for image, total in zip(images, talk.counts, strict=False):
        assert image.total == total
        assert len(image.features) == (3 * 16 if published else total)


@torch.no_grad()
def test_small_images_beside_large_ones():
    talk = Talk.of("qwen2_5_vl")
    base, vision = talk.model.base_model, talk.vision(0, 1, 2)
    assert talk.counts == [4, 8, 12]
    for method, want in (
        (EvenTokens(6), [(4, 0), (6, 0), (6, 0)]),
        (VisionZip(3, 4), [(3, 1), (3, 4), (3, 4)]),
        (VisionZip(10, 2), [(4, 0), (8, 0), (10, 2)]),
    ):
        images = REDUCERS["qwen2_5_vl"].reduce(base, vision, method)
        assert [(len(image.kept[0]), len(image.merged[0])) for image in images] == want


@torch.no_grad()
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_a_random_draw_is_the_pictures_own(model_type: str):
    """The draw is the same alone, in any batch and beside other sizes; it differs for another picture or seed."""
    talk = Talk.of(model_type)

    def drawn(*numbers: int, seed: int = 0) -> list[list[list[int]]]:
        images = REDUCERS[model_type].reduce(
            talk.model.base_model, talk.vision(*numbers), vlmfast.RandomTokens(0.5, seed=seed)
        )
        return [[crop.tolist() for crop in image.kept] for image in images]

    first, second, third = drawn(0, 1, 2)
    assert [drawn(0), drawn(1), drawn(2)] == [[first], [second], [third]]
    assert drawn(2, 0, 0) == [third, first, first]
    assert first[0] != third[0]
    assert first != drawn(0, seed=1)[0]


def test_all_that_a_model_uses_is_kept():
    """In a model that uses the CLS token, that is one of the kept tokens."""
    talk = Talk.of("llava")
    base, vision = talk.model.base_model, {**talk.vision(0), "vision_feature_select_strategy": "full"}
    for method in (EvenTokens(1.0), EvenTokens(17), VisionZip(1.0, 0), VisionZip(17, 0), VisionZip(99, 9)):
        (image,) = REDUCERS["llava"].reduce(base, vision, method)
        assert (image.total, len(image.features)) == (17, 17), method


def test_what_merges_says_how():
    tokens: dict[str, Any] = dict.fromkeys(("scores", "metric", "features", "pixels"), lambda: torch.rand(1, 6))
    tokens |= {"hidden": torch.rand(1, 6, 8), "has_cls": True, "grid": (1, 2, 3)}
    tokens["metric"] = lambda: torch.rand(1, 6, 4)
    found: Selection = VisionZip(3, 2, merge="mean").select(VisualTokens(**tokens))
    assert (found.merge, found.keep_cls, found.kept.shape[1]) == ("mean", True, 2)
    found = EvenTokens(3).select(VisualTokens(**tokens))
    assert (found.keep_cls, found.kept.tolist()) == (False, [[0, 2, 4]])


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("method", [EvenTokens(0.01), VisionZip(0.1, 0.05), vlmfast.RandomTokens(0.9)], ids=str)
def test_a_share_of_a_small_image_is_a_token(method: Method, has_cls: bool):
    """A share that rounds down to zero tokens would remove the image, so at least one is kept."""
    assert method.budget(1, has_cls) == (1 - (has_cls and method.keeps_cls), 0)
    assert type(method)(*[0] * len(type(method).required())).budget(1, False) == (0, 0)


HEAD = """
from dataclasses import dataclass

import torch

from vlmfast.reduce.methods.method import PruningMethod


"""
USE = """
import vlmfast
from scripts import docs_methods
from vlmfast.reduce import spelling
assert spelling.parse("farthest:0.25") == vlmfast.Farthest(0.25) == vlmfast.reduce.Farthest(keep=0.25)
assert "Farthest" in vlmfast.__all__ and "Farthest" in vlmfast.reduce.__all__
assert "farthest:KEEP" in spelling.usage()
row = "| `farthest:KEEP` | before the language model | Tokens that are unlike each other. |"
page = docs_methods.page()
assert row in page and "Reads: tokens as the language model sees them" in page.split("### Farthest")[1]
"""


def test_positions_of_merged_tokens_are_those_of_their_targets():
    slots = torch.tensor([[-2, 2, 0, 3, -1, 1]], dtype=torch.int32)
    selection = Selection(torch.tensor([[0, 4]]), slots, 2)
    assert selection.positions().tolist() == [[0, 4, 2, 5]]


@pytest.mark.thorough
def test_a_new_method_is_one_file(tmp_path: Path):
    """In a copy of the tree, the docs' example method gets a public name, a name for the demo, a docs row and tests."""
    shutil.copytree(ROOT / "vlmfast", tmp_path / "vlmfast", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.name != "vlmfast" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    page = (ROOT / "docs" / "token_reduction.md").read_text()
    example = page[page.index("@dataclass") : page.index("\npatched = vlmfast.patch(model, reduce=Farthest")]
    example = example.replace("(vlmfast.reduce.PruningMethod)", '(PruningMethod, name="farthest")')
    (tmp_path / "vlmfast" / "reduce" / "methods" / "farthest.py").write_text(HEAD + example)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-c", USE)
    chosen = ("tests/reduce/test_prompt.py", "-k", "by_hand and Farthest and llava-")
    assert "2 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
