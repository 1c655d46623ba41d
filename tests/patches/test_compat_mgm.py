"""Mini-Gemini patched: mining without keys and values, and fewer visual tokens, held against upstream's own lines."""

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
    """A model whose norms have weights that differ, and whose queries prefer some pixels."""
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
    """What is mined is no further from the exact result than upstream's in half precision, nor are gradients by much.

    In float32 both have the error of some roundings.
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
        slack = 2 * rounding if dtype == torch.float32 else 0.0 if index == 0 else 0.1 * budget + 0.5 * rounding
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
    """Of what drops out of the softmax: DDP waits for the gradient of each parameter, and decay takes those of zero."""
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
    with vlmfast.patch(model):  # which asks no module: keys and values are made then
        torch.testing.assert_close(model(*inputs), want)

    class MGMMetaForCausalLM(mgm_models.MGMMetaForCausalLM):
        def unified_resampler(self, images, images_aux):
            return images, self.get_model().vlm_uni_query_projector(images)

    class Fork(nn.Module, MGMMetaForCausalLM):
        pass

    with pytest.raises(ValueError, match=r"nothing to replace .* its body is another .*without .*nan_to_num"):
        mgm.patch(Fork())
