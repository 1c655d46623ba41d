"""Tiny models, as the installed transformers has them."""

from __future__ import annotations

import platform
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from tests.helpers.tiny_types import SINCE, build
from vlmfast.ops.masked_rows import deepstack_add, place_embeddings
from vlmfast.ops.pixel_shuffle import pixel_shuffle
from vlmfast.ops.rms_norm import rms_norm
from vlmfast.patches import merger
from vlmfast.patches.plan import Site, find_sites
from vlmfast.patches.swap import PatchedModule

DTYPES = (torch.float32, torch.bfloat16)
NAMES = (
    "RMSNorm",
    "PixelShuffle",
    "PatchMerger",
    "InternVLMultiModalProjector",
)  # parts of the names of classes whose ``forward`` is replaced
BACKENDS = ("native", "torch")  # on x86 both add in the order of torch's own sums


EACH_TYPE = (  # those whose every site is tested by itself
    "idefics3",
    "internvl",
    "llama",
    "llama4",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "vipllava",
)


def skip_unless_known(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if Version(transformers.__version__) < Version(SINCE.get(model_type, "0")):
        pytest.skip(f"the tiny {model_type} needs transformers {SINCE[model_type]}")


def tiny(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    skip_unless_known(model_type)
    model, inputs = build(model_type)
    return model.to(dtype), {name: cast(value, dtype) for name, value in inputs.items()}


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def rms_norms(model: nn.Module) -> list[nn.Module]:
    """Told by their names, so that a class that the tables forgot is found."""
    return [module for module in model.modules() if "RMSNorm" in type(module).__name__]


def replaceable(model: nn.Module) -> list[nn.Module]:
    """Every module with a method that the tables are about; told by names as well."""
    methods = ("_deepstack_process", "get_placeholder_mask", "inputs_merger", "pixel_shuffle")

    def known(cls: type) -> bool:
        return any(name in cls.__name__ for name in NAMES) or any(hasattr(cls, method) for method in methods)

    return [module for module in model.modules() if known(type(module))]


def known_sites(model: nn.Module, *modules: ModuleType) -> list[Site]:
    """Those whose replacement one of these modules defines, or all."""
    found = [site for site in find_sites(model) if site.body is not None and site.body.function is not None]
    names = [module.__name__ for module in modules]
    return [site for site in found if not modules or site.body.function.__module__ in names]


def exact_sites(model: nn.Module) -> list[str]:
    """Without the mergers: each backend sums a LayerNorm in its own order; test_merger.py bounds the error."""
    inexact = known_sites(model, merger)
    return [site.name for site in known_sites(model) if site not in inexact]


def patched(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PatchedModule)]


def state(model: nn.Module) -> dict[str, tuple[type, dict[str, int]]]:
    """The class and the attributes of every module."""
    return {
        name: (type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def require(backend: str) -> None:
    for function in (rms_norm, deepstack_add, place_embeddings, pixel_shuffle):
        found = function.op.backend(backend)
        if found.absent:
            pytest.skip(found.absent)


def assert_same(got: Tensor, want: Tensor, backend: str = "torch") -> None:
    """Bit-equal; where sums are in another order (native beyond x86), within one rounding of the largest value."""
    assert got.dtype == want.dtype
    if backend == "torch" or platform.machine() == "x86_64":
        assert torch.equal(got, want)
    else:
        assert (got - want).abs().max() <= torch.finfo(want.dtype).eps * want.abs().max()


def llava_processor() -> transformers.LlavaProcessor:
    """What belongs to the tiny LLaVA: a word for each of its ids, and images of 4 x 4 patches."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "describe", "this", *(f"word{number}" for number in range(57))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    image_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return transformers.LlavaProcessor(
        image_processor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            padding_side="left",
            additional_special_tokens=["<image>"],
            model_input_names=["input_ids", "attention_mask"],
        ),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
