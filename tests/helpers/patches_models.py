"""The tiny models that the installed transformers has, and which of their methods a patch replaces."""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from tests.helpers.tiny_images import LLAVA
from tests.helpers.tiny_patches import QWEN
from tests.helpers.tiny_types import SINCE, build, deep
from vlmfast.ops.masked_rows import deepstack_add, place_embeddings
from vlmfast.ops.pixel_shuffle import pixel_shuffle
from vlmfast.ops.rms_norm import rms_norm
from vlmfast.patches import merger
from vlmfast.patches.plan import find_sites
from vlmfast.patches.swap import PatchedModule

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("torch", "native")  # on x86 both sum in the order of torch's own sums
# Models for which a patch is tested fully, with images of any number and size. The others are only run.
COMMON = (*(name for name in QWEN if name != "qwen2_5_omni"), *LLAVA, "internvl", "idefics3", "smolvlm", "llama4")
METHODS = ("_deepstack_process", "get_placeholder_mask", "inputs_merger", "pixel_shuffle")
NORMS = ("RMSNorm", "L2Norm")
# Parts of the names of classes with a known ``forward``.
NAMES = (*NORMS, "PixelShuffle", "PatchMerger", "InternVLMultiModalProjector")
# Parts of Qwen's vision towers. Up to transformers 4.57 a tower computes its positions by a method of its own.
TOWERS = re.compile(r"VisionAttention|Qwen.*Vision(Attention|Model|Encoder|TransformerPretrainedModel)")
# Decoder layers and gated MLPs. Mixture-of-experts layers of 4.57 are not known, nor is that of Qwen3.5.
ALIKE = "Llama|Mistral|Gemma|Qwen2|Qwen3|Qwen2VL|Qwen2_5_VL|Qwen3VLText"
LAYERS = re.compile(rf"({ALIKE}|Qwen3_5|Qwen3VLMoeText|Qwen3OmniMoeThinkerText)(DecoderLayer|MLP)")
LAYERS_457 = re.compile(rf"({ALIKE})(DecoderLayer|MLP)|Qwen3VLMoeTextMLP|Qwen3OmniMoeThinkerTextMLP")


def is_new_enough(model_type: str) -> bool:
    """Tell whether the installed transformers is new enough for the tiny model of that type."""
    return Version(transformers.__version__) >= Version(SINCE.get(model_type, "0"))


def skip_unless_known(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if not is_new_enough(model_type):
        pytest.skip(f"the tiny {model_type} needs transformers {SINCE[model_type]}")


def tiny(model_type: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    skip_unless_known(model_type)
    model, inputs = build(model_type) if layers == 2 else deep(model_type, layers)
    return model.to(dtype), {name: cast(value, dtype) for name, value in inputs.items()}


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def rms_norms(model: nn.Module) -> list[nn.Module]:
    """Return the RMSNorms by their class names, so that a class missing from the table of bodies is found."""
    return [module for module in model.modules() if any(name in type(module).__name__ for name in NORMS)]


def _has_angles(cls: type) -> bool:
    """Tell whether a decoder's attention takes cos and sin; Llama 4's takes complex numbers."""
    if cls.__name__ == "Llama4TextAttention":
        return False
    parameters = inspect.signature(cls.forward).parameters
    return {"position_embeddings", "past_key_values"} <= parameters.keys()


def replaceable(model: nn.Module) -> list[nn.Module]:
    """Return every module of a `COMMON` model that should get a replacement, by names of classes and methods."""

    layers = LAYERS if Version(transformers.__version__) >= Version("5") else LAYERS_457

    def known(cls: type) -> bool:
        named = any(name in cls.__name__ for name in NAMES) or TOWERS.fullmatch(cls.__name__)
        named = named or layers.fullmatch(cls.__name__) or cls.__name__ == "Qwen3_5MoeMLP"
        named = named or (cls.__name__.endswith("Attention") and hasattr(cls, "forward") and _has_angles(cls))
        return any(hasattr(cls, method) for method in METHODS) or (bool(named) and not hasattr(cls, "rot_pos_emb"))

    return [module for module in model.modules() if known(type(module))]


def sites_of(model: nn.Module, replacements: ModuleType) -> list[str]:
    """Return the sites of a model whose replacement is a function of this module of vlmfast.patches."""
    return sorted({site.name for site in find_sites(model) if _gets(site.body and site.body.function, replacements)})


def places_of(model: nn.Module, replacements: ModuleType) -> list[tuple[nn.Module, str]]:
    """Return (module, method) pairs, patched or not, whose replacement is in this module of vlmfast.patches."""
    found = [
        (module, site.method)
        for site in find_sites(model)
        if _gets(site.body and site.body.function, replacements)
        for module in site.modules
    ]
    for module in patched(model):
        methods = type(module).replacements
        found += [(module, method) for method in methods if _gets(vars(type(module))[method], replacements)]
    return found


def _gets(function: Callable[..., Any] | None, replacements: ModuleType) -> bool:
    return function is not None and function.__module__ == replacements.__name__


def exact(model: nn.Module) -> dict[str, list[str]]:
    """Exclude the mergers, since each backend sums a LayerNorm in its own order; test_merger.py bounds their error."""
    return {"exclude": sites_of(model, merger)}


def patched(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PatchedModule)]


def state(model: nn.Module) -> dict[str, tuple[type, dict[str, int]]]:
    """Return the class and the attributes of every module."""
    return {
        name: (type(module), {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def require(backend: str) -> str:
    """Return the name of the backend; skip the test where it is not available."""
    for function in (rms_norm, deepstack_add, place_embeddings, pixel_shuffle):
        found = function.op.backend(backend)
        if isinstance(found, str):
            pytest.skip(found)
    return backend


def assert_same(got: Tensor, want: Tensor, backend: str = "torch") -> None:
    """Check bit-equality or, where sums have another order (native, not on x86), one rounding of the largest value."""
    assert got.dtype == want.dtype
    if backend == "torch" or platform.machine() == "x86_64":
        assert torch.equal(got, want)
    else:
        assert (got - want).abs().max() <= torch.finfo(want.dtype).eps * want.abs().max()


def llava_processor() -> transformers.LlavaProcessor:
    """Make a processor for the tiny LLaVA: one word per token id, and images of 4 x 4 patches."""
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
