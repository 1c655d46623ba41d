"""Compare each replacement with upstream, forward and backward, on one class of transformers that has the body.

Connectors and DeepStack methods that a tiny model has are compared in the tests of tiny models; methods of projects
outside transformers in test_compat*.py.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import vlmfast
from tests.helpers.patches_models import assert_same, tiny
from tests.patches.test_attention import CLASSES as ATTENTIONS
from tests.patches.test_grids import TOWERS
from tests.patches.test_layers import FAMILIES as LAYERED
from tests.patches.test_masked_rows import DEEPSTACK
from tests.patches.test_merger import MERGERS
from tests.patches.test_pixel_shuffle import EACH_SHUFFLE
from tests.patches.test_tiles import NAMES as TILED
from vlmfast.patches.bodies import BODIES
from vlmfast.patches.plan import find_sites
from vlmfast.patches.upstream import source

NORMS = (
    "llama.LlamaRMSNorm",
    "llama4.Llama4TextRMSNorm",
    "t5.T5LayerNorm",
    "idefics.IdeficsRMSNorm",
    "gemma.GemmaRMSNorm",
    "qwen3_next.Qwen3NextRMSNormGated",
    "olmo2.Olmo2RMSNorm",
    "helium.HeliumRMSNorm",
    "nemotron_h.NemotronHRMSNorm",
    "gemma4.Gemma4RMSNorm",
    "gemma3n.Gemma3nRMSNorm",
    "moshi.MoshiRMSNorm",
    "nanochat.NanoChatRMSNorm",
    "qwen4_exp.Qwen4ExpTextRMSNorm",
)
MASKS = (
    "llava.LlavaModel",
    "llava_next.LlavaNextModel",
    "deepseek_vl.DeepseekVLModel",
    "lfm2_vl.Lfm2VlModel",
    "paddleocr_vl.PaddleOCRVLModel",
    "diffusion_gemma.DiffusionGemmaEncoderModel",
    "hunyuan_vl.HunYuanVLModel",
    "chameleon.ChameleonModel",
    "granite_docling.GraniteDoclingModel",
    "qwen2_vl.Qwen2VLModel",
    "llava_onevision.LlavaOnevisionModel",
    "perception_lm.PerceptionLMModel",
    "video_llava.VideoLlavaModel",
    "minimax_m3_vl.MiniMaxM3VLModel",
    "glm4v.Glm4vModel",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerModel",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerForConditionalGeneration",
    "gemma4.Gemma4Model",
    "gemma3n.Gemma3nModel",
    "audioflamingo3.AudioFlamingo3Model",
    "minicpmv4_6.MiniCPMV4_6Model",
    "inkling.InklingModel",
    "nemotron_h_omni.NemotronH_Omni_Reasoning_V3",
    "pocket_tts.PocketTTSModel",
    "idefics2.Idefics2Model",
    "idefics3.Idefics3Model",
    "smolvlm.SmolVLMModel",
)
PLACING = ("get_placeholder_mask", "inputs_merger")
SHUFFLES = ("modernvbert.ModernVBertConnector", "nemotron_h_omni.NemotronH_Omni_Reasoning_V3")
WIDTH, IMAGE, VIDEO, AUDIO = 8, 3, 4, 5
COUNTS = {"image": 4, "video": 2, "audio": 3}


@pytest.fixture(autouse=True)
def on_the_definition() -> Iterator[None]:
    with vlmfast.use("torch"):
        yield


KNOWN = {body.key: body for body in BODIES if isinstance(body.key, str) and body.function is not None}


def look_up(name: str, *methods: str) -> tuple[type, str] | None:
    """Return the class of that name and the first of these methods that it has; None if the body is unknown here."""
    folder, class_name = name.split(".")
    try:
        cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), class_name)
    except (ModuleNotFoundError, AttributeError):
        return None
    method = next((method for method in methods if hasattr(cls, method)), None)
    return None if method is None or source(cls, method).digest not in KNOWN else (cls, method)


def find(name: str, *methods: str) -> tuple[type, str]:
    found = look_up(name, *methods)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}, or one whose body is not known")
    return found


def function_of(module: nn.Module, method: str) -> Any:
    """Return the replacement of the method."""
    (site,) = [site for site in find_sites(module) if site.method == method]
    assert site.reason is None
    return site.body.function


# ---- norms ----


def norm_of(cls: type, **arguments: Any) -> nn.Module:
    named = inspect.signature(cls.__init__).parameters
    sized = next(name for name in [*named][1:]) != "eps"
    module = cls(*[48] * sized, **{"eps": 1e-2} if "eps" in named else {}, **arguments)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def norm_inputs(cls: type, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Make the inputs of a norm; rows of width 96 have gaps between them, as the queries of Qwen3.5."""
    number = len(inspect.signature(cls.forward).parameters) - 1
    return [(0.1 * torch.randn(2, 5, 3, width, dtype=dtype))[..., :48] for _ in range(number)]


