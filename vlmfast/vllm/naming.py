"""The name of a reduced model: its own architecture, and the method in its configuration.

Both override the Hugging Face configuration, which vLLM sends to every process and machine.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from vlmfast.reduce.methods import LayerMethod, Method, told
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.spelling import parse, spell_call

KEY = "vlmfast_reduce"  # in the configuration, and in mm_processor_kwargs of a request
PREFIX = "Vlmfast"

# vLLM's architecture -> our module of its reduced model
ARCHITECTURES = {
    "InternVLForConditionalGeneration": "internvl",
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_next",
    "Qwen2_5_VLForConditionalGeneration": "qwen",
    "Qwen3VLForConditionalGeneration": "qwen",
    "Qwen3VLMoeForConditionalGeneration": "qwen",
    "Qwen3_5ForConditionalGeneration": "qwen",
    "Qwen3_5MoeForConditionalGeneration": "qwen",
}
# of models that cut images into crops: the packings of a method that leave a number of tokens known from the size
PACKINGS = {
    "LlavaNextForConditionalGeneration": ("published", "whole"),
    "LlavaOnevisionForConditionalGeneration": ("whole",),
}
# those whose videos are reduced -> how the tokens of their frames stand: together, or apart, with text between them, or
# as tiles, which are reduced as those of images are, and which Hugging Face's model does not tell from these
VIDEOS = {
    "InternVLForConditionalGeneration": "tiles",
    "LlavaOnevisionForConditionalGeneration": "together",
    "Qwen2_5_VLForConditionalGeneration": "together",
    "Qwen3VLForConditionalGeneration": "apart",
    "Qwen3VLMoeForConditionalGeneration": "apart",
    "Qwen3_5ForConditionalGeneration": "apart",
    "Qwen3_5MoeForConditionalGeneration": "apart",
}


def reduced(method: str | Method, model: str) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` that reduce the visual tokens of each image, and of each video.

    Args:
        method: such as ``vlmfast.VisionZip(54, 10)``, or its text, see `vlmfast.reduce.spelling.parse`.
        model: a folder, the name of a repository, or one of vLLM's architectures.

    Raises:
        TypeError or ValueError: for a method or a model that cannot be served reduced.
    """
    text = method if isinstance(method, str) else spell_call(checked(method))
    architecture = model if model in ARCHITECTURES else _architecture(model)
    configured_method(architecture, text)
    return {"hf_overrides": {"architectures": [PREFIX + architecture], KEY: text}}


def server_arguments(method: str | Method, model: str) -> list[str]:
    """Return the same for the command line of vLLM's server, ``["--hf-overrides", JSON]``."""
    return ["--hf-overrides", json.dumps(reduced(method, model)["hf_overrides"], separators=(",", ":"))]


@functools.cache
def configured_method(architecture: str, text: object) -> Method:
    """Return the method of a configuration, whose text may name a class of any module.

    Raises:
        ValueError: as `reduced`, with the setting that is wrong.
    """
    if not isinstance(text, str):
        raise ValueError(f'hf_overrides must have {KEY}, a method such as "visionzip:54+10", got {text!r}')
    return fitting(architecture, parse(text, kind=None, trusted=True))


@functools.lru_cache(256)
def requested_method(architecture: str, text: str) -> Method:
    """Return the method that a request names: one of vlmfast's own.

    Raises:
        ValueError: for anything else, with what it may be.
    """
    return fitting(architecture, parse(text, kind=None))


def fitting(architecture: str, method: object) -> Method:
    """Return the method if it leaves a number of tokens that is known before an image, or a video, is encoded.

    Raises:
        TypeError or ValueError: if it does not.
    """
    found = checked(method)
    name = architecture.removeprefix(PREFIX)
    videos = VIDEOS.get(name)
    if "image" not in found.takes and videos in (None, "tiles"):
        taken = "takes frames as tiles of images" if videos else "takes none in vLLM"
        raise ValueError(f"{found} reduces videos, and {name} {taken}: use a method for images")
    if "video" in found.takes and not by_frame(found) and videos == "apart":
        raise ValueError(
            f"{found} chooses how many tokens each frame of a video keeps, and {name} has text before each frame, so "
            f"that vLLM must know each number before the video is encoded: use a method that reduces frame by frame"
        )
    packings = PACKINGS.get(name)
    if packings and "image" in found.takes and getattr(found, "packing", "model") not in packings:
        raise ValueError(
            f"{found}: how many tokens are left depends on the picture where {name} packs crops that were reduced, as "
            f"chosen padding is left out, and vLLM must know before: use VisionZip, or a class of your own, with "
            f"packing={' or '.join(map(repr, packings))}"
        )
    return found


def checked(method: object) -> Method:
    """Return the method if it is one before the language model.

    Raises:
        TypeError or ValueError: if it is not.
    """
    if isinstance(method, LayerMethod):
        raise ValueError(f"{method} cuts between layers of the language model, whose paged cache holds all or none")
    if not isinstance(method, Method):
        raise TypeError(f"method must be a vlmfast.reduce.Method or its text, got {told(method)}")
    if isinstance(method, SmallerImage):
        raise ValueError(f"{method} changes the picture, not its tokens: give vLLM's processor a smaller picture")
    if method.reads_text:
        raise ValueError(
            f"{method} chooses by the question, and vLLM encodes an image without one, and keeps it for others: use a "
            f"method that does not read the text"
        )
    return method


def by_frame(method: Method) -> bool:
    """Tell whether a method reduces each frame of a video for itself, so that all have equally many tokens left."""
    return type(method).select_videos is Method.select_videos


def _architecture(model: str) -> str:
    from transformers import AutoConfig

    names = getattr(AutoConfig.from_pretrained(model), "architectures", None) or []
    known = [name for name in names if name in ARCHITECTURES]
    if not known:
        raise ValueError(f"the model must be one of {', '.join(ARCHITECTURES)}, got {', '.join(names) or 'no name'}")
    return str(known[0])
