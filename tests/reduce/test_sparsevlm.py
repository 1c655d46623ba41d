"""SparseVLM between layers, against the full model with what its words choose masked from there on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.cut_models import Masked
from tests.helpers.reduce_models import Talk, question
from tests.helpers.tiny_models import IMAGE
from tests.reduce.test_cuts import GREEDY, LAYERS, STEPS, assert_close, logits, patched, talk_of
from vlmfast.reduce import EvenTokens, SparseVLM

TYPES = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"]
METHOD = SparseVLM((0.5,), layers=(3,))
HALF = {3: lambda count: max(count // 2, 1)}
# text alone, one image, two of other sizes with text between
PROMPTS = ((10, 11, 12), (10, 0, 21, 42, 33), (0, 15, 1, 16, 37, 58, 19))


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


@dataclass
class Rated(Masked):
    """What the raters pay, by loops over the embeddings that the first layer gets."""

    words: tuple[int, ...] | None = None

    def row(self, layer: int) -> Tensor:
        ids, own = self.talk.ids(*self.prompt), self.words
        behind = max(at for at, token in enumerate(ids) if token == IMAGE) + 1
        text = [at for at in range(behind, len(ids)) if ids[at] in question(self.talk, ids)]
        if own is not None:
            text = [at for at, token in enumerate(ids) if token in own]
        rows = self.embeddings().tolist()
        said = dict.fromkeys(text, 0.0)
        visual = [at for at, token in enumerate(ids) if token == IMAGE]
        for image in visual:
            dots = {at: math.fsum(a * b for a, b in zip(rows[image], rows[at], strict=True)) for at in text}
            most = max(dots.values())
            total = math.fsum(math.exp(dot - most) for dot in dots.values())
            for at in text:
                said[at] += math.exp(dots[at] - most) / total / len(visual)
        chosen = [at for at in text if said[at] > math.fsum(said.values()) / len(text)] or text
        assert 0 < len(chosen) < len(text) or len(text) == 1
        return self._attention(layer)[chosen].mean(0)

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        found: list[Tensor] = []
        first: nn.Module = self.talk.model.base_model.language_model.layers[0]

        def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        hook = first.register_forward_pre_hook(keep, with_kwargs=True)
        self.talk.model(**self.inputs([]))
        hook.remove()
        return found[0][0]


def wanted(talk: Talk, cuts: dict, prompts: tuple = PROMPTS) -> list[Masked]:
    return [(Rated if 0 in prompt or 1 in prompt else Masked)(talk, prompt, cuts) for prompt in prompts]


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_of_the_full_model_with_the_columns_masked(model_type: str):
    talk = talk_of(model_type)
    own = wanted(talk, HALF)
    found = [each.logits() for each in own]
    last = Masked(talk, PROMPTS[2], HALF)
    assert last.dropped != own[2].dropped, "the last token chooses the same"
    assert min(each.near for each in own[1:]) > 1e-9
    with patched(talk, METHOD) as patch:
        for side in ("left", "right"):
            got = logits(talk, talk.batch(*PROMPTS, side=side))
            for row, cut in zip(got, found, strict=True):
                assert_close(row[-len(cut) :] if side == "left" else row[: len(cut)], cut)
        one = talk.batch(PROMPTS[2])
        del one["attention_mask"]
        assert_close(logits(talk, one)[0], found[2])
        assert "SparseVLM(keep=(0.5,), layers=(3,)): visual tokens of the last prompt" in patch.report()


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_several_cuts_and_words(model_type: str):
    """The words that were chosen at the first layer rate at each; greedy and with beams."""
    talk, method = talk_of(model_type), SparseVLM((0.75, 0.3), layers=(2, 3))
    own = wanted(talk, {2: lambda count: int(count * 0.75), 3: lambda count: max(int(count * 0.3), 1)})
    inputs = talk.batch(*PROMPTS)
    want, whole = [each.greedy(STEPS) for each in own], [each.logits() for each in own]
    with patched(talk, method):
        for row, rows in zip(logits(talk, inputs), whole, strict=True):
            assert_close(row[-len(rows) :], rows)
        got = talk.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert_close(torch.stack(got.logits, 1), torch.stack([rows for _, rows in want]))
        beams = talk.model.generate(**talk.batch(PROMPTS[1]), **GREEDY, num_beams=2)
    with own[1].masked(talk.model):
        assert torch.equal(talk.model.generate(**talk.batch(PROMPTS[1]), **GREEDY, num_beams=2), beams)
    lengths = [got.past_key_values.get_seq_length(layer) for layer in range(LAYERS)]
    assert lengths[1] > lengths[2] > lengths[3]


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_the_caller_may_say_which_columns_are_text(model_type: str):
    talk, prompt = talk_of(model_type), PROMPTS[2]
    inputs, default = talk.batch(prompt), Rated(talk, prompt, HALF)
    each = (Rated(talk, prompt, HALF, words=words) for words in ((15, 37), (58, 15), (16,), (15,)))
    own = next(other for other in each if other.dropped != default.dropped)
    inputs["text_mask"] = sum(inputs["input_ids"] == word for word in own.words)
    want = own.logits()
    with patched(talk, METHOD):
        assert_close(logits(talk, inputs)[0], want)
        got = [talk.model.generate(**inputs, **GREEDY, num_beams=beams) for beams in (1, 2)]
        assert torch.equal(talk.model.generate(**inputs, **GREEDY, use_cache=False), got[0])
        talk.model(**talk.batch(PROMPTS[0]), text_mask=torch.ones(1, 3))
        with pytest.raises(ValueError, match=r"text_mask must have the shape of input_ids, \(1, \d+\), got \(1, 2\)"):
            logits(talk, {**inputs, "text_mask": torch.ones(1, 2)})
    del inputs["text_mask"]
    for ids, beams in zip(got, (1, 2), strict=True):
        with own.masked(talk.model):
            assert torch.equal(talk.model.generate(**inputs, **GREEDY, num_beams=beams), ids)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_behind_a_method_before_the_language_model(model_type: str):
    """As an unpatched model's inputs that were compressed beforehand, then cut, with the text of the caller's too."""
    talk, before = talk_of(model_type, torch.float32), EvenTokens(0.75)
    inputs = talk.batch(*PROMPTS)
    if "inputs_embeds" in vlmfast.compress_inputs(talk.model, inputs, before):
        pytest.skip("cuts need ids")
    for text in (None, (inputs["input_ids"] == 21) | (inputs["input_ids"] == 15) | (inputs["input_ids"] == 19)):
        more = {} if text is None else {"text_mask": text}
        with patched(talk, METHOD):
            short = vlmfast.compress_inputs(talk.model, inputs, before)
            ids = short["input_ids"]
            told = {} if text is None else {"text_mask": (ids == 21) | (ids == 15) | (ids == 19)}
            want = logits(talk, {**short, **told})
        with patched(talk, [before, METHOD]):
            assert torch.equal(logits(talk, {**inputs, **more}), want)
            words = talk.model.generate(**inputs, **more, **GREEDY)[:, -STEPS]
        assert torch.equal(words[1:], want[1:, -1, 7:].argmax(1) + 7)


def test_a_prompt_without_text_is_refused():
    talk = talk_of("qwen2_5_vl")
    with patched(talk, METHOD), pytest.raises(ValueError, match="sample 1 has none behind its last image"):
        logits(talk, talk.batch((10, 11), (12, 0)))


def test_arguments_are_checked():
    assert SparseVLM(192).keep == (300, 200, 118)
    assert [SparseVLM(64).budget(cut, 576) for cut in range(3)] == [66, 34, 20]
    assert SparseVLM([0.5, 0.001, 0], [1, 2, 3]).budget(1, 100) == 1
    with pytest.raises(
        TypeError, match="keep must be one of 192, 128, 96, 64, or a number or share for each of layers"
    ):
        SparseVLM(100)
    with pytest.raises(
        ValueError, match="keep must have a number or share for each of at least one layers, got 2 and 3"
    ):
        SparseVLM((0.5, 0.25))
    with pytest.raises(ValueError, match="keep must descend"):
        SparseVLM((0.25, 0.5), (1, 2))
    with pytest.raises(ValueError, match="layers must ascend"):
        SparseVLM((0.5, 0.25), (2, 1))
