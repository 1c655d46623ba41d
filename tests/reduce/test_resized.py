"""Images whose features LLaVA-OneVision downsamples, against float64 loops over the interpolated grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.patches_models import DTYPES, tiny
from tests.helpers.reduce_oracle import kept_part, zipped
from tests.helpers.tiny_models import IMAGE
from tests.reduce.test_crops import GRIDS, PINPOINTS, SIDE, crop_model, images, reduced, tower_of
from vlmfast.reduce import EvenTokens, Method, RandomTokens, ReducedImage, VisionZip
from vlmfast.reduce.families.llava_next import reduce_onevision

RATIO = "anyres_max_2"
SIZES = [(56, 56), (28, 56), (50, 36), (47, 188), (19, 21), (36, 50)]
SMALLER = {(56, 56), (50, 36), (47, 188), (36, 50)}  # are downsampled, the last three after padding is cut off


def large(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {**images(sizes, dtype), "vision_aspect_ratio": RATIO}


def unpruned(base: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return list(base.get_image_features(**inputs).pooler_output)


def shrunk(size: tuple[int, int]) -> tuple[int, int, float] | None:
    """Return height, width and factor of the grid if it is downsampled, else None."""
    rows, columns = kept_part(GRIDS[size], SIDE, size)
    ratio = math.sqrt(len(rows) * len(columns) / (int(RATIO[-1]) * SIDE**2))
    return (int(len(rows) // ratio), int(len(columns) // ratio), ratio) if ratio > 1.1 else None


def interpolated(crops: Tensor, size: tuple[int, int]) -> list[Tensor | None]:
    """Pack (T, SIDE**2, C) crops: the overview, then means of up to 2 x 2 patches, with None for newlines."""
    (rows, columns), (height, width, _) = kept_part(GRIDS[size], SIDE, size), shrunk(size)

    def corners(count: int, place: int, whole: range) -> list[tuple[int, float]]:
        middle = max(0.0, (place + 0.5) * len(whole) / count - 0.5)
        low = int(middle)
        return [(whole[low], 1 - (middle - low)), (whole[min(low + 1, len(whole) - 1)], middle - low)]

    def patch(y: int, x: int) -> Tensor:
        return crops[1 + y // SIDE * GRIDS[size][1] + x // SIDE, y % SIDE * SIDE + x % SIDE]

    tokens: list[Tensor | None] = list(crops[0])
    for i in range(height):
        for j in range(width):
            down, right = corners(height, i, rows), corners(width, j, columns)
            tokens.append(sum(a * b * patch(y, x) for y, a in down for x, b in right))
        tokens.append(None)
    return tokens


@torch.no_grad()
def compare(base: nn.Module, inputs: dict[str, Any], index: int, image: ReducedImage, method: VisionZip) -> None:
    size = tuple(inputs["image_sizes"][index].tolist())
    count = 1 + GRIDS[size][0] * GRIDS[size][1]
    pixels = inputs["pixel_values"][index, :count]
    tower = tower_of(base, pixels, has_cls=False)
    features = base.multi_modal_projector(tower.hidden.to(pixels.dtype)).double()
    packed = interpolated(features, size)
    places = [place for place, token in enumerate(packed) if token is not None]
    hidden, scores, metric = (
        torch.stack([token for token in interpolated(part, size) if token is not None])
        for part in (features, tower.scores[..., None], tower.metric)
    )

    def budget(value: float) -> int:
        return value * count if isinstance(value, int) else int(value * len(places))

    keep = min(budget(method.dominant), len(places))
    contextual = min(budget(method.contextual), len(places) - keep)
    want = zipped(hidden, scores[:, 0], metric, keep, contextual, method.merge)
    named = {places[patch]: hidden[patch] for patch in want.kept}
    named |= {places[target]: row for target, row in zip(want.targets, want.merged, strict=True)}
    named |= {place: base.image_newline.double() for place, token in enumerate(packed) if token is None}
    assert image.columns.tolist() == sorted(named)
    assert image.columns.dtype == torch.int64
    assert image.total == len(packed)
    assert image.features.dtype == pixels.dtype
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if pixels.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    expected = torch.stack([named[place] for place in sorted(named)])
    torch.testing.assert_close(image.features.double(), expected, **tolerance)
    assert [part.tolist() for part in image.kept] == [[p for p in want.kept if p < SIDE**2]]
    assert [part.tolist() for part in image.merged] == [[p for p in want.targets if p < SIDE**2]]
    assert image.grid == (SIDE, SIDE)


METHODS = [VisionZip(4, 2), VisionZip(3, 3, merge="mean"), VisionZip(0.4, 0.15), VisionZip(5, 0), VisionZip(8, 4)]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_made_smaller_equal_the_loops(dtype: torch.dtype, method: VisionZip):
    base, inputs = crop_model("llava_onevision", dtype), large(SIZES, dtype)
    got = reduced(base, inputs, method)
    assert {size for size in SIZES if shrunk(size)} == SMALLER
    for index, size in enumerate(SIZES):
        if size in SMALLER:
            compare(base, inputs, index, got[index], method)


def test_the_others_of_a_batch_are_reduced_crop_by_crop():
    base, inputs = crop_model("llava_onevision"), large(SIZES)
    for size, image, plain in zip(
        SIZES, reduced(base, inputs, METHODS[0]), reduced(base, images(SIZES), METHODS[0]), strict=True
    ):
        same = torch.equal(image.columns, plain.columns) and torch.equal(image.features, plain.features)
        assert same == (size not in SMALLER)
        assert len(image.kept) == (1 if size in SMALLER else 1 + GRIDS[size][0] * GRIDS[size][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SIZES, [(56, 56)], [(47, 188), (56, 56)]], ids=["mixed", "one", "all smaller"])
def test_all_tokens_kept_are_the_unpruned_image(sizes: list[tuple[int, int]], dtype: torch.dtype):
    base, inputs = crop_model("llava_onevision", dtype), large(sizes, dtype)
    for method in (EvenTokens(1.0), EvenTokens(SIDE**2), RandomTokens(1.0), VisionZip(1.0, 0), VisionZip(SIDE**2, 0)):
        for image, want in zip(reduced(base, inputs, method), unpruned(base, inputs), strict=True):
            assert torch.equal(image.features, want), method
            assert image.columns.tolist() == list(range(image.total))


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (EvenTokens(0.5), lambda tokens: tokens // 2),
        (EvenTokens(2), lambda tokens: 2 * 5),
        (RandomTokens(4), lambda tokens: 4 * 5),
        (RandomTokens(0.0), lambda tokens: 0),
        (VisionZip(3, 0), lambda tokens: 3 * 5),
    ],
    ids=lambda value: "tokens" if callable(value) else str(value),
)
def test_what_is_kept_is_cut_from_the_unpruned_image(method: Method, wanted: Callable[[int], int]):
    base, inputs = crop_model("llava_onevision"), large([(56, 56), (50, 36), (36, 50)])  # an overview and four crops
    for image, want in zip(reduced(base, inputs, method), unpruned(base, inputs), strict=True):
        assert torch.equal(image.features, want[image.columns])
        newlines = (want == base.image_newline).all(1).nonzero().flatten().tolist()
        assert set(newlines) <= set(image.columns.tolist())
        assert len(image.columns) - len(newlines) == wanted(len(want) - len(newlines))


def test_an_image_alone_is_reduced_as_in_a_batch():
    base, method = crop_model("llava_onevision"), VisionZip(0.3, 0.1)
    together = reduced(base, large(SIZES), method)
    for index, size in enumerate(SIZES):
        crops = images(SIZES)["pixel_values"][index, : 1 + GRIDS[size][0] * GRIDS[size][1]]
        inputs = {"pixel_values": crops, "image_sizes": torch.tensor([size]), "vision_aspect_ratio": RATIO}
        (alone,) = reduced(base, inputs, method)
        assert torch.equal(alone.columns, together[index].columns)
        torch.testing.assert_close(alone.features, together[index].features, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_tower_and_the_newline():
    base, inputs = crop_model("llava_onevision"), large([(56, 56)])
    (image,) = reduce_onevision(base, inputs, VisionZip(4, 2))
    image.features.sum().backward()
    weights = [
        base.image_newline,
        base.multi_modal_projector.linear_1.weight,
        base.vision_tower.embeddings.patch_embedding.weight,
    ]
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)


@torch.no_grad()
def test_generate():
    """A batch, padded on the left, of a prompt with a large image and one whose image is not downsampled."""
    model, _ = tiny("llava_onevision")
    model.config.image_grid_pinpoints = model.model.config.image_grid_pinpoints = PINPOINTS
    model.config.vision_aspect_ratio = model.model.config.vision_aspect_ratio = RATIO
    sizes, method = [(56, 56), (28, 56)], VisionZip(2, 1)
    vision = images(sizes)
    totals = [len(features) for features in unpruned(model.model, vision)]
    rows = [[7, *[IMAGE] * total, 8, 9] for total in totals]
    padding = [max(map(len, rows)) - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(padding, rows, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask, **vision}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    whole = model.generate(**inputs, **options)
    with vlmfast.patch(model, reduce=EvenTokens(1.0)):
        assert torch.equal(model.generate(**inputs, **options), whole)
    with vlmfast.patch(model, reduce=method) as patch:
        got = model.generate(**inputs, **options)
        assert [image.total for image in patch.images] == totals
        assert len(patch.images[0].features) == 5 * 3 + (totals[0] - (SIDE**2 + 25)), "crops, and newlines"
    assert torch.equal(got[:, : ids.shape[1]], ids)
    for row, image, tokens in zip(ids, reduced(model.model, vision, method), got[:, ids.shape[1] :], strict=True):
        # The same step by step, from the embeddings of the short prompt.
        embed = model.get_input_embeddings()
        text = row[row != 0]
        before, after = embed(text[:1]), embed(text[1 + image.total :])
        states = torch.cat([before, image.features, after])[None]
        for token in tokens:
            best = model.lm_head(model.model.language_model(inputs_embeds=states).last_hidden_state[0, -1]).argmax()
            assert best == token
            states = torch.cat([states, embed(best)[None, None]], 1)
