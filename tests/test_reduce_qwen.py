"""Token reduction in Qwen-VL against an oracle in plain loops and float64, written from the rules alone."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.patches_models import tiny
from vlmfast.patches import tiny as parts
from vlmfast.reduce import EvenTokens, RandomTokens, ReducedImage, VisionZip, VisualTokens
from vlmfast.reduce.qwen import reduce_qwen, window_order

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
WINDOW = 2  # of the tiny Qwen2.5-VL, in visual tokens
SMALL, WIDE, TALL = (1, 8, 12), (1, 6, 14), (1, 10, 6)  # patches: 24, 21 and 15 visual tokens; TALL has odd windows
METHOD = VisionZip(dominant=0.3, contextual=0.15)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose last vision block prefers some patches clearly."""
    model, _ = tiny(name)
    with torch.no_grad():
        model.model.visual.blocks[-1].attn.qkv.weight.mul_(20.0)
    return model.to(dtype)


def inputs_of(model: nn.Module, *rows: tuple[tuple[int, int, int], ...]) -> dict[str, Tensor]:
    """Prompts with images of these grids of patches; the second text is longer, and shorter rows are padded left."""
    prompts = []
    for number, grids in enumerate(rows):
        ids = [1, 10] + [20] * 5 * number
        for grid in grids:
            ids += [parts.VISION_START, *[parts.IMAGE] * (math.prod(grid) // 4), parts.VISION_END, 11]
        prompts.append([*ids, 12 + number, 13])
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    grids = [grid for row in rows for grid in row]
    patches = sum(t * h * w for t, h, w in grids)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "image_grid_thw": torch.tensor(grids)}
    inputs["pixel_values"] = parts.pixels(patches, 3 * 2 * 4 * 4).to(next(model.parameters()).dtype)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == parts.IMAGE).int()
    return inputs


# ---- the oracle ----


@dataclass
class Recording:
    """The eager maps (1, H, t, t) and the keys (1, H, t, D) of the last vision block, one of each segment."""

    maps: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # of each level, (N, D)


@torch.no_grad()
def record(model: Any, inputs: dict[str, Tensor]) -> Recording:
    """What eager attention gives in a copy of the model; its last map is made in float64 from what it is given."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    result = Recording()
    block = model.model.visual.blocks[-1].attn
    eager = sys.modules[type(block).__module__].eager_attention_forward

    def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        if module is block:
            wide = eager(module, query.double(), key.double(), value.double(), **options)
            result.maps.append(wide[1])
            result.keys.append(key.double())
        return eager(module, query, key, value, **options)

    ALL_ATTENTION_FUNCTIONS.register("recording", recording)
    model.model.visual.config._attn_implementation = "recording"
    output = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    result.features = [level if isinstance(level, Tensor) else torch.cat(level) for level in levels]
    assert result.maps
    return result


def encoder_order(name: str, grids: Tensor) -> list[int]:
    """Raster positions of visual tokens in the order of the encoder: Qwen2.5-VL goes window by window."""
    order, start = [], 0
    for frames, height, width in grids.tolist():
        rows, columns = height // 2, width // 2
        side = WINDOW if name == "qwen2_5_vl" else max(rows, columns)
        for frame in range(frames):
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    for row in range(top, min(top + side, rows)):
                        for column in range(left, min(left + side, columns)):
                            order.append(start + (frame * rows + row) * columns + column)
        start += frames * rows * columns
    return order


def scores_and_metric(recording: Recording, order: list[int]) -> tuple[list[float], list[Tensor]]:
    """Of each visual token, in raster order."""
    received, keys = [], []
    for attention, key in zip(recording.maps, recording.keys, strict=True):
        for patch in range(attention.shape[-1]):
            received.append(float(sum(head[:, patch].sum() for head in attention[0]) / attention.shape[1]))
            keys.append(sum(key[0, head, patch] for head in range(key.shape[1])) / key.shape[1])
    scores, metric = [0.0] * len(order), [torch.empty(0)] * len(order)
    for place, position in enumerate(order):
        scores[position] = sum(received[4 * place : 4 * place + 4]) / 4
        metric[position] = sum(keys[4 * place : 4 * place + 4]) / 4
    return scores, metric


def chosen(scores: list[float], metric: list[Tensor], dominant: int, contextual: int) -> dict[int, list[int]]:
    """Position of each token that comes out -> those that are merged into it. Near ties are refused."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert scores[ranked[dominant - 1]] - scores[ranked[dominant]] > 1e-5, "the case is too close to judge"
    others = sorted(ranked[dominant:])
    step = len(others) // contextual
    targets = [others[number * step] for number in range(contextual)]
    groups: dict[int, list[int]] = {position: [] for position in sorted([*ranked[:dominant], *targets])}
    for position in others:
        if position not in targets:
            likeness = [torch.cosine_similarity(metric[position], metric[target], 0).item() for target in targets]
            best, second = sorted(likeness, reverse=True)[:2]
            assert best - second > 1e-6, "the case is too close to judge"
            groups[targets[likeness.index(best)]].append(position)
    return groups


