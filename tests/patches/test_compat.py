"""The patches for 4M and nanoVLM, on models with the same methods."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import vlmfast
from tests.helpers import compat_models
from tests.helpers.compat_models import FM, PLACEHOLDER, WIDTH, FourM, VisionLanguageModel
from vlmfast.compat import fourm, nanovlm
from vlmfast.patches import Patch, projects

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TOKENS = {"rgb": 9, "depth": 5, "caption": 4}


# ---- 4M ----


def modalities(dtype: torch.dtype = torch.float32, share: float = 0.5) -> dict[str, dict[str, Tensor]]:
    """Make three samples: a share of the tokens masked out, all of them, and none."""

    def mask(tokens: int) -> Tensor:
        return torch.stack([torch.rand(tokens) < share, torch.ones(tokens) > 0, torch.ones(tokens) < 0])

    return {
        name: {
            "x": torch.randn(3, tokens, WIDTH, dtype=dtype, requires_grad=True),
            "emb": torch.randn(3, tokens, WIDTH, dtype=dtype, requires_grad=True),
            "input_mask": mask(tokens),
            "target_mask": mask(tokens),
            "ids": torch.randint(1, 1000, (3, tokens)),
            "decoder_attention_mask": torch.randint(0, 3, (3, tokens)),
        }
        for name, tokens in TOKENS.items()
    }


def masked(model: FourM, method: str, inputs: dict, number: int) -> tuple[Tensor, ...]:
    random.seed(1)  # upstream shuffles the modalities for the decoder
    return getattr(model, method)(inputs, number)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


METHODS = ("forward_mask_encoder", "forward_mask_decoder")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [0, 1, 7, 18, 40])
@pytest.mark.parametrize(
    "options", [{}, {"registers": 3, "causal": True}, {"registers": 1, "separate": False}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_fourm(method: str, options: dict, number: int, dtype: torch.dtype):
    model, inputs = FourM(**options), modalities(dtype)
    with fourm.patch(model):
        got = masked(model.to(dtype), method, inputs, number)
    want = masked(model, method, inputs, number)
    assert_same(got, want)
    assert got[2].dtype == torch.bool
    assert got[2].shape[1] == 1
    leaves = [values[key] for values in inputs.values() for key in ("x", "emb")]
    leaves += [model.register_tokens] * (method == "forward_mask_encoder" and model.num_register_tokens > 0)
    weights = [torch.randn_like(output) for output in want[:2]]
    gradients = [
        torch.autograd.grad(outputs[:2], leaves, weights, allow_unused=True, materialize_grads=True)
        for outputs in (got, want)
    ]
    assert_same(*gradients)


class Exact:
    """Stands in for ``torch`` in upstream's method: a stable sort by the mask, exact for any number of tokens."""

    argsort = functools.partial(torch.argsort, stable=True)

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def arange(self, number: int, device: torch.device) -> Tensor:
        return torch.zeros(number, device=device)


@pytest.mark.parametrize("method", METHODS)
def test_fourm_beyond_the_resolution_of_a_float(method: str, monkeypatch: pytest.MonkeyPatch):
    tokens = 2**20 + 37
    mask = torch.rand(1, tokens) < 0.3
    inputs = {
        "rgb": {
            "x": torch.randn(1, tokens, 2),
            "emb": torch.randn(1, tokens, 2),
            "input_mask": mask,
            "target_mask": mask,
            "ids": torch.arange(1, tokens + 1)[None],
            "decoder_attention_mask": torch.randint(0, 3, (1, tokens)),
        }
    }
    model = FourM()
    # Without the tokens x tokens mask, which would be too large.
    model.adapt_decoder_attention_mask = lambda attention, modality: attention + modality
    with monkeypatch.context() as patched:
        patched.setattr(compat_models, "torch", Exact())
        want = masked(model, method, inputs, tokens)
    assert not torch.equal(masked(model, method, inputs, tokens)[0], want[0])
    with fourm.patch(model):
        assert_same(masked(model, method, inputs, tokens), want)


