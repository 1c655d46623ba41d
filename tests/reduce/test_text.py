"""The text that a method may choose by: which columns of a prompt it is, in batches and turns; and CDPruner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.reduce_models import Talk
from tests.helpers.tiny_models import IMAGE
from tests.ops.test_greedy_selection import coverage_by_rule
from tests.reduce.test_greedy_methods import COUNT, KEEP, cosines, tokens_of
from vlmfast.reduce import EADP, CDPruner, PruningMethod, VisualTokens
from vlmfast.reduce.methods.eadp import importance
from vlmfast.reduce.text import Text

TYPES = ["llava", "llava_next", "internvl", "qwen2_5_vl"]
# text alone, a mark within the text, two images of other sizes with text between them
MARK = 19  # stands for the id that ends a text
PROMPTS = ((10, 11, 12), (10, 0, 11, MARK, 12), (0, 15, 1, 16, 17, 18))
WANTED = {1: [11, 12], 2: [16, 17, 18]}
GREEDY = {"do_sample": False, "max_new_tokens": 3}


@dataclass(frozen=True)
class Reader(PruningMethod):
    """Tells which text it was shown."""

    keep: float = 0.5
    seen: list[VisualTokens] = field(default_factory=list)

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        self.seen.append(tokens)
        return torch.arange(k).expand(tokens.batch, -1)

    def texts(self, talk: Talk) -> list[list[int]]:
        """Return the words of each image, crops as one, found again by their embeddings."""
        table = talk.model.base_model.get_input_embeddings().weight
        found: list[list[int]] = []
        for tokens in self.seen:
            text = tokens.text()
            assert text.mask.shape == text.embeddings.shape[:2] == (tokens.batch, text.mask.shape[1])
            for rows, mask in zip(text.embeddings, text.mask, strict=True):
                found.append([int((table == row).all(1).nonzero()[0, 0]) for row in rows[mask]])
        return found


def ends(talk: Talk, words: list[int]) -> list[int]:
    """Put the mark behind an image in front, where the configuration has no name for it."""
    return words if talk.model_type.startswith("qwen") else [6, *words]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", TYPES)
def test_each_image_gets_what_follows_the_last_one_of_its_sample(model_type: str, side: str):
    talk, reader = Talk.of(model_type), Reader()
    with vlmfast.patch(talk.model, exclude="*", reduce=reader):
        inputs = talk.batch(*PROMPTS, side=side)
        inputs["input_ids"][inputs["input_ids"] == MARK] = talk.model.config.get_text_config().eos_token_id
        talk.model(**inputs)
    words = {sample: ends(talk, own) for sample, own in WANTED.items()}
    found = reader.texts(talk)
    assert {tuple(own) for own in found} == {tuple(own) for own in words.values()}
    # of a sample with one image fewer rows than of that with two
    assert found.count(words[1]) < found.count(words[2])


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_the_caller_may_say_which_columns_are_text(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch((10, 0, 11, 12), (0, 13, 14))
    inputs["text_mask"] = (inputs["input_ids"] == 10) | (inputs["input_ids"] == 14) | (inputs["input_ids"] == IMAGE)
    for call in ("forward", "generate", "compress"):
        reader = Reader()
        if call == "compress":
            short = vlmfast.compress_inputs(talk.model, inputs, reader)
            assert "text_mask" not in short
        else:
            with vlmfast.patch(talk.model, exclude="*", reduce=reader):
                if call == "forward":
                    talk.model(**inputs)
                else:
                    ids = talk.model.generate(**inputs, **GREEDY)
                    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3
        assert reader.texts(talk) == [[10], [14]]
    alone = talk.batch((10, 11))
    with vlmfast.patch(talk.model, exclude="*", reduce=Reader()):
        talk.model(**alone, text_mask=torch.ones_like(alone["input_ids"]))
        with pytest.raises(ValueError, match=r"text_mask must have the shape of input_ids, \(2, \d+\), got \(2, 3\)"):
            talk.model(**{**inputs, "text_mask": torch.ones(2, 3)})


@torch.no_grad()
def test_a_prompt_without_text_is_refused_by_a_method_that_asks():
    talk = Talk.of("qwen2_5_vl")
    batch = talk.batch((10, 0, 11), (12, 0))
    with vlmfast.patch(talk.model, exclude="*", reduce=CDPruner(0.5)):
        with pytest.raises(ValueError, match=r"sample 1 has none behind its last image: put .* or give text_mask="):
            talk.model(**batch)
        talk.model(**batch, text_mask=batch["input_ids"] >= 10)
    with pytest.raises(ValueError, match="the text of the prompt is not known here"):
        CDPruner(4).select(tokens_of())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "internvl"])
def test_a_second_turn_asks_anew(model_type: str):
    """Of images in the cache nothing is asked, and those of the new turn get its text; all images are given again."""
    talk, reader = Talk.of(model_type), Reader()
    first, second = (10, 0, 11), (12, 1, 13, 14)
    with vlmfast.patch(talk.model, exclude="*", reduce=reader):
        inputs = talk.batch(first)
        out = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert reader.texts(talk)[0] == ends(talk, [11])
        reader.seen.clear()
        more = {**talk.batch((*first, *second)), **talk.vision(0, 1)}
        ids = torch.cat([out.sequences, torch.tensor([talk.ids(*second)])], 1)
        more |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        talk.model.generate(**more, past_key_values=out.past_key_values, **GREEDY)
        assert {tuple(words) for words in reader.texts(talk)} == {tuple(ends(talk, [13, 14]))}


@torch.no_grad()
def test_frames_of_a_video_have_its_text():
    text = Text(torch.randn(2, 3, 5), torch.tensor([[True, True, False], [True, True, True]]))
    features = torch.randn(2, 12, 5)
    lazy: dict[str, Any] = {name: lambda: features for name in ("scores", "metric", "features", "pixels")}
    tokens = VisualTokens(hidden=features, grid=(3, 2, 2), text=lambda: text, crops=3, **lazy)
    frames = tokens.by_frame().text()
    assert torch.equal(frames.mask, text.mask[[0, 0, 0, 1, 1, 1]])
    assert torch.equal(frames.embeddings[4], text.embeddings[1])
    torch.testing.assert_close(text.mean()[0], text.embeddings[0, :2].mean(0))
    assert torch.equal(tokens.take([1], 12).text().mask, text.mask[1:])


# ---- CDPruner ----


def determinant(rows: list[list[float]]) -> float:
    return float(torch.tensor(rows, dtype=torch.float64).det())


def text_of(*lengths: int, size: int = 5) -> Text:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Text(torch.randn(len(lengths), longest, size), mask)


def unlike(row: list[float], other: list[float]) -> float:
    return -cosines([row, other])[0][1]


def min_max(worth: list[float]) -> list[float]:
    return [(x - min(worth) + 1e-6) / (max(worth) - min(worth) + 1e-6) for x in worth]


def test_cdpruner_follows_the_rule():
    """At each step the token with which the determinant of the kernel of the chosen ones is largest."""
    text = text_of(4, 2, size=16)
    tokens = tokens_of(features=torch.randn(2, COUNT, 16), text=text)
    kept = CDPruner(KEEP).select(tokens).kept
    for image, rows in enumerate(tokens.features().tolist()):
        words = text.embeddings[image][text.mask[image]].tolist()
        mean = [math.fsum(column) / len(words) for column in zip(*words, strict=True)]
        worth = min_max([unlike(row, mean) for row in rows])
        alike = cosines(rows)
        chosen: list[int] = []
        while len(chosen) < KEEP:
            left = [j for j in range(COUNT) if j not in chosen]
            sets = [[*chosen, j] for j in left]
            values = [determinant([[worth[a] * alike[a][b] * worth[b] for b in s] for a in s]) for s in sets]
            chosen.append(left[values.index(max(values))])
        assert kept[image].tolist() == sorted(chosen)


# ---- EADP ----


def blurred(worth: list[float], rows: int, columns: int) -> list[float]:
    """By a 3 x 3 Gaussian; what is beyond an edge is what is as far on this side of it."""

    def inside(at: int, size: int) -> int:
        return -at if at < 0 else 2 * size - 2 - at if at >= size else at

    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    total = math.fsum(math.exp(-(dy * dy + dx * dx) / 2) for dy, dx in steps)
    return [
        math.fsum(
            math.exp(-(dy * dy + dx * dx) / 2) * worth[inside(y + dy, rows) * columns + inside(x + dx, columns)]
            for dy, dx in steps
        )
        / total
        for y in range(rows)
        for x in range(columns)
    ]


@pytest.mark.parametrize("beta", [1.0, 2])
def test_eadp_follows_the_rule(beta: float):
    text = text_of(11, 3)
    tokens = tokens_of(text=text)
    kept = EADP(KEEP, beta=beta).select(tokens).kept
    for image, rows in enumerate(tokens.features().tolist()):
        words = text.embeddings[image][text.mask[image]].tolist()
        mean = [math.fsum(column) / len(words) for column in zip(*words, strict=True)]
        said = [[unlike(row, word) for row in rows] for word in words]
        entropies = []
        for own in said:
            total = math.fsum(math.exp(100 * x) for x in own)
            shares = [math.exp(100 * x) / total for x in own]
            entropies.append(-math.fsum(p * math.log(p + 1e-12) for p in shares))
        counted = sorted(range(len(words)), key=lambda word: entropies[word])[: max(1, int(0.2 * len(words)))]
        assert len(counted) == (2, 1)[image]
        heat = [math.exp(-(entropies[word] - entropies[counted[0]]) / (0.01 + 1e-6)) for word in counted]
        worth = [
            0.5 * unlike(row, mean)
            + 0.5 * math.fsum(h * said[word][i] for h, word in zip(heat, counted, strict=True)) / math.fsum(heat)
            for i, row in enumerate(rows)
        ]
        weights = [x**beta for x in blurred(min_max(worth), 3, 6)]
        got = importance(tokens.features(), text, tokens.grid)[image] ** beta
        torch.testing.assert_close(got, torch.tensor(weights), rtol=1e-4, atol=1e-5)
        similarity = [[(1 + cosine) / 2 for cosine in row] for row in cosines(rows)]
        assert kept[image].tolist() == coverage_by_rule(similarity, KEEP, weights, [1.0] * COUNT)


def test_eadp_takes_grids_of_any_kind():
    features, text = torch.randn(1, 6, 5), text_of(2)
    for grid in (None, (1, 1, 6), (1, 2, 2)):
        assert torch.equal(importance(features, text, grid), importance(features, text, None))
    with pytest.raises(TypeError, match="beta must be a number, got '1'"):
        EADP(4, beta="1")
    with pytest.raises(ValueError, match="beta must be finite and not negative"):
        EADP(4, beta=-1)


# ---- both ----


@torch.no_grad()
@pytest.mark.parametrize("method", [CDPruner(0.25), EADP(0.5)], ids=str)
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_another_question_keeps_other_tokens(model_type: str, method: PruningMethod):
    """The same in a batch as alone, and gone where it is said that the text is another."""
    talk = Talk.of(model_type)
    with vlmfast.patch(talk.model, exclude="*", reduce=method) as patch:
        found = {}
        for words in ((11, 12), (40, 50, 60), (21, 33), (55, 14), (37, 38, 39), (26, 60)):
            talk.model(**talk.batch((10, 1, *words)))
            found.setdefault(tuple(patch.images[0].kept[0].tolist()), (10, 1, *words))
        prompts, alone = list(found.values())[:2], [list(kept) for kept in found][:2]
        talk.model(**talk.batch(*prompts))
        assert [image.kept[0].tolist() for image in patch.images] == alone
        assert len(alone) == 2
        both = talk.batch(*prompts)
        talk.model(**both, text_mask=both["input_ids"] == 10)
        assert patch.images[0].kept[0].tolist() == patch.images[1].kept[0].tolist()
