"""`vlmfast.nn.PixelShuffleConnector` against the upstream modules whose weights it loads."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from tests.helpers.compat_models import WIDTH, InternVLChatModel, ModalityProjector
from tests.helpers.global_hooks import REGISTER, seen_by_global_hooks
from tests.helpers.rounding import assert_within
from vlmfast.nn import PixelShuffleConnector

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OUT = 12


class InternVL(InternVLMultiModalProjector):
    """The projector of transformers' InternVL, behind its shuffle, which upstream has in another class."""

    def __init__(self) -> None:
        vision, text = SimpleNamespace(hidden_size=WIDTH), SimpleNamespace(hidden_size=OUT)
        super().__init__(
            SimpleNamespace(vision_config=vision, text_config=text, downsample_ratio=0.5, projector_hidden_act="gelu")
        )

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        tokens = InternVLModel.pixel_shuffle(None, x.reshape(x.shape[0], side, side, -1), 0.5)
        return super().forward(tokens.flatten(1, 2))


class Chat(nn.Sequential):
    """``mlp1`` of InternVL's remote code, behind the shuffle of one version."""

    def __init__(self, ps_version: str):
        model = InternVLChatModel(ps_version)
        super().__init__(*model.mlp1)
        self.shuffle = model.pixel_shuffle

    def forward(self, x: Tensor) -> Tensor:
        side = int((x.shape[1] - 1) ** 0.5)
        tokens = self.shuffle(x[:, 1:].reshape(x.shape[0], side, side, -1)).flatten(1, 2)
        return super().forward(tokens)


