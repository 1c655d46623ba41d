"""Reduced Qwen-VL prompts with videos give the same results as full prompts with the dropped tokens masked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers import tiny_models as parts
from tests.helpers.qwen_models import NAMES, model_of
from tests.helpers.reduce_models import WORD, clone
from tests.helpers.video_models import IMAGE, LONG, ROWS, STILL, TALL, axes_of, inputs_of, left_of
from vlmfast import EVS, VCAST, EvenTokens, FlashVID, RandomTokens, VisionZip
from vlmfast.reduce import Method, VideoMethod, VisualTokens
from vlmfast.reduce.families import REDUCERS, qwen
from vlmfast.reduce.prompt import takes_features

ATTENTION = NAMES[:4]  # the others have linear attention, in which masking a token does not equal removing it
METHODS = [EVS(0.4), VCAST(0.3), VisionZip(dominant=0.4, contextual=0), EvenTokens(3), RandomTokens(0.5)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NO_WORDS = list(range(WORD))
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_dropped_tokens_are_masked_ones(name: str, method: Method):
    model = model_of(name)
    inputs = inputs_of(model, *ROWS)
    with vlmfast.patch(model, reduce=method) as patch:
        short = model(**inputs).logits
    assert [(video.kind, video.total) for video in patch.videos] == [("video", n) for n in (96, 45, 96)]
    left = left_of(inputs["input_ids"], patch.images, patch.videos)
    if isinstance(method, VideoMethod):
        assert left[inputs["input_ids"] == parts.IMAGE].all()
        assert f"21 -> 21, 21 -> 21, 96 -> {len(patch.videos[0].features)}" in patch.report()
    mask = inputs["attention_mask"] * left
    assert (left & (inputs["input_ids"] == parts.VIDEO)).sum() < 0.6 * 237
    want = model(**{**inputs, "attention_mask": mask}, position_ids=axes_of(model, inputs)).logits
    for row, (got, wanted) in enumerate(zip(short, want, strict=True)):
        seen = mask[row].bool()
        torch.testing.assert_close(got[-int(seen.sum()) :], wanted[seen], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("method", [EVS(0.4), VCAST(0.3), VisionZip(dominant=0.4, contextual=0)], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_decoding_goes_on_from_the_full_prompt(name: str, method: Method):
    """Each step equals a masked forward, without a cache, of the full prompt and the generated tokens."""
    model = model_of(name)
    inputs = inputs_of(model, *ROWS)
    length = inputs["input_ids"].shape[1]
    with vlmfast.patch(model, reduce=method) as patch:
        output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **GREEDY)
    ids, axes = output.sequences, axes_of(model, inputs)
    assert torch.equal(ids[:, :length], inputs["input_ids"])
    mask = inputs["attention_mask"] * left_of(inputs["input_ids"], patch.images, patch.videos)
    for step, logits in enumerate(output.logits):
        more = axes[:, :, -1:] + 1 + torch.arange(step)  # transformers continues from the last text token
        full = {
            **inputs,
            "input_ids": ids[:, : length + step],
            "attention_mask": torch.nn.functional.pad(mask, (0, step), value=1),
            "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, step)),
        }
        want = model(**full, position_ids=torch.cat([axes, more], 2)).logits[:, -1]
        torch.testing.assert_close(logits, want, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [EVS(1.0), VCAST(1.0), VCAST(999), FlashVID(1.0), VisionZip(dominant=1.0, contextual=0), EvenTokens(1.0)],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_no_bit(name: str, method: Method):
    model = model_of(name)
    inputs = inputs_of(model, *ROWS)
    want, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, **GREEDY)
    with vlmfast.patch(model, exclude="*", reduce=method):
        got, short = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, **GREEDY)
    assert torch.equal(got, want)
    assert torch.equal(short.sequences, tokens.sequences)
    assert all(map(torch.equal, short.logits, tokens.logits))


@torch.no_grad()
@pytest.mark.parametrize("method", [VisionZip(0.3, 0.15), VisionZip(4, 2), EvenTokens(0.3), EvenTokens(5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_method_for_images_sees_a_frame_as_an_image(name: str, method: Method):
    """It gets the features of each frame alone, because the towers do not attend from one frame to another."""
    model = model_of(name)
    inputs = inputs_of(model, (LONG, TALL, STILL, LONG))
    videos = qwen.reduce_videos(model.model, inputs, method)
    grids = inputs["video_grid_thw"].tolist()
    frames = torch.tensor([(1, h, w) for t, h, w in grids for _ in range(t)])
    alone = qwen.reduce(model.model, {"pixel_values": inputs["pixel_values_videos"], "image_grid_thw": frames}, method)
    for video, grid in zip(videos, grids, strict=True):
        own, alone = alone[: grid[0]], alone[grid[0] :]
        count = own[0].total
        assert (video.total, video.grid) == (grid[0] * count, own[0].grid)
        wanted = [number * count + column for number, frame in enumerate(own) for column in frame.columns.tolist()]
        assert video.columns.tolist() == wanted
        for part in ("kept", "merged"):
            got = [positions.tolist() for positions in getattr(video, part)]
            assert got == [getattr(frame, part)[0].tolist() for frame in own]
        for level, got in enumerate((video.features, *video.levels)):
            want = torch.cat([(frame.features, *frame.levels)[level] for frame in own])
            torch.testing.assert_close(got, want, **CLOSE)
    assert not alone


@torch.no_grad()
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("method", [EVS(0.4), VCAST(0.3), FlashVID(0.3)], ids=str)
def test_a_video_is_reduced_as_alone(name: str, method: Method):
    """Its result is the same beside other videos, of its size and of other sizes."""
    model = model_of(name)
    inputs = inputs_of(model, (LONG, TALL, STILL, LONG))
    patches = inputs["pixel_values_videos"].split(inputs["video_grid_thw"].prod(1).tolist())
    for video, rows, grid in zip(
        qwen.reduce_videos(model.model, inputs, method), patches, inputs["video_grid_thw"], strict=True
    ):
        one = {"pixel_values_videos": rows, "video_grid_thw": grid[None]}
        (alone,) = qwen.reduce_videos(model.model, one, method)
        assert torch.equal(video.columns, alone.columns)
        torch.testing.assert_close(video.features, alone.features, **CLOSE)
        if grid[0] == 1 and not isinstance(method, FlashVID):
            assert len(video.features) == video.total


@torch.no_grad()
@pytest.mark.parametrize("method", [EVS(0.4), FlashVID(0.4), VisionZip(dominant=0.4, contextual=0.1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_turns_go_on_from_the_cache(name: str, method: Method):
    """A turn, then one about another video and image, equal the whole conversation in one call."""
    model = model_of(name)
    first, second = (10, LONG, 11), (12, IMAGE, TALL, 13)
    with vlmfast.patch(model, reduce=method):
        inputs = inputs_of(model, first)
        output = model.generate(**clone(inputs), max_new_tokens=3, min_new_tokens=3, suppress_tokens=NO_WORDS, **GREEDY)
        words = output.sequences[0, -3:].tolist()
        whole = inputs_of(model, (*first, *words, *second))
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "suppress_tokens": NO_WORDS, **GREEDY}
        want = model.generate(**clone(whole), **options)
        got = model.generate(**clone(whole), past_key_values=output.past_key_values, **options)
        assert torch.equal(got.sequences, want.sequences)
        for one, other in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ATTENTION)
def test_beams_and_shortened_inputs_are_the_same(name: str):
    model, method = model_of(name), VCAST(0.3)
    inputs = inputs_of(model, *ROWS)
    options = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    with vlmfast.patch(model, reduce=method):
        want = model.generate(**clone(inputs), **options)
        logits = model(**inputs).logits
    assert want.shape == (8, inputs["input_ids"].shape[1] + 4)
    if "qwen3" in name and not takes_features(type(model.model)):
        with pytest.raises(ValueError, match="DeepStack needs"):
            vlmfast.compress_inputs(model, clone(inputs), method)
        return
    short = vlmfast.compress_inputs(model, clone(inputs), method)
    assert not {"pixel_values", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"} & short.keys()
    torch.testing.assert_close(model(**short).logits, logits, **CLOSE)
    got = model.generate(**vlmfast.compress_inputs(model, clone(inputs), method), **options)
    assert torch.equal(got[:, -4:], want[:, -4:])


@pytest.mark.parametrize("name", ATTENTION)
def test_labels_stay_where_they_were(name: str):
    """With labels, logits have the columns of the full prompt; gradients reach the tower."""
    model = model_of(name)
    inputs = inputs_of(model, *ROWS[:2])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < WORD, -100)
    with vlmfast.patch(model, reduce=EVS(0.4)) as patch:
        output = model(**inputs, labels=labels)
    assert output.logits.shape[:2] == labels.shape
    output.loss.backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
    assert not patch.videos[0].features.requires_grad


class Late(VideoMethod):
    """Keeps the last tokens of a video."""

    def score(self, tokens: VisualTokens) -> Tensor:
        self.grids.append(tokens.grid)
        return torch.arange(tokens.count).float().expand(tokens.batch, -1)


@torch.no_grad()
def test_a_method_of_ones_own_sees_whole_videos_and_leaves_images():
    model = model_of("qwen2_5_vl")
    method = Late(0.25)
    vars(method)["grids"] = []
    with vlmfast.patch(model, reduce=method) as patch:
        model(**inputs_of(model, *ROWS))
    assert method.grids == [(4, 4, 6), (3, 5, 3)]  # one call for all videos of a size
    assert [image.columns.tolist() for image in patch.images] == [list(range(21))] * 2
    assert [video.columns.tolist() for video in patch.videos] == [
        list(range(72, 96)),
        list(range(34, 45)),
        list(range(72, 96)),
    ]
    long = patch.videos[0].kept
    assert [positions.tolist() for positions in long] == [[], [], [], list(range(24))]
    assert len(long) == 4
    assert long[-1].tolist() == long[3].tolist()
    assert [positions.tolist() for positions in long[1:3]] == [[], []]


def test_a_video_after_a_cache_must_be_given():
    model = model_of("qwen3_vl")
    cache = model(**inputs_of(model, (10, 11))).past_key_values
    inputs = inputs_of(model, (10, 11, LONG))
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with vlmfast.patch(model, reduce=EVS(0.4)), pytest.raises(ValueError, match="must be given with images after"):
        model.generate(**texts, past_key_values=cache)


def test_what_a_method_is_not_for_is_refused():
    model = model_of("qwen2_5_vl")
    with vlmfast.patch(model, reduce=VCAST(0.3)) as patch:
        message = r"VCAST\(keep=0.3, remainder='largest'\) reduces videos, and the prompt has images alone"
        with pytest.raises(ValueError, match=message):
            model(**inputs_of(model, (10, IMAGE)))
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs_of(model, (10, IMAGE)), max_new_tokens=2)
        model(**inputs_of(model, (10, 11)))
        assert "no prompt with videos yet" in patch.report()
    with pytest.raises(ValueError, match=message):
        vlmfast.compress_inputs(model, inputs_of(model, (10, IMAGE)), VCAST(0.3))
    inputs = inputs_of(model, (10, LONG))
    inputs["input_ids"][inputs["input_ids"] == parts.VIDEO] = 9
    with pytest.raises(ValueError, match="Video features and video tokens do not match: there are videos and no plac"):
        vlmfast.compress_inputs(model, inputs, VCAST(0.3))


@pytest.mark.parametrize("model_type", [name for name, reducer in REDUCERS.items() if reducer.reduce_videos is None])
def test_videos_of_other_models_cannot_be_reduced(model_type: str):
    from tests.helpers.reduce_models import Talk

    talk = Talk.of(model_type)
    with pytest.raises(ValueError, match=r"EVS\(keep=0.5\) reduces videos, and those of .* cannot be reduced"):
        vlmfast.patch(talk.model, reduce=EVS(0.5))
    with pytest.raises(ValueError, match=r"EVS\(keep=0.5\) reduces videos, and those of .* cannot be reduced"):
        vlmfast.compress_inputs(talk.model, talk.batch((10, 0)), EVS(0.5))
