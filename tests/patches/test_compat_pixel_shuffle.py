"""The patches for InternVL, nanoVLM's projector and VITA, on models with the same methods."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import vlmfast.nn
from tests.helpers.compat_models import (
    WIDTH,
    InternViTVisionTower,
    InternVLChatModel,
    ModalityProjector,
    OlderVisionLanguageModel,
    VisionLanguageModel,
)
from tests.helpers.global_hooks import seen_by_global_hooks
from tests.helpers.rounding import assert_within
from vlmfast.compat import internvl, nanovlm, vita
from vlmfast.patches import projects

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROJECTOR_SITES = ["ModalityProjector.forward", "ModalityProjector.pixel_shuffle"]


def uneven(cls: type, **options: object) -> nn.Module:
    """Make a model whose LayerNorm does not have its initial weights."""
    model = cls(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 4
    return model


def case(patch, cls: type, *names: str, **options: object):
    sites = [f"{cls.__name__}.{name}" for name in names]
    return pytest.param(
        patch, partial(uneven, cls, **options), sites, id="-".join([cls.__name__, *map(str, options.values())])
    )


EACH = [
    case(internvl.patch, InternVLChatModel, "extract_feature", "pixel_shuffle", ps_version="v2"),
    case(internvl.patch, InternVLChatModel, "extract_feature", "pixel_shuffle", ps_version="v1"),
    case(internvl.patch, InternVLChatModel, "extract_feature", "pixel_shuffle", select_layer=-2),
    case(vita.patch, InternViTVisionTower, "forward", "pixel_shuffle"),
    case(nanovlm.patch, ModalityProjector, "forward", "pixel_shuffle"),
    case(nanovlm.patch, ModalityProjector, "forward", "pixel_shuffle", scale=4),
]


def inputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make images of 8 x 8 patches, or features of such images."""
    shape = (2, 64, WIDTH) if isinstance(model, ModalityProjector) else (2, 3, 8, 8)
    return torch.randn(shape, dtype=dtype)


def outputs_and_gradients(model: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    if not output.requires_grad:  # VITA's tower runs without a gradient
        return [output]
    leaves = [x, *model.parameters()]
    gradients = torch.autograd.grad(output, leaves, weight, allow_unused=True, materialize_grads=True)
    return [output.detach(), *(gradient.contiguous() for gradient in gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("patch", "build", "sites"), EACH)
def test_results(patch, build, sites: list[str], dtype: torch.dtype):
    model = build().to(dtype)
    x = inputs(model, dtype)
    weight = torch.randn_like(model(x))
    reference = outputs_and_gradients(model, x, weight)
    exact = outputs_and_gradients(copy.deepcopy(model).double(), x.double(), weight.double())
    with patch(model):
        got = outputs_and_gradients(model, x, weight)
    assert_within(got[:1], reference[:1], exact[:1])
    if not isinstance(model, InternVLChatModel):  # without a LayerNorm, only torch's own matmul sums
        assert torch.equal(got[0], reference[0])
    for gradients in (got, reference):
        assert (len(gradients) == 1) == isinstance(model, InternViTVisionTower)
    for g, r, e in zip(got[1:], reference[1:], exact[1:], strict=True):
        assert g.dtype == r.dtype
        # A gradient passes several sums in this dtype, so the error of a single row is random: compare the whole.
        assert distance(g, e) <= 2 * distance(r, e) + torch.finfo(dtype).eps


def distance(gradient: Tensor, exact: Tensor) -> float:
    """Return the relative error of a gradient, by norms."""
    return float((gradient.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("patch", "build", "sites"), EACH)
def test_float64_after_the_patch(patch, build, sites: list[str]):
    model = build()
    x = inputs(model, torch.float64)
    with patch(model):
        got = model.double()(x)
    assert torch.equal(got, model(x))


@pytest.mark.parametrize(("patch", "build", "sites"), EACH)
def test_patch_and_undo(patch, build, sites: list[str]):
    model = build()
    cls, state = type(model), list(model.state_dict())
    with patch(nn.Sequential(model)) as handle:  # inside a wrapper, as in DistributedDataParallel
        assert isinstance(model, cls)
        assert type(model).__name__ == cls.__name__
        assert list(model.state_dict()) == state
        width = max(map(len, sites))
        assert sorted(handle.report().splitlines()[1:]) == [f"  {site:{width}}  1 module" for site in sorted(sites)]
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="is patched already"):
            patch(model)
    assert type(model) is cls
    assert vlmfast.unpatch(twin) == 1
    with patch(nn.Sequential(model, build())) as handle:
        assert handle.replaced == dict.fromkeys(sites, 2)
    assert type(model) is cls


@pytest.mark.parametrize(("patch", "build", "sites"), EACH)
def test_the_shuffle_alone(patch, build, sites: list[str]):
    model = build()
    x = torch.randn(2, 64, WIDTH) if isinstance(model, ModalityProjector) else torch.randn(2, 4, 8, WIDTH)
    want = model.pixel_shuffle(x)
    with patch(model):
        got = model.pixel_shuffle(x)
    assert got.shape == want.shape
    assert torch.equal(got, want)


@pytest.mark.parametrize(("patch", "build", "sites"), EACH)
def test_one_op_reads_the_features_where_they_lie(patch, build, sites: list[str], monkeypatch: pytest.MonkeyPatch):
    model = build()
    x, calls = inputs(model), []

    def spy(module: object, name: str) -> None:
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, *args, **kwargs: calls.append((name, x)) or op(x, *args, **kwargs))

    for name in ("pixel_shuffle", "pixel_shuffle_linear"):
        spy(vlmfast.nn, name)
    if isinstance(model, InternViTVisionTower):  # only its replacement calls the op of this module by itself
        spy(projects, "pixel_shuffle")
    with patch(model), torch.no_grad():
        model(x)
    [(name, features)] = calls
    assert name == ("pixel_shuffle" if isinstance(model, InternViTVisionTower) else "pixel_shuffle_linear")
    behind_the_cls_row = features.storage_offset() == WIDTH and features.stride(0) == 65 * WIDTH
    assert behind_the_cls_row or features is x


def test_attributes_hold_at_each_call():
    model = uneven(InternVLChatModel, ps_version="v2")
    x = inputs(model)
    with internvl.patch(model):
        row = model(x)
        model.ps_version = "v1"
        column = model(x)
        model.select_layer = 1
        earlier = model(x)
    assert not torch.equal(row, column)
    torch.testing.assert_close(row, column.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))
    torch.testing.assert_close(earlier, model(x))
    assert not torch.equal(earlier, column)