class Vita(nn.Sequential):
    """The projector of VITA, on scaled features."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4 * WIDTH, OUT), nn.GELU(), nn.Linear(OUT, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(ModalityProjector().pixel_shuffle(x * 0.5))


def idefics(scale: int) -> Idefics3Connector:
    vision, text = SimpleNamespace(hidden_size=WIDTH), SimpleNamespace(hidden_size=OUT)
    return Idefics3Connector(SimpleNamespace(scale_factor=scale, vision_config=vision, text_config=text))


PROJECTION = {"norm": False, "activation": None, "linears": 1, "bias": False}
EACH = [
    pytest.param(InternVL, {}, id="internvl"),
    pytest.param(lambda: Chat("v2"), {"drop_cls": True}, id="mlp1-v2"),
    pytest.param(lambda: Chat("v1"), {"drop_cls": True, "order": "column"}, id="mlp1-v1"),
    pytest.param(Vita, {"norm": False, "input_scale": 0.5}, id="vita"),
    pytest.param(lambda: idefics(2), {"scale": 2, **PROJECTION}, id="idefics3"),
    pytest.param(lambda: idefics(3), {"scale": 3, **PROJECTION}, id="idefics3-by-three"),
    pytest.param(ModalityProjector, PROJECTION, id="nanovlm"),
]


def pair(build, options: dict, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PixelShuffleConnector, Tensor]:
    """Make upstream's module with non-initial LayerNorm weights, ours with the same weights, and features."""
    theirs = build().to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += torch.randn_like(parameter) / 4
    ours = PixelShuffleConnector(WIDTH, OUT, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    side = 2 * options.get("scale", 2)
    return theirs, ours, torch.randn(2, side * side + options.get("drop_cls", False), WIDTH, dtype=dtype)


def outputs_and_gradients(module: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the input and of each parameter."""
    x = x.clone().requires_grad_()
    output = module(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *module.parameters()], weight)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("build", "options"), EACH)
def test_loads_and_equals(build, options: dict, dtype: torch.dtype):
    theirs, ours, x = pair(build, options, dtype)
    weight = torch.randn_like(theirs(x))
    got, reference = (outputs_and_gradients(module, x, weight) for module in (ours, theirs))
    exact = outputs_and_gradients(copy.deepcopy(theirs).double(), x.double(), weight.double())
    assert_within(got, reference, exact)
    with torch.no_grad():
        assert torch.equal(ours(x), got[0])


def test_keys_are_those_of_mlp1():
    mlp = InternVLChatModel().mlp1
    ours = PixelShuffleConnector(WIDTH, OUT)
    assert list(ours.state_dict()) == list(mlp.state_dict())
    mlp.load_state_dict(ours.state_dict())


def test_loads_inside_of_another_module():
    theirs, ours = nn.ModuleDict({"connector": InternVL()}), PixelShuffleConnector(WIDTH, OUT)
    nn.ModuleDict({"connector": ours}).load_state_dict(theirs.state_dict())
    assert torch.equal(ours[1].weight, theirs["connector"].linear_1.weight)


def test_strict_loading():
    ours = PixelShuffleConnector(WIDTH, OUT)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*\"1.bias\""):
        ours.load_state_dict({k: v for k, v in InternVL().state_dict().items() if k != "linear_1.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*\"linear_3.bias\""):
        ours.load_state_dict({**InternVL().state_dict(), "linear_3.bias": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*\"linear_2.weight\""):
        PixelShuffleConnector(WIDTH, OUT, linears=1).load_state_dict(InternVL().state_dict())


def test_grid():
    _, ours, _ = pair(InternVL, {})
    x = torch.randn(1, 24, WIDTH)
    tokens = x.view(1, 2, 2, 3, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(1, 6, 4 * WIDTH)
    torch.testing.assert_close(ours(x, (4, 6)), nn.Sequential(*ours)(tokens))
    with pytest.raises(ValueError, match="the 24 patches of x are no square"):
        ours(x)
    with pytest.raises(ValueError, match="grid must be divisible by scale, 2, got"):
        ours(x, (8, 3))


def test_gelu_tanh():
    _, ours, x = pair(InternVL, {"activation": "gelu_tanh"})
    _, exact, _ = pair(InternVL, {})
    exact.load_state_dict(ours.state_dict())
    assert not torch.equal(ours(x), exact(x))
    torch.testing.assert_close(ours(x), exact(x), rtol=0, atol=1e-2)


@pytest.mark.parametrize("part", range(4))
def test_a_part_with_a_hook_runs_as_it_is(part: int):
    _, ours, x = pair(InternVL, {})
    want, calls = ours(x), []
    handle = ours[part].register_forward_hook(lambda module, args, output: calls.append(output) or output * 2)
    assert not torch.equal(ours(x), want)
    assert len(calls) == 1
    handle.remove()
    assert torch.equal(ours(x), want)


def test_global_hooks_see_every_part():
    _, ours, x = pair(InternVL, {})
    names = [name for name, _ in ours.named_modules()]
    assert seen_by_global_hooks(ours, lambda: ours(x).sum().backward()) == {
        (kind, name): 1 for kind in REGISTER for name in names
    }


def test_another_part_runs_as_it_is():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    _, ours, x = pair(ModalityProjector, PROJECTION)
    want = ours(x)
    linear, ours[0] = ours[0], Doubled(4 * WIDTH, OUT, bias=False)
    ours[0].load_state_dict(linear.state_dict())
    assert torch.equal(ours(x), 2 * want)
    ours[0] = nn.Sequential(linear, nn.Tanh())
    assert torch.equal(ours(x), want.tanh())


def test_a_norm_without_weights():
    _, ours, x = pair(InternVL, {})
    nn.init.ones_(ours[0].weight)
    nn.init.zeros_(ours[0].bias)
    want = ours(x)
    ours[0] = nn.LayerNorm(4 * WIDTH, elementwise_affine=False)
    torch.testing.assert_close(ours(x), want)


def test_moves_and_copies():
    _, ours, x = pair(InternVL, {})
    state = ours.state_dict()
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(x), ours(x))
    twin[1].weight.data.zero_()
    assert not torch.equal(twin(x), ours(x))
    assert twin.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    empty = PixelShuffleConnector(WIDTH, OUT, device="meta")
    assert empty[0].weight.is_meta
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(x), ours(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves_to_the_device(dtype: torch.dtype):
    theirs, ours, x = pair(InternVL, {}, dtype)
    exact = copy.deepcopy(theirs).double()(x.double())
    got, reference = (module.to("cuda")(x.to("cuda")).cpu() for module in (ours, theirs))
    assert_within([got], [reference], [exact])


@pytest.mark.parametrize(("build", "options"), EACH[:1] + EACH[2:4])
def test_compiles_into_one_graph(build, options: dict):
    _, ours, x = pair(build, options)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    weight = torch.randn_like(ours(x))
    for got, want in zip(*(outputs_and_gradients(module, x, weight) for module in (compiled, ours)), strict=True):
        torch.testing.assert_close(got, want)


def test_autocast():
    theirs, ours, x = pair(InternVL, {})
    with torch.autocast("cpu", torch.bfloat16):
        got, reference = ours(x), theirs(x)
    assert_within([got.detach()], [reference.detach()], [copy.deepcopy(theirs).double()(x.double()).detach()])


def test_says_its_layout():
    text = repr(PixelShuffleConnector(WIDTH, OUT, order="column", input_scale=0.5, drop_cls=True))
    assert "scale=2, order='column', input_scale=0.5, drop_cls=True" in text
    assert "(3): Linear" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 0}, ValueError, "scale must be an int of at least 1, got 0"),
        ({"channels": 2.5}, ValueError, "channels must be an int of at least 1, got 2.5"),
        ({"order": "diagonal"}, ValueError, "order must be one of 'row', 'column', got 'diagonal'"),
        ({"activation": "relu"}, ValueError, "activation must be one of 'gelu', 'gelu_tanh', got 'relu'"),
        ({"linears": 3}, ValueError, "linears must be 1 or 2, got 3"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps must be finite and not negative, got -1.0"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        PixelShuffleConnector(**{"channels": WIDTH, "out": OUT, **options})
