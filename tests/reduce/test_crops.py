"""The crops of LLaVA-NeXT and LLaVA-OneVision, against plain loops in float64 and against the model's own packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.patches_models import DTYPES, tiny
from tests.helpers.reduce_oracle import Reduced, Token, Tower, encoded, kept_part, model_order, published_order, zipped
from vlmfast.reduce import EvenTokens, Method, RandomTokens, ReducedImage, VisionZip
from vlmfast.reduce.families import REDUCERS
from vlmfast.reduce.families.llava_next import pack_numbers, packer
from vlmfast.reduce.towers import encode

SIDE = 4  # patches along a crop
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56], [28, 84]]
# (height, width) of an image -> its grid of crops. The second of each pair leaves padding; for (47, 188) int()
# truncates a 3 to a 2; of the last two images only the overview is used.
GRIDS = {
    (28, 28): (1, 1),
    (19, 21): (1, 1),
    (28, 56): (1, 2),
    (20, 56): (1, 2),
    (56, 28): (2, 1),
    (60, 18): (2, 1),
    (56, 56): (2, 2),
    (50, 36): (2, 2),
    (36, 50): (2, 2),
    (47, 188): (1, 3),
    (2, 56): (1, 2),
    (2, 28): (1, 1),
}
CROPS = ("llava_next", "llava_next_video", "llava_onevision")
HAS_CLS = {"llava_next": True, "llava_next_video": True, "llava_onevision": False}


def shown(size: tuple[int, int]) -> list[int]:
    """Return how many patches of each crop the model uses, for an image of that (height, width)."""
    crops = [token[0] for token in model_order(GRIDS[size], SIDE, size) if token != "newline"]
    return [crops.count(crop) for crop in range(1 + GRIDS[size][0] * GRIDS[size][1])]


def crop_model(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model, _ = tiny(model_type, dtype)
    base = model.model
    base.config.image_grid_pinpoints = PINPOINTS
    return base


def images(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Make inputs as the processor does; the values in the padding must not matter."""
    counts = [1 + GRIDS[size][0] * GRIDS[size][1] for size in sizes]
    pixels = torch.full((len(sizes), max(counts), 3, 28, 28), torch.nan)
    for index, count in enumerate(counts):
        pixels[index, :count] = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(index))
    return {"pixel_values": pixels.to(dtype), "image_sizes": torch.tensor(sizes)}


def reduced(base: nn.Module, inputs: dict[str, Any], method: Method) -> list[ReducedImage]:
    with torch.no_grad():
        return REDUCERS[base.config.model_type].reduce(base, inputs, method)


def tower_of(base: nn.Module, pixels: Tensor, has_cls: bool) -> Tower:
    """Encode in float64 if the model is float32; in half precision use the numbers that the method was given."""
    if pixels.dtype == torch.float32:
        return encoded(base, pixels, base.config.vision_feature_layer, has_cls)
    with torch.no_grad():
        got = encode(base.vision_tower, pixels, base.config.vision_feature_layer)
    cls = got.hidden[:, 0].double() if has_cls else None
    return Tower(got.patches.double(), got.scores().double(), got.metric().double(), cls)


@torch.no_grad()
def expected(
    base: nn.Module, inputs: dict[str, Any], index: int, method: VisionZip
) -> tuple[Tensor, list[int] | None, list[Reduced], int]:
    """Return features of one image, the placeholders that remain (None: the first), its crops, all placeholders."""
    model_type = base.config.model_type
    size = tuple(inputs["image_sizes"][index].tolist())
    grid, published = GRIDS[size], method.packing == "published" and HAS_CLS[model_type]
    pixels = inputs["pixel_values"][index, : 1 + grid[0] * grid[1]]
    tower = tower_of(base, pixels, HAS_CLS[model_type])
    crops = [
        zipped(*parts, method.dominant - published, method.contextual, method.merge)
        for parts in zip(tower.hidden, tower.scores, tower.metric, strict=True)
    ]
    named: dict[Token, Tensor] = {}
    for number, crop in enumerate(crops):
        named |= {(number, patch): tower.hidden[number, patch] for patch in crop.kept}
        for c, (target, row) in enumerate(zip(crop.targets, crop.merged, strict=True)):
            named[f"{number} merged {c}" if published else (number, target)] = row
        if published:
            named[f"{number} cls"] = tower.cls[number]
    whole = model_order(grid, SIDE, size)
    order = published_order(grid, SIDE, crops) if published else [t for t in whole if t == "newline" or t in named]
    project = base.multi_modal_projector
    rows = [base.image_newline if t == "newline" else project(named[t].to(pixels.dtype)) for t in order]
    columns = None if published else [place for place, t in enumerate(whole) if t == "newline" or t in named]
    return torch.stack(rows), columns, crops, len(whole)


