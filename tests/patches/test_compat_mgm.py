"""Patched Mini-Gemini: mining without keys and values, and token reduction, compared with upstream's own code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers import mgm_models
from tests.helpers.mgm_models import AUX, SCALE, SIDE, WIDTH, MGMLlamaForCausalLM
from vlmfast.compat import mgm
from vlmfast.patches import mining

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = [
    pytest.param({}, id="picture"),
    pytest.param({"image_grid": 2}, id="crops"),
    pytest.param({"image_grid": 2, "image_global": True}, id="crops and picture"),
]
PATCHES = SIDE**2


def uneven(**options: object) -> MGMLlamaForCausalLM:
    """Make a model whose norms have different weights, and whose queries attend unevenly to the pixels."""
    model = MGMLlamaForCausalLM(**options)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += torch.randn_like(parameter) / 4
        model.model.vlm_uni_query_projector[1].weight *= 2
    return model


def outputs_and_gradients(model: nn.Module, tokens: Tensor, feature_map: Tensor, weight: Tensor) -> list[Tensor]:
    parts = [getattr(model.model, f"vlm_uni_{name}_projector") for name in ("query", "aux", "val")]
    leaves = [tokens.requires_grad_(), feature_map.requires_grad_(), *(p for part in parts for p in part.parameters())]
    _, mined = model.unified_resampler(tokens, feature_map)
    return [mined.detach(), *torch.autograd.grad(mined, leaves, weight)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_and_gradients(dtype: torch.dtype):
    """In half precision the error is at most upstream's, that of gradients at most twice upstream's.

    In float32 both have an error of some roundings.
    """
    model = uneven().to(dtype)
    tokens, feature_map = torch.randn(8, PATCHES, WIDTH), torch.randn(8, AUX, SIDE * SCALE, SIDE * SCALE) + 2
    call = [x.to(dtype) for x in (tokens, feature_map, torch.randn(8, PATCHES, WIDTH))]
    exact = outputs_and_gradients(copy.deepcopy(model).double(), *(x.double() for x in call))
    reference = outputs_and_gradients(model, *call)
    with mgm.patch(model):
        got = outputs_and_gradients(model, *call)
    for index, (mine, theirs, truth) in enumerate(zip(got, reference, exact, strict=True)):
        assert mine.dtype == theirs.dtype
        error, budget = (float((x.double() - truth).norm()) for x in (mine, theirs))
        rounding = torch.finfo(dtype).eps * float(truth.norm())
        slack = 8 * rounding if dtype == torch.float32 else 0.0 if index == 0 else budget + 0.5 * rounding
        assert error <= budget + slack + 1e-12, index


@pytest.mark.parametrize("options", LAYOUTS)
def test_pictures_and_crops(options: dict):
    model = uneven(**options).double()
    inputs = model.inputs(dtype=torch.float64)
    want, alone = model(*inputs), model(inputs[0])
    with mgm.patch(model):
        torch.testing.assert_close(model(*inputs), want, rtol=1e-12, atol=1e-12)
        assert torch.equal(model(inputs[0]), alone)


def test_gradients_that_are_zero_are_not_missing():
    """Biases that cancel in the softmax get gradients of zero, not None: DDP and weight decay need a gradient."""
    model = uneven()
    with mgm.patch(model):
        model(*model.inputs()).sum().backward()
    keys = model.model.vlm_uni_aux_projector
    assert all(part.bias.grad.abs().max() == 0 for part in keys)
    assert all(part.weight.grad.abs().max() > 0 for part in keys)


def test_undo_is_bit_equal():
    model = uneven(image_grid=2)
    inputs, state = model.inputs(), list(model.state_dict())
    want = model(*inputs)
    with mgm.patch(model) as handle:
        assert list(handle.replaced) == ["MGMMetaForCausalLM.unified_resampler"]
        assert not handle.skipped
        assert list(model.state_dict()) == state
        assert not torch.equal(model(*inputs), want)
    assert type(model) is MGMLlamaForCausalLM
    assert torch.equal(model(*inputs), want)
    with vlmfast.patch(nn.Sequential(model)) as handle:
        assert list(handle.replaced) == ["MGMMetaForCausalLM.unified_resampler"]


def test_no_copy_of_the_map_and_no_keys(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def spy(query: Tensor, feature_map: Tensor, *rest: object) -> Tensor:
        seen.append((query.shape, feature_map.data_ptr()))
        return torch.zeros_like(query)

    monkeypatch.setattr(mining, "mine_patches", spy)
    spy.op = vlmfast.mine_patches.op
    model = uneven()
    tokens, feature_map = torch.randn(2, PATCHES, WIDTH), torch.randn(2, AUX, SIDE * SCALE, SIDE * SCALE)
    with mgm.patch(model):
        same, mined = model.unified_resampler(tokens, feature_map)
    assert same is tokens
    assert mined.shape == tokens.shape
    assert seen == [((2, PATCHES, AUX), feature_map.data_ptr())]


def test_projectors_that_were_replaced_run_as_they_are():
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    for name in ("vlm_uni_aux_projector", "vlm_uni_val_projector"):
        model, calls = uneven(), []
        projector = getattr(model.model, name)
        projector[1].__class__ = Other
        inputs = model.inputs()
        want = model(*inputs)
        with mgm.patch(model):
            torch.testing.assert_close(model(*inputs), want)
            projector.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            model(*inputs)
        assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_autocast_and_double(dtype: torch.dtype):
    model = uneven()
    inputs = model.inputs()
    if dtype == torch.float64:
        model, inputs = model.double(), tuple(x.double() for x in inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        want = model(*inputs)
        with mgm.patch(model):
            got = model(*inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- what is refused ----


def test_refusals():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got NoneType"):
        mgm.patch(None)
    with pytest.raises(ValueError, match="hold a MGMMetaForCausalLM with the methods of Mini-Gemini, got a Linear"):
        mgm.patch(nn.Linear(1, 1))
    model = uneven()
    model.model.vlm_uni_val_projector[0].eps = 1e-6
    with pytest.raises(ValueError, match="must have one eps, got 1e-05 and 1e-06"):
        mgm.patch(model)
    want = model(*(inputs := model.inputs()))
    with vlmfast.patch(model):  # does not check the norms: keys and values are computed as upstream does
        torch.testing.assert_close(model(*inputs), want)

    class MGMMetaForCausalLM(mgm_models.MGMMetaForCausalLM):
        def unified_resampler(self, images, images_aux):
            return images, self.get_model().vlm_uni_query_projector(images)

    class Fork(nn.Module, MGMMetaForCausalLM):
        pass

    with pytest.raises(ValueError, match=r"nothing to replace .* its body is another .*without .*nan_to_num"):
        mgm.patch(Fork())


# ---- fewer tokens ----


METHODS = [
    vlmfast.VisionZip(5, 0),
    vlmfast.VisionZip(4, 3),
    vlmfast.VisionZip(3, 2, merge="mean"),
    vlmfast.EvenTokens(6),
]


def full_rows(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return upstream's input of the projector: (B, views * PATCHES, C)."""
    seen = []
    hook = model.model.mm_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*inputs)
    hook.remove()
    return seen[0]