@pytest.mark.parametrize("part", [None, 0, 1, 2, 3])
def test_hooks_of_the_projector_run(part: int | None):
    model, calls = uneven(InternVLChatModel), []
    x = inputs(model)
    hooked = model.mlp1 if part is None else model.mlp1[part]
    hooked.register_forward_hook(lambda module, args, output: calls.append(output) or output * 2)
    want = model(x)
    with internvl.patch(model):
        torch.testing.assert_close(model(x), want)
    assert len(calls) == 2


@pytest.mark.parametrize(("patch", "build", "sites"), EACH)
def test_global_hooks_see_what_they_saw(patch, build, sites: list[str]):
    model = build()
    x, backward = inputs(model), not isinstance(model, InternViTVisionTower)

    def step() -> None:
        output = model(x)
        if backward:
            output.sum().backward()

    want = seen_by_global_hooks(model, step)
    with patch(model):
        assert seen_by_global_hooks(model, step) == want


def test_compiles_into_one_graph():
    model = uneven(InternVLChatModel)
    x = inputs(model)
    want = model(x)
    with internvl.patch(model):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)


# ---- forks and other versions ----


class Fork(InternVLChatModel):
    """A fork of InternVL that adds a step under the same method names."""

    bias = 1.0

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        features = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]
        side = int(features.shape[1] ** 0.5)
        square = features.reshape(features.shape[0], side, side, -1)
        tokens = self.pixel_shuffle(square, scale_factor=self.downsample_ratio).flatten(1, 2)
        return self.mlp1(tokens + self.bias)


Fork.__name__ = "InternVLChatModel"


def test_a_fork_keeps_what_it_changed():
    model = uneven(Fork)
    x = inputs(model)
    want = model(x)
    message = r"extract_feature is not patched: its body .* \(without .*select_layer, with bias, flatten\)"
    with pytest.warns(UserWarning, match=message) as record:
        handle = internvl.patch(model)
    assert record[0].filename == __file__
    assert torch.equal(model(x), want)
    assert list(handle.replaced) == ["InternVLChatModel.pixel_shuffle"]
    assert "InternVLChatModel.extract_feature  skipped: its body is another" in handle.report()
    handle.undo()
    assert type(model) is Fork


def test_a_body_may_warn():
    class Warning(InternVLChatModel):
        def pixel_shuffle(self, x: Tensor, scale_factor: float = 0.5) -> Tensor:
            if self.ps_version == "v1":
                warnings.warn("transposed", stacklevel=2)
            rows, columns = [int(size * scale_factor) for size in x.size()[1:3]]
            return x.view(rows, columns).permute(1, 0).contiguous()

    Warning.__name__ = "InternVLChatModel"
    with internvl.patch(Warning()) as handle:
        assert len(handle.replaced) == 2


