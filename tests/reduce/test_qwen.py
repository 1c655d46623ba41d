"""Token reduction in Qwen-VL against an oracle of plain float64 loops, written only from the rules."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.qwen_models import BROAD, NAMES, SMALL, TALL, WIDE, inputs_of, model_of
from tests.helpers.reduce_oracle import Reduced, zipped
from vlmfast.reduce import EvenTokens, RandomTokens, ReducedImage, VisionZip, VisualTokens
from vlmfast.reduce.families import qwen
from vlmfast.reduce.families.qwen import window_order

WINDOW = 2  # side of a window of the tiny Qwen2.5-VL, in visual tokens
METHOD = VisionZip(dominant=0.3, contextual=0.15)


# ---- the oracle ----


@dataclass
class Recording:
    """Eager attention maps (1, H, t, t) and keys (1, H, t, D) of the last vision block, one per segment."""

    maps: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # (N, D) of each level


@torch.no_grad()
def record(model: Any, inputs: dict[str, Tensor]) -> Recording:
    """Record eager attention in a copy of the model; the last map is computed in float64 from its inputs."""
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
    """Return the raster positions of visual tokens in encoder order; Qwen2.5-VL goes window by window."""
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
    """Return the score and the metric of each visual token, in raster order."""
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


def rows_of(features: Tensor, reduced: Reduced) -> dict[int, Tensor]:
    """Map positions to rows, in raster order; a merged token has the position of its target."""
    rows = {position: features[position] for position in reduced.kept}
    rows |= zip(reduced.targets, reduced.merged, strict=True)
    return dict(sorted(rows.items()))


def zipped_image(features: Tensor, scores: list[float], metric: list[Tensor]) -> Reduced:
    """Apply `METHOD` to one image by the oracle; fail if scores are too close to decide."""
    keep, contextual = int(0.3 * len(scores)), int(0.15 * len(scores))
    ranked = sorted(scores, reverse=True)
    assert ranked[keep - 1] - ranked[keep] > 1e-5
    return zipped(features.double(), torch.tensor(scores), torch.stack(metric), keep, contextual, "reference")


# ---- the reducer ----


class Spy(VisionZip):
    """Records the tokens that it was given."""

    asked: list[VisualTokens]

    def select(self, tokens: VisualTokens) -> Any:
        vars(self).setdefault("asked", []).append(tokens)
        return super().select(tokens)


def reduce(model: Any, inputs: dict[str, Tensor], method: Any) -> list[ReducedImage]:
    with torch.no_grad():
        return qwen.reduce(model.model, inputs, method)


def split(rows: Any, grids: Tensor) -> list[Any]:
    counts = (grids.prod(1) // 4).tolist()
    return [rows[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_metric_are_those_of_the_eager_map(name):
    model = model_of(name)
    inputs = inputs_of(model, (SMALL, WIDE), (TALL, SMALL, BROAD))
    scores, metric = scores_and_metric(record(model, inputs), encoder_order(name, inputs["image_grid_thw"]))
    method = Spy(0.3, 0.15)
    reduce(model, inputs, method)
    # Images of one size are reduced as a batch.
    assert [(tokens.batch, tokens.count, tokens.grid) for tokens in method.asked] == [
        (2, 24, (1, 4, 6)),
        (1, 21, (1, 3, 7)),
        (1, 15, (1, 5, 3)),
        (1, 24, (1, 3, 8)),
    ]
    assert not any(tokens.has_cls for tokens in method.asked)
    want_scores, want_metric = (split(rows, inputs["image_grid_thw"]) for rows in (torch.tensor(scores), metric))
    for tokens, members in zip(method.asked, ([0, 3], [1], [2], [4]), strict=True):
        assert tokens.scores().dtype == torch.float32
        for row, member in enumerate(members):
            torch.testing.assert_close(tokens.scores()[row], want_scores[member].float(), rtol=1e-5, atol=1e-6)
            wanted = torch.stack(want_metric[member]).float()
            torch.testing.assert_close(tokens.metric()[row], wanted, rtol=1e-5, atol=1e-5)
            assert want_scores[member].std() > 0.02  # attention is not uniform


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_the_oracle(name):
    model = model_of(name)
    inputs = inputs_of(model, (SMALL, WIDE), (TALL, BROAD))
    grids = inputs["image_grid_thw"]
    recording = record(model, inputs)
    scores, metric = scores_and_metric(recording, encoder_order(name, grids))
    got = reduce(model, inputs, METHOD)
    assert len(got) == len(grids)
    wanted = zip(split(scores, grids), split(metric, grids), grids.tolist(), strict=True)
    for number, (image, (image_scores, image_metric, grid)) in enumerate(zip(got, wanted, strict=True)):
        levels = [split(level, grids)[number] for level in recording.features]
        want = [zipped_image(level, image_scores, image_metric) for level in levels]
        assert image.total == len(image_scores)
        assert image.grid == (grid[1] // 2, grid[2] // 2)
        assert image.kept[0].tolist() == want[0].kept
        assert image.merged[0].tolist() == want[0].targets
        assert any(want[0].assigned)
        assert len(levels) == (3 if "qwen3_vl" in name else 1)
        for level, features, reduced in zip((image.features, *image.levels), levels, want, strict=True):
            rows = rows_of(features.double(), reduced)
            assert image.columns.tolist() == list(rows)
            torch.testing.assert_close(level.double(), torch.stack(list(rows.values())), rtol=1e-4, atol=1e-5)


def test_windows_are_undone():
    """Window order differs from raster order here, and choosing in window order would give another result."""
    model = model_of("qwen2_5_vl")
    inputs = inputs_of(model, (SMALL, TALL))
    grids = inputs["image_grid_thw"]
    order = encoder_order("qwen2_5_vl", grids)
    assert order != sorted(order)
    recording = record(model, inputs)
    wanted = []
    for places in (order, sorted(order)):
        scores, metric = (split(rows, grids)[0] for rows in scores_and_metric(recording, places))
        wanted.append(zipped_image(split(recording.features[0], grids)[0], scores, metric).kept)
    image = reduce(model, inputs, METHOD)[0]
    assert image.kept[0].tolist() == wanted[0] != wanted[1]


@pytest.mark.parametrize("frames", [1, 3])
def test_window_order_is_that_of_the_loops(frames):
    grids = torch.tensor([[frames, 8, 12], [1, 10, 6], [frames, 2, 2]])
    tokens = [(t, h // 2, w // 2) for t, h, w in grids.tolist()]
    assert window_order(tokens, WINDOW).tolist() == encoder_order("qwen2_5_vl", grids)


@pytest.mark.parametrize("name", NAMES[:3])
def test_bfloat16_chooses_what_its_own_queries_and_keys_say(name):
    """By their float64 map, no choice is wrong by more than a float32 rounding of the scores."""
    model = model_of(name, torch.bfloat16)
    inputs = inputs_of(model, (SMALL, WIDE))
    grids = inputs["image_grid_thw"]
    model.set_attn_implementation("eager")  # so that earlier blocks round as in the oracle
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
    inputs = inputs_of(model, (SMALL, WIDE), (TALL, BROAD))
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
    """Each frame is a crop of the overlay; positions count over the whole image."""
    model = model_of("qwen2_5_vl")
    (image,) = reduce(model, inputs_of(model, ((2, 4, 8),)), EvenTokens(0.5))
    assert image.grid == (2, 4)
    assert image.columns.tolist() == list(range(0, 16, 2))
    assert [kept.tolist() for kept in image.kept] == [[0, 2, 4, 6]] * 2
    assert [len(targets) for targets in image.merged] == [0, 0]


def test_gradients_reach_the_tower():
    model = model_of("qwen3_vl")
    (image,) = qwen.reduce(model.model, inputs_of(model, (SMALL,)), METHOD)
    sum(level.square().sum() for level in (image.features, *image.levels)).backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


def test_hooks_are_removed_and_a_tower_without_them_is_refused(monkeypatch):
    model = model_of("qwen2_vl")
    inputs = inputs_of(model, (SMALL,))
    attention = model.model.visual.blocks[-1].attn
    with pytest.raises(RuntimeError, match="size"):
        reduce(model, {**inputs, "pixel_values": inputs["pixel_values"][:4]}, METHOD)
    assert not attention._forward_pre_hooks
    assert not attention.qkv._forward_hooks
    monkeypatch.setattr(type(model.model), "get_image_features", lambda self, pixels, grid, **_: ())
    with pytest.raises(RuntimeError, match="compiled by themselves"):
        reduce(model, inputs, METHOD)
