"""Videos of LLaVA-NeXT-Video and LLaVA-OneVision, whose tokens are pooled from patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.patches_models import tiny
from tests.helpers.reduce_models import clone
from tests.helpers.tiny_models import VIDEO
from tests.helpers.video_models import left_of
from vlmfast import EVS, VCAST, EvenTokens, FlashVID, RandomTokens, VisionZip
from vlmfast.reduce import Method
from vlmfast.reduce.families import REDUCERS

NAMES = ("llava_next_video", "llava_onevision")
FRAMES, TOKENS = 4, 4  # 2 x 2 tokens of 4 x 4 patches
METHODS = [EVS(0.5), VCAST(0.5), VisionZip(dominant=0.5, contextual=0), EvenTokens(2), RandomTokens(0.5)]


def built(name: str) -> Any:
    model, _ = tiny(name)
    if not hasattr(model, "_prepare_position_ids_for_generation"):
        pytest.skip("visual tokens are reduced from transformers 5.17 on")
    assert model.config.video_token_id == VIDEO
    return model


def inputs_of(name: str) -> dict[str, Tensor]:
    """Make two prompts with one video each, of which the first is padded on the left."""
    run = [VIDEO] * (FRAMES * TOKENS + (name == "llava_onevision"))
    ids = torch.tensor([[0, 0, 1, 10, *run, 11], [1, 12, 13, 14, *run, 15]])
    torch.manual_seed(0)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values_videos": torch.randn(2, FRAMES, 3, 28, 28),
    }


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dropped_tokens_are_masked_ones(name: str, method: Method):
    model, inputs = built(name), inputs_of(name)
    with vlmfast.patch(model, reduce=method) as patch:
        short = model(**clone(inputs)).logits
    newline = int(name == "llava_onevision")
    assert [len(video.features) for video in patch.videos] == [FRAMES * TOKENS // 2 + newline] * 2
    mask = inputs["attention_mask"] * left_of(inputs["input_ids"], [], patch.videos)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits
    for got, wanted, seen in zip(short, want, mask.bool(), strict=True):
        torch.testing.assert_close(got[-int(seen.sum()) :], wanted[seen], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", [EVS(1.0), VCAST(1.0), FlashVID(1.0), EvenTokens(1.0)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_no_bit(name: str, method: Method):
    model, inputs = built(name), inputs_of(name)
    want, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with vlmfast.patch(model, exclude="*", reduce=method):
        assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


@torch.no_grad()
@pytest.mark.parametrize("method", [VCAST(0.5), FlashVID(0.5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_beams_and_shortened_inputs_are_the_same(name: str, method: Method):
    model, inputs = built(name), inputs_of(name)
    options = {"max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    with vlmfast.patch(model, reduce=method):
        want = model.generate(**clone(inputs), **options)
    got = model.generate(**vlmfast.compress_inputs(model, clone(inputs), method), **options)
    assert torch.equal(got[:, -3:], want[:, -3:])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_model_and_scores_those_of_their_patches(name: str):
    model, inputs = built(name), inputs_of(name)
    base, asked = model.base_model, []

    class Spy(EvenTokens):
        def select(self, tokens: Any) -> Any:
            asked.append(tokens)
            return super().select(tokens)

    vision = {"pixel_values_videos": inputs["pixel_values_videos"]}
    videos = REDUCERS[name].reduce_videos(base, vision, Spy(1.0))
    # Up to transformers 5.17 the features do not include the newline at the end.
    whole = base.get_video_features(vision["pixel_values_videos"], return_dict=True).pooler_output
    whole = torch.stack([rows.flatten(0, -2)[: FRAMES * TOKENS] for rows in whole])
    (frames,) = asked
    assert (frames.batch, frames.count, frames.grid) == (2 * FRAMES, TOKENS, (1, 2, 2))
    for video, rows in zip(videos, whole, strict=True):
        assert torch.equal(video.features[: FRAMES * TOKENS], rows)
        assert video.grid == (2, 2)
        if name == "llava_onevision":
            assert torch.equal(video.features[FRAMES * TOKENS :], base.image_newline[None])
    torch.testing.assert_close(frames.features().view(2, FRAMES * TOKENS, -1), whole)
    # A token is pooled from 2 x 2 patches; at a factor of two, both ways of pooling are a mean.
    patches = frames_of(model, inputs["pixel_values_videos"])
    torch.testing.assert_close(frames.scores(), patches.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1))


def frames_of(model: Any, pixels: Tensor) -> Tensor:
    """Return the attention that each patch receives: (frames, patches)."""
    from vlmfast.reduce.families.llava_videos import _encode

    return _encode(model.base_model, {"pixel_values_videos": pixels}).scores()
