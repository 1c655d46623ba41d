"""`SmallerImage`: a prompt gives what the model gives of a picture that is smaller, and that of its processor."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import vlmfast
from tests.helpers.reduce_models import EACH_TYPE, Talk, clone
from tests.helpers.tiny_models import IMAGE
from vlmfast.reduce.families import REDUCERS
from vlmfast.reduce.families.shrinking import _patches, _picture, smaller_grids

METHOD = vlmfast.SmallerImage(0.5)
WITH, WITHOUT = ([kind for kind in EACH_TYPE if (REDUCERS[kind].shrink is None) == refused] for refused in (0, 1))
QWEN = [kind for kind in WITH if kind.startswith("qwen")]


@pytest.mark.parametrize(("rows", "columns", "keep", "size"), [(24, 24, 64, (8, 8)), (24, 24, 70, (8, 8)),
    (28, 42, 64, (7, 9)), (42, 28, 64, (9, 7)), (2, 40, 8, (1, 8)), (3, 3, 100, (3, 3)),
    (24, 24, 0.001, (1, 1))])  # fmt: skip
def test_size_of_the_smaller_picture(rows: int, columns: int, keep: float, size: tuple[int, int]):
    assert vlmfast.SmallerImage(keep).grid(rows, columns) == size


def test_a_square_stays_one():
    assert [vlmfast.SmallerImage(keep).grid(24, 24, square=True) for keep in (3, 35, 576)] == [(1, 1), (5, 5), (24, 24)]


def test_nothing_is_no_picture():
    with pytest.raises(ValueError, match="keep must be above 0"):
        vlmfast.SmallerImage(0)


def short_talk(talk: Talk, picture: int) -> tuple[dict, dict]:
    """Make a prompt, and the one that the model would get if the picture came smaller."""
    full = talk.batch((7, picture, 8, 9))
    reducer = REDUCERS[talk.model_type]
    vision = {name: value for name, value in full.items() if name in talk.pictures[0]}
    smaller = reducer.shrink(talk.model.base_model, vision, METHOD)
    count = talk.counts[picture] - smaller.fewer[0]
    ids = full["input_ids"][0]
    first = int((ids == IMAGE).nonzero()[0])
    left = torch.cat([torch.arange(first + count), torch.arange(first + talk.counts[picture], len(ids))])
    columns = [name for name in full if full[name].shape == full["input_ids"].shape]
    own = {name: value for name, value in smaller.inputs.items() if name != "interpolate_pos_encoding"}
    return full, {**{name: full[name][:, left] for name in columns}, **own}


@pytest.mark.parametrize("model_type", QWEN)
def test_qwen_answers_as_if_the_picture_came_smaller(model_type: str):
    """Positions, DeepStack, the tower and the next tokens are those of a prompt with the smaller picture."""
    talk = Talk.of(model_type)
    full, short = short_talk(talk, 1)
    steps = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        expected = talk.model(**clone(short)).logits
        next_ones = talk.model.generate(**clone(short), **steps)
        with vlmfast.patch(talk.model, exclude="*", reduce=METHOD) as patched:
            found = talk.model(**clone(full)).logits
            after = talk.model.generate(**clone(full), **steps)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after.logits, next_ones.logits)
    (image,) = patched.images
    assert image.total == talk.counts[1]
    assert image.features.shape[0] == int((short["input_ids"] == IMAGE).sum()) < image.total


@pytest.mark.parametrize("model_type", [kind for kind in WITH if kind not in QWEN])
def test_towers_of_a_fixed_size_interpolate_their_positions(model_type: str):
    talk = Talk.of(model_type)
    full, short = short_talk(talk, 0)
    takes = "interpolate_pos_encoding" in inspect.signature(talk.model.base_model.vision_tower.forward).parameters
    hook = talk.model.base_model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | ({"interpolate_pos_encoding": True} if takes else {})),
        with_kwargs=True,
    )
    with torch.no_grad():
        expected = talk.model(**clone(short)).logits
        hook.remove()
        with vlmfast.patch(talk.model, exclude="*", reduce=METHOD):
            found = talk.model(**clone(full)).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type", WITHOUT)
def test_crops_are_refused(model_type: str):
    talk = Talk.of(model_type)
    with pytest.raises(ValueError, match=r"cannot make the pictures of \w+ smaller, which are seen as crops"):
        vlmfast.patch(talk.model, reduce=METHOD)
    with pytest.raises(ValueError, match="give its processor a smaller picture"):
        vlmfast.compress_inputs(talk.model, talk.batch((7, 0)), METHOD)


def test_positions_of_the_picture_as_it_was_are_refused():
    talk = Talk.of("qwen2_vl")
    full = talk.batch((7, 0, 8))
    given = torch.arange(full["input_ids"].shape[1]).expand(3, 1, -1)
    with pytest.raises(ValueError, match="position_ids cannot be given beside SmallerImage"):
        vlmfast.compress_inputs(talk.model, {**full, "position_ids": given}, METHOD)


def test_patches_are_those_of_the_processor():
    """What the processor of Qwen-VL makes of a picture is taken apart and put together, and is that of its pixels."""
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    from PIL import Image

    ramp = torch.arange(56 * 84 * 3, dtype=torch.uint8).view(56, 84, 3)
    given = make(min_pixels=28 * 28)(images=[Image.fromarray(ramp.numpy())], return_tensors="pt")
    rows = given["pixel_values"]
    picture = _picture(rows, (2, 3), 2, 14)
    assert picture.shape == (2, 3, 56, 84)
    assert torch.equal(picture[0], picture[1])
    red = picture[0, 0]
    assert red[:, 1:].sub(red[:, :-1]).abs().max() > 0
    span = (red.max() - red.min()) / (ramp[..., 0].max() - ramp[..., 0].min())
    torch.testing.assert_close((red - red.min()) / span, ramp[..., 0].float() - ramp[..., 0].min(), atol=1e-2, rtol=0)
    assert torch.equal(_patches(picture, (2, 3), 2, 14), rows)
    base = nn.Module()
    base.visual = nn.Module()
    base.visual.spatial_merge_size = 2
    assert smaller_grids(base, given["image_grid_thw"], vlmfast.SmallerImage(2)).tolist() == [[1, 2, 4]]


def test_several_pictures_of_several_sizes_and_a_second_turn():
    talk = Talk.of("qwen2_5_vl")
    full = talk.batch((7, 0, 8, 1), (2, 9))
    with torch.no_grad(), vlmfast.patch(talk.model, exclude="*", reduce=METHOD) as patched:
        first = talk.model.generate(
            **clone(full), max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        assert [image.total for image in patched.images] == [talk.counts[number] for number in (0, 1, 2)]
        ids = torch.cat([first.sequences, torch.full((2, 2), 9)], 1)
        mask = torch.cat([full["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
        second = {**full, **talk.with_types({"input_ids": ids, "attention_mask": mask})}
        steps = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        whole = talk.model.generate(**clone(second), **steps)
        cached = talk.model.generate(**clone(second), past_key_values=first.past_key_values, **steps)
    torch.testing.assert_close(cached.logits, whole.logits)
