"""`PlaceholderMask` beyond a plain forward: every form of masked_scatter, other operations, copies and exports."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.patches_models import logits, tiny
from tests.helpers.thorough import first_of
from vlmfast.patches.masked_rows import (
    PlaceholderMask,
    VideoMask,
    expanded,
    flat,
    masks,
    token_mask,
    video_as_image_masks,
)

PLAIN = torch.tensor([[True, False, True], [False, True, False]])[..., None]


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


@pytest.mark.parametrize(
    "scatter",
    [
        lambda x, mask, source: x.masked_scatter(mask, source),
        lambda x, mask, source: x.masked_scatter(mask=mask, source=source),
        lambda x, mask, source: torch.masked_scatter(x, mask, source=source),
        lambda x, mask, source: torch.masked_scatter(input=x, mask=mask, source=source),
        lambda x, mask, source: x.clone().masked_scatter_(mask, source=source),
    ],
    ids=["method", "keywords", "function", "function with keywords", "in place"],
)
def test_every_way_to_scatter_places_and_counts(scatter):
    x, features, mask = torch.randn(2, 3, 4), torch.randn(3, 4), PLAIN.as_subclass(PlaceholderMask)
    got = scatter(x, mask, features)
    assert type(got) is Tensor
    assert torch.equal(got, x.masked_scatter(PLAIN, features))
    with pytest.raises(ValueError, match=r"^Image features and image tokens do not match, tokens: 3, features: 4$"):
        scatter(x, mask, torch.randn(4, 4))  # upstream's own scatter would drop the last row


def test_mask_is_a_plain_tensor_but_for_masked_scatter():
    plain = PLAIN
    mask = plain.as_subclass(PlaceholderMask)
    x, features = torch.randn(2, 3, 4), torch.randn(3, 4)
    uses: list[Callable[[Tensor], Tensor]] = [
        lambda m: m[..., 0],
        lambda m: m | ~m,
        lambda m: m.expand_as(x).sum(),
        lambda m: torch.where(m, x, 0),
        lambda m: x[m[..., 0]],
        lambda m: torch.cat([m, m]),
        lambda m: x.masked_fill(m, value=1),
        lambda m: m.float().masked_scatter(m.clone(), torch.zeros(3)),
    ]
    for use in uses:
        got, want = use(mask), use(plain)
        assert type(got) is Tensor
        assert got.device == want.device
        assert got.is_meta or torch.equal(got, want)
    fits: list[Callable[[Tensor], Tensor]] = [  # how callers bring a mask to the shape of the embeddings
        lambda m: m.expand_as(x),
        lambda m: m.to(x.device),
        lambda m: m.as_subclass(Tensor)[..., 0].as_subclass(PlaceholderMask).unsqueeze(-1),
    ]
    for fit in fits:
        assert type(fit(mask)) is PlaceholderMask
        assert torch.equal(x.masked_scatter(fit(mask), features), x.masked_scatter(plain, features))
    for shaped in (features, features[None], features.flatten()):
        assert torch.equal(x.masked_scatter(mask, shaped), x.masked_scatter(plain, features))
    with pytest.raises(ValueError, match="tokens: 3, features: 2"):
        x.masked_scatter(mask, features[:2])
    x.requires_grad_()
    assert "place_embeddings" in type(x.masked_scatter(mask, features).grad_fn).__name__


@pytest.mark.parametrize("shape", [lambda function: function, expanded, flat], ids=["", "expanded", "flat"])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (masks("image"), ["Image features and image tokens"]),
        (masks("image", "audio"), ["Image features and image tokens", "Audio features and audio tokens"]),
        (video_as_image_masks, ["Image features and image tokens", "Video features and video tokens"]),
        (lambda *args: token_mask(*args, None, 3), ["Multimodal features and placeholder tokens"]),
    ],
    ids=["image", "image and audio", "video", "token"],
)
def test_numbers_that_differ_are_told_in_upstream_s_words(function: Callable, words: list[str], shape: Callable):
    config = SimpleNamespace(image_token_id=3, audio_token_id=4, video_token_id=3)
    ids, embeds = torch.tensor([[3, 4, 9], [3, 4, 9]]), torch.zeros(2, 3, 4)
    found = shape(function)(SimpleNamespace(config=config), ids, embeds)
    for mask, told in zip(found if isinstance(found, tuple) else [found], words, strict=True):
        mask = mask if mask.dim() == 3 else mask.unsqueeze(-1)  # upstream's callers do the same
        with pytest.raises(ValueError, match=f"^{told} do not match, tokens: 2, features: 5$"):
            embeds.masked_scatter(mask.to(embeds.device), torch.zeros(5, 4))
        with pytest.raises(ValueError, match="image_embeds must be on the device of inputs_embeds"):
            embeds.masked_scatter(mask, torch.zeros(2, 4, device="meta"))


def test_deepcopy():
    twin = copy.deepcopy({"mask": PLAIN.as_subclass(VideoMask)})["mask"]
    assert type(twin) is VideoMask
    assert torch.equal(twin.as_subclass(Tensor), PLAIN)


@pytest.mark.parametrize("strict", first_of([False, True]))
def test_a_patched_model_is_exported(strict: bool):
    model, inputs = tiny("llava")
    want = logits(model, inputs)
    model.config.use_cache = False
    with vlmfast.patch(model):
        exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=strict)
    assert torch.equal(exported.module()(**inputs, use_cache=False).logits, want)


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_features_that_are_passed_along_with_every_token(model_type: str):
    """Up to transformers 5.17 ``generate`` passes features with every token, but only the prompt has placeholders."""
    model, inputs = tiny(model_type)
    with torch.no_grad():
        found = model.model.get_image_features(inputs.pop("pixel_values"))
    features = getattr(found, "pooler_output", found)
    call = {**inputs, "image_hidden_states": features, "max_new_tokens": 3, "do_sample": False}
    try:
        want = model.generate(**call)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this transformers does not take them: {error}"[:120])
    with vlmfast.patch(model):
        assert torch.equal(model.generate(**call), want)