def test_fourm_orders_once(monkeypatch: pytest.MonkeyPatch):
    orders = []

    def spy(tokens, invalid, keep, order=None, pad_left=False):
        orders.append(order)
        return vlmfast.compact_tokens(tokens, invalid, keep, order, pad_left)

    monkeypatch.setattr(projects, "compact_tokens", spy)
    with fourm.patch(model := FourM()):
        masked(model, "forward_mask_encoder", modalities(), 6)
    first, second = orders
    assert first is None
    assert second.shape == (3, 6)


# ---- nanoVLM ----


@pytest.mark.parametrize("image_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nanovlm(dtype: torch.dtype, image_dtype: torch.dtype):
    model = VisionLanguageModel()
    ids = torch.tensor([[3, 3, 9, 3], [8, 9, 3, 3], [9, 9, 9, 3]])
    images = torch.randn(2, 3, 2 * WIDTH, dtype=image_dtype)[..., ::2].requires_grad_()
    with nanovlm.patch(model):
        got = model.to(dtype)(ids, images)
    want = model(ids, images)
    leaves, weight = [images, model.token_embedding.weight], torch.randn_like(want)
    assert_same((got, *torch.autograd.grad(got, leaves, weight)), (want, *torch.autograd.grad(want, leaves, weight)))


def test_nanovlm_without_images():
    model, ids = VisionLanguageModel(), torch.tensor([[8, 9]])
    with nanovlm.patch(model):
        assert torch.equal(model(ids, torch.empty(0, 4, WIDTH)), model.token_embedding(ids))


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_nanovlm_counts(rows: int):
    """A wrong number of rows is an error, even one row for several placeholders, which upstream would broadcast."""
    model, ids = VisionLanguageModel(), torch.full((1, 5), PLACEHOLDER)
    with nanovlm.patch(model), pytest.raises(ValueError, match=f"as many positions as .* {rows}, got 5"):
        model(ids, torch.randn(1, rows, WIDTH))


# ---- both ----


EACH = [
    pytest.param(fourm.patch, FourM, METHODS, id="fourm"),
    pytest.param(fourm.patch, FM, METHODS, id="fm"),
    pytest.param(nanovlm.patch, VisionLanguageModel, ("_replace_img_tokens_with_embd",), id="nanovlm"),
]


@pytest.mark.parametrize(("patch", "cls", "names"), EACH)
def test_patch_and_undo(patch, cls: type, names: tuple[str, ...]):
    model = cls()
    owner = next(base for base in cls.__mro__ if names[0] in vars(base))
    state = list(model.state_dict())
    with patch(model) as handle:
        assert isinstance(handle, Patch)
        assert isinstance(model, cls)
        assert type(model).__name__ == cls.__name__
        assert list(model.state_dict()) == state
        assert all(getattr(type(model), name) is not vars(owner)[name] for name in names)
        replaced = [f"  {owner.__name__}.{name}  1 module" for name in names]
        assert handle.report().splitlines()[1 : len(names) + 1] == replaced
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="is patched already"):
            patch(model)
    assert type(model) is cls
    handle.undo()
    assert vlmfast.unpatch(twin) == 1
    assert type(twin) is cls