def selections(model: nn.Module, images: Tensor, method: vlmfast.reduce.Method) -> list[vlmfast.reduce.Selection]:
    """Apply the method to each picture or crop in the order of the input, with the tower's own attention maps."""
    clip = model.get_vision_tower().vision_tower
    clip.set_attn_implementation("eager")
    found = []
    for view in images.flatten(0, -4):
        attention = getattr(clip, "vision_model", clip).encoder.layers[-2].self_attn
        keys = []
        hook = attention.k_proj.register_forward_hook(lambda *args, keys=keys: keys.append(args[2]))
        maps = clip(view[None], output_attentions=True).attentions[-2]
        hook.remove()
        key = keys[0].unflatten(-1, (attention.num_heads, -1)).mean(2)[:, 1:]
        tokens = vlmfast.reduce.VisualTokens(
            hidden=torch.zeros(1, PATCHES, 1),
            grid=(1, SIDE, SIDE),
            scores=lambda maps=maps: maps[:, :, 0, 1:].sum(1).float(),
            metric=lambda key=key: key.detach(),
            features=lambda: torch.zeros(1, PATCHES, 1),
            pixels=lambda view=view: view[None],
        )
        found.append(method.select(tokens))
    clip.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("options", LAYOUTS)
def test_reduced_is_a_part_of_the_full_result(options: dict, method: vlmfast.reduce.Method):
    """The reduced rows are those of upstream's full encode_images, gathered or merged, in upstream's order."""
    model = uneven(**options)
    inputs = model.inputs()
    views = inputs[0].shape[1] if options else 1
    images = inputs[0] if options else inputs[0][:, None]
    rows = full_rows(model, inputs).unflatten(1, (views, PATCHES))
    if options.get("image_global"):
        images = images.roll(1, 1)  # the whole picture comes first, as in the result
    chosen = selections(model, images, method)
    parts = [selection.apply(part[None])[0] for selection, part in zip(chosen, rows.flatten(0, 1), strict=True)]
    want = model.model.mm_projector(torch.stack(parts).view(2, -1, WIDTH))
    with mgm.patch(model, reduce=method) as handle:
        got = model(*inputs)
        count = parts[0].shape[0]
        sizes = ", ".join([f"{PATCHES} -> {count}"] * 2 * views)
        assert handle.report().endswith(f"{method}: visual tokens of the last images {sizes}")
        assert len(handle.images) == 2 * views
        by_call = [image.kept[0].tolist() for image in handle.images]
    expected = [selection.kept[0].tolist() for selection in chosen]
    if options.get("image_global"):
        expected = [*expected[1:views], expected[0], *expected[views + 1 :], expected[views]]
    assert by_call == expected
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", LAYOUTS)
def test_reduced_without_a_map(options: dict):
    """Without a map, tokens are in upstream's order: each crop a batch element, without the whole picture."""
    model = uneven(**options)
    images, _ = model.inputs()
    want = model(images)
    with mgm.patch(model, reduce=vlmfast.EvenTokens(1.0)):
        torch.testing.assert_close(model(images), want, rtol=1e-5, atol=1e-5)


