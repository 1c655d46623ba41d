"""InternVL's tiles, whose visual tokens are made of 2 x 2 patches, against plain float64 loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers import tiny_models as tiny
from tests.helpers.patches_models import DTYPES, skip_unless_known
from tests.helpers.reduce_oracle import Tower, encoded, zipped
from vlmfast.reduce import EvenTokens, Method, RandomTokens, ReducedImage, VisionZip
from vlmfast.reduce.families import REDUCERS
from vlmfast.reduce.towers import encode

TOKENS = 4  # tokens along a side of a tile, each of 2 x 2 patches


def tile_model(layer: int = -1, norm: str = "rms_norm", mean_pooling: bool = True) -> nn.Module:
    skip_unless_known("internvl")
    model = tiny.model(
        "internvl",
        text_config=tiny.text(model_type="qwen3", head_dim=16),
        vision_config=tiny.vision(
            norm_type=norm,
            use_qk_norm=norm == "rms_norm",
            use_mean_pooling=mean_pooling,
            image_size=[56, 56],
            patch_size=[7, 7],
        ),
        image_token_id=tiny.IMAGE,
        downsample_ratio=0.5,
        vision_feature_layer=layer,
    )
    return model.model


def reduced(base: nn.Module, pixels: Tensor, method: Method, **inputs: Any) -> list[ReducedImage]:
    with torch.no_grad():
        return REDUCERS["internvl"].reduce(base, {"pixel_values": pixels, **inputs}, method)


def tower_of(base: nn.Module, pixels: Tensor, layer: int) -> Tower:
    if pixels.dtype == torch.float32:
        return encoded(base, pixels, layer, True)
    with torch.no_grad():
        got = encode(base.vision_tower, pixels, layer)
    states = got.output.last_hidden_state if layer == -1 else got.hidden
    return Tower(states[:, 1:].double(), got.scores().double(), got.metric().double(), None)


def patches_of(token: int) -> list[int]:
    """Return the patches of a token in the order of its channels: the upper two, then the lower two."""
    y, x = divmod(token, TOKENS)
    return [(2 * y + dy) * 2 * TOKENS + 2 * x + dx for dy in range(2) for dx in range(2)]


CASES = [
    (VisionZip(dominant=5, contextual=3), -1, "rms_norm", True),
    (VisionZip(dominant=0.25, contextual=0.25, merge="mean"), -1, "layer_norm", False),
    (VisionZip(dominant=6, contextual=2, packing="model"), -2, "layer_norm", False),
    (VisionZip(dominant=3, contextual=0), -1, "layer_norm", True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "layer", "norm", "mean_pooling"), CASES)
def test_tiles_equal_the_loops(method: VisionZip, layer: int, norm: str, mean_pooling: bool, dtype: torch.dtype):
    base, pixels = tile_model(layer, norm, mean_pooling).to(dtype), tiny.pixels(3, 3, 56, 56).to(dtype)
    got = reduced(base, pixels, method)
    tower = tower_of(base, pixels, layer)
    keep, contextual = method.budget(TOKENS**2, False)
    groups = [patches_of(token) for token in range(TOKENS**2)]
    for tile, image in enumerate(got):
        hidden = torch.stack([torch.cat([tower.hidden[tile, patch] for patch in group]) for group in groups])
        scores = torch.stack([sum(tower.scores[tile, patch] for patch in group) / 4 for group in groups])
        metric = torch.stack([sum(tower.metric[tile, patch] for patch in group) / 4 for group in groups]).to(dtype)
        want = zipped(hidden, scores, metric.double(), keep, contextual, method.merge)
        rows = {token: hidden[token] for token in want.kept} | dict(zip(want.targets, want.merged, strict=True))
        assert image.columns.tolist() == sorted(rows)
        assert image.kept[0].tolist() == want.kept
        assert image.merged[0].tolist() == want.targets
        assert (image.total, image.grid, image.levels) == (TOKENS**2, (TOKENS, TOKENS), ())
        with torch.no_grad():
            features = base.multi_modal_projector(torch.stack([rows[token] for token in sorted(rows)]).to(dtype))
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(image.features, features, **tolerance)


@pytest.mark.parametrize("patched", [False, True], ids=["upstream", "patched"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("_", "layer", "norm", "mean_pooling"), CASES)
def test_all_tokens_kept_are_the_unpruned_tiles(
    _: Method, layer: int, norm: str, mean_pooling: bool, dtype: torch.dtype, patched: bool
):
    base, pixels = tile_model(layer, norm, mean_pooling).to(dtype), tiny.pixels(3, 3, 56, 56)
    if patched:
        vlmfast.patch(base)
    with torch.no_grad():
        want = base.get_image_features(pixel_values=pixels).pooler_output
    for method in (EvenTokens(1.0), RandomTokens(TOKENS**2), VisionZip(1.0, 0)):
        images = reduced(base, pixels, method)
        assert torch.equal(torch.stack([image.features for image in images]), want), method
    for image, features in zip(reduced(base, pixels, EvenTokens(0.25)), want, strict=True):
        assert image.columns.tolist() == [0, 4, 8, 12]
        atol = float(8 * torch.finfo(dtype).eps * features.abs().max())
        torch.testing.assert_close(image.features, features[::4], rtol=0, atol=atol)


def test_the_tower_runs_once_on_its_own_attention():
    base, pixels = tile_model(), tiny.pixels(3, 3, 56, 56)
    calls: list[Any] = []
    base.vision_tower.register_forward_hook(lambda _, args, output: calls.append(output.attentions))
    reduced(base, pixels, VisionZip(5, 3))
    assert len(calls) == 1
    assert not calls[0]
    assert base.vision_tower.config._attn_implementation == "sdpa"


def test_refusals():
    base, pixels = tile_model(), tiny.pixels(1, 3, 56, 56)
    with pytest.raises(ValueError, match="cut off by vision_feature_select_strategy 'default', got 'full'"):
        reduced(base, pixels, VisionZip(5, 3), vision_feature_select_strategy="full")
