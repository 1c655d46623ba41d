"""Reduced prompts of Qwen-VL: positions of the full prompt, in the prefill and in decoding, and DeepStack's levels."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers import tiny_models as parts
from tests.helpers.qwen_models import BROAD, NAMES, SMALL, TALL, WIDE, Grid, inputs_of, model_of
from vlmfast import EvenTokens, VisionZip
from vlmfast.reduce import ReducedImage

METHOD = VisionZip(dominant=0.3, contextual=0.15)
ATTENTION = NAMES[:4]  # the others have linear attention, in which masking a token does not equal removing it
ROWS = ((SMALL, WIDE), (TALL,), (BROAD,))


class OfImages(EvenTokens):
    """A method that leaves videos alone."""

    takes = ("image",)


def positions_of(ids: list[int], grids: list[Grid]) -> list[tuple[int, int, int]]:
    """Return frame, row and column of each token, without padding; an image advances positions by its longer side."""
    found, position, token = [], 0, 0
    waiting = list(grids)
    while token < len(ids):
        if ids[token] != parts.IMAGE:
            found.append((position, position, position))
            position, token = position + 1, token + 1
            continue
        _, height, width = waiting.pop(0)
        for row in range(height // 2):
            found += [(position, position + row, position + column) for column in range(width // 2)]
        position += max(height, width) // 2
        token += height * width // 4
    return found


def stay(ids: list[int], images: list[ReducedImage]) -> list[int]:
    """Return the columns that remain of a prompt without padding."""
    columns, token = [], 0
    waiting = list(images)
    while token < len(ids):
        if ids[token] != parts.IMAGE:
            columns.append(token)
            token += 1
        else:
            image = waiting.pop(0)
            columns += [token + column for column in image.columns.tolist()]
            token += image.total
    return columns


def samples(inputs: dict[str, Tensor], rows: tuple[tuple[Grid, ...], ...], images: list[ReducedImage]) -> Any:
    """Yield for each sample its ids without padding, the length of the padding, its grids and its images."""
    waiting = list(images)
    for ids, grids in zip(inputs["input_ids"].tolist(), rows, strict=True):
        padding = ids.count(0)
        yield ids[padding:], padding, list(grids), [waiting.pop(0) for _ in grids]


@contextmanager
def seen_positions(model: Any) -> Any:
    """Record the (3, B, n) positions of each forward of the language model in the block."""
    found: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: found.append(kwargs["position_ids"][-3:]), with_kwargs=True
    )
    yield found
    hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_reduced_prompt_is_one_built_by_hand(name):
    """It has features at their placeholders, the full prompt's positions in three axes, and levels at these tokens."""
    model = model_of(name)
    rows = ROWS[:1]
    inputs = inputs_of(model, *rows)
    plain = copy.deepcopy(model).model
    with torch.no_grad(), vlmfast.patch(model, reduce=METHOD) as patch:
        got = model(**inputs).logits[0]
    ((ids, _, grids, images),) = samples(inputs, rows, patch.images)
    columns = stay(ids, images)
    assert len(columns) == len(got) < len(ids)
    positions = torch.tensor([positions_of(ids, grids)[column] for column in columns]).T
    short = torch.tensor([ids[column] for column in columns])
    is_image = short == parts.IMAGE
    with torch.no_grad():
        embeddings = plain.get_input_embeddings()(short)
        embeddings[is_image] = torch.cat([image.features for image in images])
        deepstack = {}
        if "qwen3_vl" in name:
            levels = [torch.cat(level) for level in zip(*(image.levels for image in images), strict=True)]
            deepstack = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": levels}
        hidden = plain.language_model(inputs_embeds=embeddings[None], position_ids=positions[:, None], **deepstack)
        want = model.lm_head(hidden.last_hidden_state[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("video", [None, (3, 4, 8)], ids=["images", "video"])
@pytest.mark.parametrize("name", ATTENTION)
def test_dropped_tokens_are_masked_ones(name, video):
    """All tokens of a video stay, because the method is not for videos."""
    model = model_of(name)
    inputs = inputs_of(model, *ROWS, video=video)
    mask, full = inputs["attention_mask"].clone(), inputs["input_ids"]
    axes, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if "pixel" not in k})
    with torch.no_grad(), vlmfast.patch(model, reduce=OfImages(0.5)) as patch:
        short = model(**inputs).logits
    for row, (ids, padding, _, images) in enumerate(samples(inputs, ROWS, patch.images)):
        left = [padding + column for column in stay(ids, images)]
        mask[row] = torch.zeros_like(mask[row]).index_fill(0, torch.tensor(left), 1)
    assert mask.sum() < inputs["attention_mask"].sum()
    assert (full == parts.VIDEO).logical_and(mask == 0).sum() == 0
    with torch.no_grad():
        want = model(**{**inputs, "attention_mask": mask}, position_ids=axes).logits
    for row in range(len(ROWS)):
        kept = mask[row].bool()
        torch.testing.assert_close(short[row, -int(kept.sum()) :], want[row, kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_stay_where_they_were_and_decoding_goes_on_there(name):
    model = model_of(name)
    inputs = inputs_of(model, *ROWS)
    with seen_positions(model) as full:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vlmfast.patch(model, reduce=METHOD) as patch, seen_positions(model) as short:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for row, (ids, _, grids, images) in enumerate(samples(inputs, ROWS, patch.images)):
        wanted = positions_of(ids, grids)
        kept = [wanted[column] for column in stay(ids, images)]
        assert [tuple(axes) for axes in full[0][:, row, -len(wanted) :].T.tolist()] == wanted
        assert [tuple(axes) for axes in short[0][:, row, -len(kept) :].T.tolist()] == kept
    assert short[0].shape[2] < full[0].shape[2]
    assert [step.tolist() for step in short[1:]] == [step.tolist() for step in full[1:]]


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_the_caller_go_on_there_as_well(name):
    """The caller passes a cache, but neither ``position_ids`` nor a mask, which would count as that of the step."""
    model = model_of(name)
    inputs = inputs_of(model, ROWS[0])
    found = []
    for reduced in (False, True):
        patch = vlmfast.patch(model, reduce=METHOD) if reduced else nullcontext()
        with patch, torch.no_grad(), seen_positions(model) as positions:
            cache = model(**inputs, use_cache=True).past_key_values
            model(input_ids=torch.tensor([[17]]), past_key_values=cache)
            model(input_ids=torch.tensor([[18, 19]]), past_key_values=cache)
        found.append([step.tolist() for step in positions[1:]])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_its_prompts(name):
    model = model_of(name)
    batch = inputs_of(model, *ROWS)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with vlmfast.patch(model, reduce=METHOD):
        together = model.generate(**batch, **options)
        first = first_patch = 0
        for row, grids in enumerate(ROWS):
            images, patches = len(grids), sum(t * h * w for t, h, w in grids)
            alone = {
                key: value[row : row + 1, batch["input_ids"][row] != 0]
                for key, value in batch.items()
                if key not in ("pixel_values", "image_grid_thw")
            }
            alone["image_grid_thw"] = batch["image_grid_thw"][first : first + images]
            alone["pixel_values"] = batch["pixel_values"][first_patch : first_patch + patches]
            first, first_patch = first + images, first_patch + patches
            single = model.generate(**alone, **options)
            for got, want in zip(together.logits, single.logits, strict=True):
                torch.testing.assert_close(got[row], want[0], rtol=1e-4, atol=1e-4)
            assert together.sequences[row, -4:].tolist() == single.sequences[0, -4:].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [EvenTokens(1.0), VisionZip(dominant=1.0, contextual=0)], ids=["even", "visionzip"])
def test_all_tokens_are_the_model_itself(name, method):
    model = model_of(name)
    inputs = inputs_of(model, *ROWS)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        want, tokens = model(**inputs).logits, model.generate(**inputs, **options)
        with vlmfast.patch(model, only="*get_placeholder_mask", reduce=method):
            got, short = model(**inputs).logits, model.generate(**inputs, **options)
    assert torch.equal(got, want)
    assert torch.equal(short.sequences, tokens.sequences)
    assert all(map(torch.equal, short.logits, tokens.logits))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_video_alone_is_refused_by_a_method_for_images(name):
    model = model_of(name)
    inputs = inputs_of(model, (), video=(3, 4, 8))
    with (
        vlmfast.patch(model, reduce=OfImages(0.5)),
        pytest.raises(ValueError, match=r"OfImages.* reduces images, and the prompt has videos alone"),
    ):
        model(**inputs)