class VisionLanguageModelWithProjector(VisionLanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.MP = ModalityProjector()


def test_nanovlm_as_a_whole():
    model = VisionLanguageModelWithProjector()
    with nanovlm.patch(model) as handle:
        assert list(handle.replaced) == ["VisionLanguageModel._replace_img_tokens_with_embd", *PROJECTOR_SITES]
        assert type(model.MP) is not ModalityProjector
    assert (type(model), type(model.MP)) == (VisionLanguageModelWithProjector, ModalityProjector)


def test_nanovlm_from_before_placeholders():
    model = OlderVisionLanguageModel()
    handle = nanovlm.patch(model)
    assert list(handle.replaced) == PROJECTOR_SITES
    assert not handle.skipped
    handle.undo()
    assert (type(model), type(model.MP)) == (OlderVisionLanguageModel, ModalityProjector)


def test_what_somebody_else_replaced_and_what_is_patched_stays():
    model = VisionLanguageModelWithProjector()
    model.MP.pixel_shuffle = lambda x: x
    with pytest.warns(UserWarning, match="pixel_shuffle was already replaced on 1 of 1 module"):
        handle = nanovlm.patch(model)
    assert "ModalityProjector.pixel_shuffle" not in handle.replaced
    handle.undo()
    assert (type(model), type(model.MP)) == (VisionLanguageModelWithProjector, ModalityProjector)
    del model.MP.pixel_shuffle
    nanovlm.patch(model.MP)
    with pytest.raises(RuntimeError, match="model is patched already"):
        nanovlm.patch(model)
    assert type(model) is VisionLanguageModelWithProjector


# ---- what is refused ----


def of(name: str, base: type = nn.Module, **members: object) -> nn.Module:
    return type(name, (base,), members)()


@pytest.mark.parametrize(
    ("patch", "model", "error", "message"),
    [
        (internvl.patch, None, TypeError, "model must be a torch.nn.Module, got NoneType"),
        (internvl.patch, nn.Linear(1, 1), ValueError, "hold a InternVLChatModel with .*, got a Linear with none"),
        (vita.patch, nn.Linear(1, 1), ValueError, "hold a InternViTVisionTower .*, got a Linear with none"),
        (internvl.patch, of("InternVLChatModel"), ValueError, "methods of InternVL, got a InternVLChatModel with none"),
        (
            internvl.patch,
            of("InternVLChatModel", extract_feature=lambda self, pixel_values, flags: None),
            ValueError,
            r"its parameters are \(self, pixel_values, flags\), expected \(self, pixel_values\)",
        ),
        (
            vita.patch,
            of("Other", InternViTVisionTower, **dict.fromkeys(["forward", "pixel_shuffle"], lambda self, images: None)),
            ValueError,
            "InternViTVisionTower.forward: it is that of Other",
        ),
        (
            vita.patch,
            of("InternViTVisionTower"),
            ValueError,
            "methods of VITA, got a InternViTVisionTower with none",
        ),
        (
            nanovlm.patch,
            of("ModalityProjector", forward=lambda self, x: self.net(x)),
            ValueError,
            r"there is nothing to replace in this nanoVLM model \(.*its body .* with net",
        ),
    ],
)
def test_refusals(patch, model: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        patch(model)


@pytest.mark.parametrize(("patch", "build", "sites"), EACH)
def test_grids_that_do_not_fit(patch, build, sites: list[str]):
    model = build()
    scale = getattr(model, "scale_factor", 2)
    odd = (2 * scale + 1) ** 2
    for patches, message in (
        (odd, f"grid must be divisible by scale, {scale}, got"),
        (35, "35 patches of x are no square"),
    ):
        shape = (1, patches, WIDTH) if isinstance(model, ModalityProjector) else (1, 3, patches, 1)
        with patch(model), pytest.raises(ValueError, match=message):
            model(torch.randn(shape))


def test_what_methods_refuse():
    with internvl.patch(model := InternVLChatModel()):
        for factor in (0.75, 0.0, 2.0):
            with pytest.raises(ValueError, match=rf"the ratio of a pixel shuffle must be 1 / an integer, got {factor}"):
                model.pixel_shuffle(torch.randn(1, 4, 4, WIDTH), factor)
        with pytest.raises(ValueError, match=r"x must have shape \(B, height, width, C\), got \(1, 16, 8\)"):
            model.pixel_shuffle(torch.randn(1, 16, WIDTH))
    with vita.patch(tower := InternViTVisionTower()):
        with pytest.raises(TypeError, match=r"images must be a torch.Tensor of shape .*, got list"):
            tower([torch.randn(3, 8, 8)])