class Operators(TorchDispatchMode):
    """Records which operators are called, without those inside an op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("patch", "model", "call"),
    [
        (fourm.patch, FourM(registers=2), lambda model: masked(model, METHODS[0], modalities(), 6)),
        (fourm.patch, FourM(), lambda model: masked(model, METHODS[1], modalities(), 6)),
        (nanovlm.patch, VisionLanguageModel(), lambda model: model(torch.full((1, 4), 3), torch.randn(1, 4, WIDTH))),
    ],
    ids=["encoder", "decoder", "nanovlm"],
)
def test_no_boolean_indexing(patch, model: nn.Module, call):
    """Boolean indexing makes the host wait for the device."""
    with Operators() as upstream:
        call(model)
    with patch(model), Operators() as ours:
        call(model)
    indexing = {"aten.index", "aten.index_put_", "aten.nonzero", "aten._local_scalar_dense"}
    assert upstream.names & indexing
    assert not ours.names & indexing
    assert any(name.startswith("vlmfast.") for name in ours.names)


@pytest.mark.parametrize(("patch", "cls", "names"), EACH)
def test_wrapped(patch, cls: type, names: tuple[str, ...]):
    model = cls()
    with patch(nn.Sequential(model)):
        assert type(model) is not cls
    other = cls()
    with patch(nn.Sequential(model, other)) as handle:
        assert cls not in (type(model), type(other))
        assert set(handle.replaced.values()) == {2}
    assert (type(model), type(other)) == (cls, cls)


@pytest.mark.parametrize(
    ("patch", "model", "error", "message"),
    [
        (fourm.patch, None, TypeError, "model must be a torch.nn.Module, got NoneType"),
        (fourm.patch, VisionLanguageModel(), ValueError, "model must be or hold a FourM .*, got a VisionL.* with none"),
        (
            nanovlm.patch,
            FourM(),
            ValueError,
            "VisionLanguageModel or ModalityProjector with the methods of nanoVLM, got a FourM with none",
        ),
        (
            fourm.patch,
            type("FourM", (nn.Module,), {})(),
            ValueError,
            "FourM with the methods of 4M, got a FourM with none",
        ),
        (
            nanovlm.patch,
            type("VisionLanguageModel", (nn.Module,), {})(),
            ValueError,
            "with the methods of nanoVLM, got a VisionLanguageModel with none",
        ),
    ],
)
def test_refusals(patch, model: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        patch(model)


def test_methods_of_others_are_left_alone():
    class Mine(FourM):
        def forward_mask_decoder(self, mod_dict, num_decoder_tokens):
            return None

    with pytest.warns(UserWarning, match="FourM.forward_mask_decoder is not patched: it is that of Mine"):
        handle = fourm.patch(Mine())
    assert list(handle.replaced) == ["FourM.forward_mask_encoder"]

    class Other(nn.Module):
        def _replace_img_tokens_with_embd(self, input_ids, token_embd, image_embd=None):
            return None

    Other.__name__ = "VisionLanguageModel"
    message = r"its parameters are \(self, .*, image_embd=None\), expected \(self, input_ids, token_embd, image_embd\)"
    with pytest.raises(ValueError, match=message):
        nanovlm.patch(Other())

    class Truncating(VisionLanguageModel):
        def _replace_img_tokens_with_embd(self, input_ids, token_embd, image_embd):
            mask = input_ids == self.tokenizer.image_token_id
            rows = image_embd.view(-1, image_embd.size(-1))[: int(mask.sum())]
            placed = token_embd.clone()
            placed[mask] = rows.to(placed.dtype)
            return placed

    Truncating.__name__ = "VisionLanguageModel"
    message = "there is nothing to replace in this nanoVLM model .* its body is another .*with int, sum"
    with pytest.raises(ValueError, match=message):
        nanovlm.patch(Truncating())
    with pytest.warns(UserWarning, match="its body is another"):
        handle = vlmfast.patch(nn.Sequential(Truncating(), LlamaRMSNorm(WIDTH)))
    assert list(handle.replaced) == ["llama.LlamaRMSNorm.forward"]

    class Truncated(FourM):
        def forward_mask_encoder(self, mod_dict, num_encoder_tokens):
            tokens, *others = super().forward_mask_encoder(mod_dict, num_encoder_tokens)
            return (tokens.clamp(max=1), *others)

    Truncated.__name__ = "FourM"
    with pytest.warns(UserWarning, match="FourM.forward_mask_encoder is not patched: its body is another"):
        handle = fourm.patch(Truncated())
    assert list(handle.replaced) == ["FourM.forward_mask_decoder"]

    model = FourM()
    model.forward_mask_encoder = lambda *args: None
    with pytest.warns(UserWarning, match="forward_mask_encoder was already replaced on 1 of 1 module"):
        handle = fourm.patch(model)
    assert list(handle.replaced) == ["FourM.forward_mask_decoder"]


@pytest.mark.parametrize(("patch", "cls", "names"), EACH)
def test_vlmfast_patch_takes_these_models_too(patch, cls: type, names: tuple[str, ...]):
    model = nn.ModuleDict({"theirs": cls(), "ours": LlamaRMSNorm(WIDTH)})
    with vlmfast.patch(model) as handle:
        owner = next(base for base in cls.__mro__ if names[0] in vars(base)).__name__
        assert list(handle.replaced) == [*(f"{owner}.{name}" for name in names), "llama.LlamaRMSNorm.forward"]
    with patch(model) as handle:
        assert type(model["ours"]) is LlamaRMSNorm