def variants(cls: type) -> list[dict[str, Any]]:
    scales = "with_scale" in inspect.signature(cls.__init__).parameters
    return [{"with_scale": True}, {"with_scale": False}] if scales else [{}]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm_rounds_as_upstream(name: str, dtype: torch.dtype, weight_dtype: torch.dtype):
    """Results are bit-equal, also after the weights were cast to another dtype."""
    cls, _ = find(name, "forward")
    for arguments in variants(cls):
        module = norm_of(cls, **arguments)
        for width in (48, 96):
            inputs = norm_inputs(cls, width, dtype)
            with vlmfast.patch(module):
                got = module.to(weight_dtype)(*inputs)
            assert type(module) is cls
            assert_same(got, module(*inputs))
            module.float()


def gradients(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = module(*inputs)
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad(output, [*inputs, *module.parameters()], grad))


def test_an_input_changed_in_place_is_noticed():
    """An in-place change after the norm is torch's error in the backward, as documented; upstream saves a copy."""
    (x,), module = norm_inputs(find(NORMS[0], "forward")[0], 48, torch.bfloat16), norm_of(find(NORMS[0], "forward")[0])
    x = x.clone().requires_grad_() * 1
    with vlmfast.patch(module.bfloat16()):
        output = module(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_norm_are_no_worse(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    cls, _ = find(name, "forward")
    for arguments in variants(cls):
        module = norm_of(cls, **arguments).to(dtype)
        inputs = norm_inputs(cls, 48, dtype)
        upstream = gradients(module, inputs)
        function = function_of(module, "forward")
        with vlmfast.patch(module):
            got = gradients(module, inputs)
        with monkeypatch.context() as context:  # upstream casts every input to float32
            context.setitem(function.__globals__, "rms_norm", vlmfast.rms_norm.op.reference)
            module.forward = function.__get__(module)
            exact = gradients(copy.deepcopy(module).double(), [x.double() for x in inputs])
        for mine, theirs, true in zip(got, upstream, exact, strict=True):
            assert mine.dtype == theirs.dtype
            rounding = torch.finfo(dtype).eps / 2 * true.norm()
            assert (mine - true).norm() <= 1.05 * (theirs - true).norm() + rounding


# ---- where embeddings go ----


def host_of(cls: type) -> nn.Module:
    """Make an instance with only the attributes that such a method reads."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO}
    module.config = SimpleNamespace(**tokens)
    module.vocabulary_mapping = SimpleNamespace(**tokens)
    module.embed = nn.Embedding(16, WIDTH)
    module.get_input_embeddings = lambda: module.embed
    return module


def masks_of(module: nn.Module, method: str, ids: Tensor | None, embeds: Tensor) -> dict[str, Tensor]:
    """Return the masks by modality."""
    function = getattr(module, method)
    parameters = inspect.signature(function).parameters
    given: dict[str, Any] = {"token_id": IMAGE, "placeholder_token_id": IMAGE}
    for kind, count in {**COUNTS, "": COUNTS["image"]}.items():
        given[f"{kind}_features".lstrip("_")] = torch.randn(1, count, WIDTH)
    if "Glm" in type(module).__name__ and ids is not None:  # video frames have the image token
        given["video_features"] = given["image_features"]
    found = function(ids, embeds, **{name: given[name] for name in parameters if name in given})
    return dict(zip(COUNTS, (found,) if isinstance(found, Tensor) else found, strict=False))


def placed(module: nn.Module, method: str, ids: Tensor, by_embedding: bool) -> list[Tensor]:
    """Return the embeddings with the features placed, and the gradients of embeddings and features."""
    embeds = module.embed(ids).detach().requires_grad_()
    given = None if by_embedding else ids
    torch.manual_seed(1)
    results = []
    if method == "inputs_merger":
        features = torch.randn(2, COUNTS["image"] // 2, WIDTH, requires_grad=True)
        results.append((features, module.inputs_merger(given, embeds, features)))
    else:
        for mask in masks_of(module, method, given, embeds).values():
            rows = int((mask if mask.dim() == 2 else mask[..., 0]).sum())
            features = torch.randn(rows, WIDTH, requires_grad=True)
            results.append((features, embeds.masked_scatter(mask[..., None] if mask.dim() == 2 else mask, features)))
    found = []
    for features, output in results:
        grad = torch.linspace(-1, 1, output.numel()).view_as(output)
        found += [output, *torch.autograd.grad(output, [embeds, features], grad)]
    return found


@pytest.mark.parametrize("name", MASKS)
def test_embeddings_go_where_upstream_puts_them(name: str):
    cls, method = find(name, *PLACING)
    module = host_of(cls)
    ids = torch.tensor([[1, IMAGE, IMAGE, VIDEO, 9, AUDIO], [IMAGE, 8, AUDIO, VIDEO, AUDIO, IMAGE]])
    for by_embedding in (False, True):
        want = placed(module, method, ids, by_embedding)
        with vlmfast.patch(module) as patch:
            assert f"{name}.{method}" in patch.replaced
            got = placed(module, method, ids, by_embedding)
        assert len(got) == len(want) > 0
        assert all(map(torch.equal, got, want))
        assert type(module) is cls
        if method != "inputs_merger":
            upstream = masks_of(module, method, None if by_embedding else ids, module.embed(ids))
            with vlmfast.patch(module):
                ours = masks_of(module, method, None if by_embedding else ids, module.embed(ids))
            assert {kind: mask.shape for kind, mask in ours.items()} == {k: m.shape for k, m in upstream.items()}


# ---- shuffles of classes that no tiny model has ----


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffle_moves_what_upstream_moves(name: str):
    cls, _ = find(name, "pixel_shuffle")
    module = host_of(cls)
    takes_map = "vision_features" in inspect.signature(cls.pixel_shuffle).parameters
    x = torch.randn(2, 4, 4, 32) if takes_map else torch.randn(2, 16, 32)

    def results() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        output = module.pixel_shuffle(leaf, 0.5 if takes_map else 2)
        grad = torch.linspace(-1, 1, output.numel()).view_as(output)
        return [output, *torch.autograd.grad(output, [leaf], grad)]

    want = results()
    with vlmfast.patch(module, only="*.pixel_shuffle"):
        assert all(map(torch.equal, results(), want))


# ---- the table ----


def test_each_body_has_a_class_here():
    """Every body is tested, except those of older releases, whose ``says`` ends with the release."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("not every body is in this transformers")
    here = {key for key, body in KNOWN.items() if not re.search(r" of \d+\.\d+$", body.says)}
    methods = {NORMS: ("forward",), ATTENTIONS: ("forward",), MASKS: PLACING, SHUFFLES: ("pixel_shuffle",)}
    found = [look_up(name, *methods[names]) for names in methods for name in names]
    seen = {source(*place).digest for place in found if place is not None}
    models = [
        tiny(model_type)[0] for model_type in {*MERGERS, *EACH_SHUFFLE, *DEEPSTACK, *TOWERS, *TILED, *LAYERED, "phi3"}
    ]
    seen |= {site.body.key for model in models for site in find_sites(model) if site.body is not None}
    assert {KNOWN[key].says for key in here - seen} == set()