def test_only_kept_tokens_are_mined(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def spy(query: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None, eps: float) -> Tensor:
        seen.append((query.shape[1], scale, feature_map.shape[2:], None if blocks is None else blocks.shape))
        return vlmfast.mine_patches(query, feature_map, scale, blocks, eps)

    spy.op = vlmfast.mine_patches.op
    monkeypatch.setattr(mining, "mine_patches", spy)
    model = uneven(image_grid=2)
    side = (SIDE * SCALE, SIDE * SCALE)
    with mgm.patch(model, reduce=vlmfast.VisionZip(5, 0)):
        model(*model.inputs())
    assert seen == [(5, SCALE, side, (2, 5))] * 4
    seen.clear()
    with mgm.patch(model, reduce=vlmfast.VisionZip(5, 1)):
        model(*model.inputs())
    assert seen == [(PATCHES, SCALE, side, None)] * 4


def test_reduced_gradients_and_undo():
    model = uneven()
    inputs = model.inputs()
    want = model(*inputs)
    with mgm.patch(model, reduce=vlmfast.VisionZip(4, 2)) as handle:
        assert "no images yet" in handle.report()
        twin = copy.deepcopy(model)
        output = model(*inputs)
        assert torch.equal(twin(*inputs), output)
        output.sum().backward()
        assert not any(image.features.requires_grad for image in handle.images)
    assert all(parameter.grad is None for parameter in model.get_vision_tower().parameters())
    assert model.model.vlm_uni_val_projector[1].weight.grad.abs().max() > 0
    assert torch.equal(model(*inputs), want)


def test_reduced_refusals():
    with pytest.raises(ValueError, match=r"SmallerImage\(keep=2\) cannot make the pictures of Mini-Gemini smaller"):
        mgm.patch(uneven(), reduce=vlmfast.SmallerImage(2))
    with pytest.raises(TypeError, match=r"reduce must be a method such as .* got int"):
        mgm.patch(uneven(), reduce=64)
    model = uneven()
    model.get_vision_tower().select_feature = "cls_patch"
    with pytest.raises(ValueError, match=r"of a CLIPVisionTower that selects its patches, got .* 'cls_patch'"):
        mgm.patch(model, reduce=vlmfast.VisionZip(5, 0))
    model = uneven()
    model.model.vision_tower = nn.Identity()
    with pytest.raises(ValueError, match=r"of a CLIPVisionTower .* got Identity with select_feature None"):
        mgm.patch(model, reduce=vlmfast.VisionZip(5, 0))
    assert type(model) is MGMLlamaForCausalLM

    class MGMMetaForCausalLM(mgm_models.MGMMetaForCausalLM):
        def encode_images(self, images, images_aux=None, is_video=False):
            return super().encode_images(images, images_aux).relu()

        unified_resampler = mgm_models.MGMMetaForCausalLM.unified_resampler

    class Fork(MGMLlamaForCausalLM, MGMMetaForCausalLM):
        encode_images = MGMMetaForCausalLM.encode_images

    with pytest.raises(ValueError, match=r"cannot be reduced: encode_images: it is that of Fork"):
        mgm.patch(Fork(), reduce=vlmfast.VisionZip(5, 0))