def compare(base: nn.Module, inputs: dict[str, Any], method: VisionZip) -> None:
    got = reduced(base, inputs, method)
    dtype = inputs["pixel_values"].dtype
    model_order_kept = method.packing == "model" or not HAS_CLS[base.config.model_type]
    for index, image in enumerate(got):
        features, columns, crops, total = expected(base, inputs, index, method)
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(image.features, features, **tolerance)
        assert image.features.dtype == dtype
        assert image.total == total
        assert image.columns.dtype == torch.int64
        assert image.columns.tolist() == (list(range(len(features))) if columns is None else columns)
        size = tuple(inputs["image_sizes"][index].tolist())
        for number, crop in enumerate(crops):
            seen = [
                p for p in range(SIDE**2) if not model_order_kept or (number, p) in model_order(GRIDS[size], SIDE, size)
            ]
            assert image.kept[number].tolist() == [p for p in crop.kept if p in seen]
            assert image.merged[number].tolist() == [p for p in crop.targets if p in seen]
        assert image.grid == (SIDE, SIDE)
        assert len(image.kept) == len(image.merged) == len(crops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", ["published", "model"])
@pytest.mark.parametrize("model_type", CROPS)
def test_images_of_several_grids_equal_the_loops(model_type: str, packing: str, dtype: torch.dtype):
    base, inputs = crop_model(model_type, dtype), images([size for size in GRIDS if all(shown(size))], dtype)
    compare(base, inputs, VisionZip(dominant=4, contextual=2, packing=packing))
    compare(base, inputs, VisionZip(dominant=3, contextual=3, merge="mean", packing=packing))
    compare(base, inputs, VisionZip(dominant=5, contextual=0, packing=packing))


@pytest.mark.parametrize("model_type", CROPS)
@pytest.mark.parametrize(
    "method", [VisionZip(3, 1, packing="whole"), VisionZip(0.4, 0.1, merge="mean", packing="whole")], ids=str
)
def test_images_reduced_as_a_whole_equal_the_loops(model_type: str, method: VisionZip):
    """Of the tokens that the model shows; their number is told by the size, and a number counts for each crop."""
    base, inputs = crop_model(model_type), images(list(GRIDS))
    for index, (size, image) in enumerate(zip(GRIDS, reduced(base, inputs, method), strict=True)):
        crops = 1 + GRIDS[size][0] * GRIDS[size][1]
        tower = tower_of(base, inputs["pixel_values"][index, :crops], HAS_CLS[model_type])
        order = model_order(GRIDS[size], SIDE, size)
        places = [place for place, token in enumerate(order) if token != "newline"]
        rows, scores, metric = (
            torch.stack([part[order[place]] for place in places]) for part in (tower.hidden, tower.scores, tower.metric)
        )
        rows = base.multi_modal_projector(rows.float()).double()
        keep, merged = (
            value * crops if isinstance(value, int) else int(value * len(places))
            for value in (method.dominant, method.contextual)
        )
        keep = min(keep, len(places))
        want = zipped(rows, scores, metric, keep, min(merged, len(places) - keep), method.merge)
        named = {places[number]: rows[number] for number in want.kept}
        named |= {places[target]: row for target, row in zip(want.targets, want.merged, strict=True)}
        named |= {place: base.image_newline.double() for place, token in enumerate(order) if token == "newline"}
        assert image.columns.tolist() == sorted(named)
        expected_rows = torch.stack([named[place] for place in sorted(named)]).float()
        torch.testing.assert_close(image.features, expected_rows, rtol=1e-3, atol=1e-4)


def test_the_padding_of_the_images_is_tested():
    """Kept patches and targets do lie in the padding; otherwise the comparison with the loops would not cover it."""
    base, inputs = crop_model("llava_next"), images(list(GRIDS))
    lost = {"kept": 0, "merged": 0}
    for image in reduced(base, inputs, VisionZip(dominant=4, contextual=3, packing="model")):
        lost["kept"] += sum(4 - len(kept) for kept in image.kept)
        lost["merged"] += sum(3 - len(merged) for merged in image.merged)
    assert min(lost.values()) > 3, lost


@pytest.mark.parametrize("size", GRIDS, ids=str)
@pytest.mark.parametrize("model_type", CROPS)
def test_numbers_of_the_patches_equal_the_loops(model_type: str, size: tuple[int, int]):
    base, grid = crop_model(model_type), GRIDS[size]
    strategy = {"vision_feature_select_strategy": "default"} if HAS_CLS[model_type] else {}
    pack = packer(base.pack_image_features, list(size), **strategy)
    packed = pack_numbers(pack, 1 + grid[0] * grid[1], SIDE**2)
    want = [-1 if t == "newline" else t[0] * SIDE**2 + t[1] for t in model_order(grid, SIDE, size)]
    assert packed.tolist() == want
    rows, columns = kept_part(grid, SIDE, size)
    assert len(want) == SIDE**2 + len(rows) * (len(columns) + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", CROPS)
def test_all_tokens_kept_are_the_unpruned_image(model_type: str, dtype: torch.dtype):
    base, inputs = crop_model(model_type, dtype), images(list(GRIDS), dtype)
    with torch.no_grad():
        want = base.get_image_features(**inputs).pooler_output
    keep_all = [VisionZip(1.0, 0, packing=packing) for packing in ("model", "whole")]
    for method in (EvenTokens(1.0), RandomTokens(SIDE**2), *keep_all):
        for image, features in zip(reduced(base, inputs, method), want, strict=True):
            assert torch.equal(image.features, features), method
            assert image.columns.tolist() == list(range(image.total))


@pytest.mark.parametrize("method", [EvenTokens(0.5), RandomTokens(5), RandomTokens(0.0)], ids=str)
@pytest.mark.parametrize("model_type", CROPS)
def test_other_methods_cut_the_unpruned_image(model_type: str, method: Method):
    base, inputs = crop_model(model_type), images(list(GRIDS))
    with torch.no_grad():
        want = base.get_image_features(**inputs).pooler_output
    for image, features in zip(reduced(base, inputs, method), want, strict=True):
        torch.testing.assert_close(image.features, features[image.columns], rtol=1e-4, atol=1e-5)
        assert image.features.shape[0] < features.shape[0]
        assert all(len(kept) <= method.budget(SIDE**2, False)[0] for kept in image.kept)
        newline = (features == base.image_newline).all(1).nonzero().flatten().tolist()
        assert set(newline) <= set(image.columns.tolist())


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision"])
def test_an_image_alone_and_stacked_crops_give_the_same(model_type: str):
    base, inputs = crop_model(model_type), images(list(GRIDS))
    method = VisionZip(dominant=0.25, contextual=0.125)
    together = reduced(base, inputs, method)
    for index, (size, image) in enumerate(zip(GRIDS, together, strict=True)):
        crops = inputs["pixel_values"][index, : 1 + GRIDS[size][0] * GRIDS[size][1]]
        (alone,) = reduced(base, {"pixel_values": crops, "image_sizes": torch.tensor([size])}, method)
        assert torch.equal(alone.columns, image.columns)
        torch.testing.assert_close(alone.features, image.features, rtol=1e-4, atol=1e-4)
    counts = VisionZip(dominant=4, contextual=2)
    for size, image, same in zip(GRIDS, together, reduced(base, inputs, counts), strict=True):
        # As published, a share counts the patches of a crop that the model uses.
        padded = sum(shown(size)) < SIDE**2 * len(shown(size))
        assert (padded and HAS_CLS[model_type]) or torch.equal(image.features, same.features)


@pytest.mark.parametrize("model_type", ["llava_next", "llava_next_video"])
@pytest.mark.parametrize(
    "method", [VisionZip(0.5, 0.25), VisionZip(1.0, 0), VisionZip(0.3, 0.7), VisionZip(5, 3), VisionZip(16, 1)], ids=str
)
def test_published_budgets_are_of_what_the_model_shows(model_type: str, method: VisionZip):
    """A budget counts the patches that the model uses of each crop, even where it cuts off most or all of one."""
    base, sizes = crop_model(model_type), list(GRIDS)
    for size, image in zip(sizes, reduced(base, images(sizes), method), strict=True):
        total = 0
        for crop, count in enumerate(shown(size)):
            dominant, contextual = (
                value if isinstance(value, int) else int(value * count)
                for value in (method.dominant, method.contextual)
            )
            dominant = min(max(dominant, 1), count)
            contextual = min(contextual, count - dominant)
            assert len(image.kept[crop]) == max(dominant - 1, 0), "a CLS token counts as one"
            assert len(image.merged[crop]) == contextual
            total += dominant + contextual
        assert len(image.features) == len(image.columns) == total <= image.total


def test_images_without_crops_end_in_a_newline():
    """LLaVA-OneVision does not crop where a prompt has several images."""
    base = crop_model("llava_onevision")
    crops = images([(28, 56)])["pixel_values"][0]
    sizes = torch.tensor([[28, 56], [50, 36], [28, 56]])
    inputs = {"pixel_values": crops[:, None], "image_sizes": sizes, "batch_num_images": torch.tensor([3])}
    with torch.no_grad():
        want = base.get_image_features(**inputs).pooler_output
    for image, features in zip(reduced(base, inputs, EvenTokens(1.0)), want, strict=True):
        assert torch.equal(image.features, features)
    for image, features in zip(reduced(base, inputs, VisionZip(3, 0)), want, strict=True):
        assert image.total == len(features) == SIDE**2 + 1
        assert image.columns.tolist() == [*image.kept[0].tolist(), SIDE**2]
        torch.testing.assert_close(image.features, features[image.columns], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", CROPS)
def test_the_tower_runs_once_on_its_own_attention(model_type: str):
    base, inputs = crop_model(model_type), images([(50, 36), (28, 56)])
    assert base.vision_tower.config._attn_implementation == "sdpa"
    calls: list[Any] = []
    base.vision_tower.register_forward_hook(lambda _, args, output: calls.append((args[0], output.attentions)))
    reduced(base, inputs, VisionZip(4, 2))
    ((pixels, attentions),) = calls
    assert pixels.shape[0] == 5 + 3
    assert not attentions
    assert base.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision"])
def test_scores_are_those_of_the_eager_map(model_type: str):
    base = crop_model(model_type)
    pixels = images([(50, 36)])["pixel_values"][0]
    with torch.no_grad():
        got = encode(base.vision_tower, pixels, base.config.vision_feature_layer).scores()
    settings = base, pixels, base.config.vision_feature_layer, HAS_CLS[model_type]
    exact, eager = encoded(*settings).scores, encoded(*settings, torch.float32).scores
    assert (got - exact).abs().max() <= 1.05 * (eager - exact).abs().max() + 1e-6 * exact.abs().max()
    torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_tower_and_the_newline():
    base, inputs = crop_model("llava_next"), images([(28, 56)])
    (image,) = REDUCERS["llava_next"].reduce(base, inputs, VisionZip(4, 2, packing="model"))
    image.features.sum().backward()
    weights = [
        base.image_newline,
        base.multi_modal_projector.linear_1.weight,
        base.vision_tower.embeddings.class_embedding,
    ]
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)


def test_refusals():
    base, inputs = crop_model("llava_next"), images([(20, 56)])
    with pytest.raises(
        ValueError, match=r"pixel_values must hold \[3\] crops, as image_sizes say, got \(2, 3, 28, 28\)"
    ):
        reduced(base, {**inputs, "pixel_values": torch.zeros(2, 3, 28, 28)}, VisionZip(4, 2))
    with pytest.raises(ValueError, match="strategy does not cut off the first token"):
        reduced(base, {**inputs, "vision_feature_select_strategy": "full"}, VisionZip(4, 2))
    with pytest.raises(
        ValueError, match=r"16 patches without a CLS token were encoded, and .* cuts off the first token"
    ):
        reduced(crop_model("llava_onevision"), {**inputs, "vision_feature_select_strategy": "default"}, VisionZip(4, 2))