def merged(features: Tensor, groups: dict[int, list[int]]) -> Tensor:
    rows = []
    for position, members in groups.items():
        row = features[position].double()
        rows.append(row + sum(features[member].double() for member in members) / len(members) if members else row)
    return torch.stack(rows)


# ---- the reducer ----


class Spy(VisionZip):
    """Tells what it was asked."""

    asked: list[VisualTokens]

    def select(self, tokens: VisualTokens) -> Any:
        vars(self).setdefault("asked", []).append(tokens)
        return super().select(tokens)


def reduce(model: Any, inputs: dict[str, Tensor], method: Any) -> list[ReducedImage]:
    with torch.no_grad():
        return reduce_qwen(model.model, inputs, method)


def split(rows: Any, grids: Tensor) -> list[Any]:
    counts = (grids.prod(1) // 4).tolist()
    return [rows[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_metric_are_those_of_the_eager_map(name):
    model = model_of(name)
    inputs = inputs_of(model, (SMALL, WIDE), (TALL, SMALL))
    scores, metric = scores_and_metric(record(model, inputs), encoder_order(name, inputs["image_grid_thw"]))
    method = Spy(0.3, 0.15)
    reduce(model, inputs, method)
    # images of one size are chosen from together
    assert [(tokens.batch, tokens.count, tokens.has_cls) for tokens in method.asked] == [
        (2, 24, False),
        (1, 21, False),
        (1, 15, False),
    ]
    want_scores, want_metric = (split(rows, inputs["image_grid_thw"]) for rows in (torch.tensor(scores), metric))
    for tokens, members in zip(method.asked, ([0, 3], [1], [2]), strict=True):
        assert tokens.scores().dtype == torch.float32
        for row, member in enumerate(members):
            torch.testing.assert_close(tokens.scores()[row], want_scores[member].float(), rtol=1e-5, atol=1e-6)
            wanted = torch.stack(want_metric[member]).float()
            torch.testing.assert_close(tokens.metric()[row], wanted, rtol=1e-5, atol=1e-5)
            assert want_scores[member].std() > 0.02  # attention is not flat


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_the_oracle(name):
    model = model_of(name)
    inputs = inputs_of(model, (SMALL, WIDE), (TALL, SMALL))
    grids = inputs["image_grid_thw"]
    recording = record(model, inputs)
    scores, metric = scores_and_metric(recording, encoder_order(name, grids))
    got = reduce(model, inputs, METHOD)
    assert len(got) == len(grids)
    wanted = zip(split(scores, grids), split(metric, grids), grids.tolist(), strict=True)
    for number, (image, (image_scores, image_metric, grid)) in enumerate(zip(got, wanted, strict=True)):
        count = len(image_scores)
        groups = chosen(image_scores, image_metric, int(0.3 * count), int(0.15 * count))
        assert image.total == count
        assert image.grid == (grid[1] // 2, grid[2] // 2)
        assert image.columns.tolist() == list(groups)
        targets = sorted(set(groups) - set(image.kept[0].tolist()))
        assert image.merged[0].tolist() == targets
        assert len(targets) == int(0.15 * count)
        assert {position for position in groups if groups[position]} <= set(targets)
        levels = [image.features, *image.levels]
        assert len(levels) == len(recording.features) == (3 if "qwen3_vl" in name else 1)
        for level, features in zip(levels, recording.features, strict=True):
            want = merged(split(features, grids)[number], groups)
            torch.testing.assert_close(level.double(), want, rtol=1e-4, atol=1e-5)
    assert any(len(image.merged[0]) for image in got)


def test_windows_are_undone():
    """Their order is not the raster's here, and the choice without undoing it is another."""
    model = model_of("qwen2_5_vl")
    inputs = inputs_of(model, (SMALL, TALL))
    grids = inputs["image_grid_thw"]
    order = encoder_order("qwen2_5_vl", grids)
    assert order != sorted(order)
    recording = record(model, inputs)
    kept = []
    for places in (order, sorted(order)):
        scores, metric = (split(rows, grids)[0] for rows in scores_and_metric(recording, places))
        kept.append(list(chosen(scores, metric, 7, 3)))
    image = reduce(model, inputs, METHOD)[0]
    assert image.columns.tolist() == kept[0] != kept[1]


@pytest.mark.parametrize("frames", [1, 3])
def test_window_order_is_that_of_the_loops(frames):
    grids = torch.tensor([[frames, 8, 12], [1, 10, 6], [frames, 2, 2]])
    tokens = [(t, h // 2, w // 2) for t, h, w in grids.tolist()]
    assert window_order(tokens, WINDOW).tolist() == encoder_order("qwen2_5_vl", grids)


@pytest.mark.parametrize("name", NAMES[:3])
def test_bfloat16_chooses_what_its_own_queries_and_keys_say(name):
    """Judged by a float64 map of them: a token may be on the wrong side of the cut by the rounding of float32 alone."""
    model = model_of(name, torch.bfloat16)
    inputs = inputs_of(model, (SMALL, WIDE))
    grids = inputs["image_grid_thw"]
    model.set_attn_implementation("eager")  # blocks before the last one round as those of the oracle do
    scores, _ = scores_and_metric(record(model, inputs), encoder_order(name, grids))
    for image, wanted in zip(reduce(model, inputs, METHOD), split(scores, grids), strict=True):
        kept = image.kept[0].tolist()
        cut = sorted(wanted, reverse=True)[len(kept) - 1]
        assert len(kept) == int(0.3 * len(wanted))
        assert image.features.dtype == torch.bfloat16
        for position, score in enumerate(wanted):
            assert score >= cut - 1e-5 if position in kept else score <= cut + 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [EvenTokens(1.0), RandomTokens(1.0), VisionZip(dominant=1.0, contextual=0)], ids=str)
def test_all_tokens_are_the_features_of_the_model(name, method):
    model = model_of(name)
    inputs = inputs_of(model, (SMALL, WIDE), (TALL, SMALL))
    with torch.no_grad():
        output = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    images = reduce(model, inputs, method)
    for number, image in enumerate(images):
        assert torch.equal(image.features, output.pooler_output[number])
        assert image.columns.tolist() == list(range(image.total)) == image.kept[0].tolist()
    levels = getattr(output, "deepstack_features", None) or []
    for level, want in enumerate(levels):
        want = want if isinstance(want, Tensor) else torch.cat(want)
        assert torch.equal(torch.cat([image.levels[level] for image in images]), want)


def test_even_tokens_of_an_image_with_frames():
    """Each frame is a crop of the overlay; positions are those of the whole image."""
    model = model_of("qwen2_5_vl")
    (image,) = reduce(model, inputs_of(model, ((2, 4, 8),)), EvenTokens(0.5))
    assert image.grid == (2, 4)
    assert image.columns.tolist() == list(range(0, 16, 2))
    assert [kept.tolist() for kept in image.kept] == [[0, 2, 4, 6]] * 2
    assert [len(targets) for targets in image.merged] == [0, 0]


def test_gradients_reach_the_tower():
    model = model_of("qwen3_vl")
    (image,) = reduce_qwen(model.model, inputs_of(model, (SMALL,)), METHOD)
    sum(level.square().sum() for level in (image.features, *image.levels)).backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


def test_hooks_are_removed_and_a_tower_without_them_is_refused(monkeypatch):
    model = model_of("qwen2_vl")
    inputs = inputs_of(model, (SMALL,))
    attention = model.model.visual.blocks[-1].attn
    with pytest.raises(ValueError, match="25 \\+ 0 of 24 visual tokens"):
        reduce(model, inputs, EvenTokens(25))
    with pytest.raises(RuntimeError, match="size"):
        reduce(model, {**inputs, "pixel_values": inputs["pixel_values"][:4]}, METHOD)
    assert not attention._forward_pre_hooks
    assert not attention.qkv._forward_hooks
    monkeypatch.setattr(type(model.model), "get_image_features", lambda self, pixels, grid, **_: ())
    with pytest.raises(RuntimeError, match="not compiled"):
        reduce(model, inputs, METHOD)
