"""Configurations of published models, with random weights, and of smaller versions of each.

"full" has the published shapes. "small" is scaled down for two CPU cores: it has the same number of tokens, and its
widths give the language model and the vision tower about the shares of the time that they have in the published model.
"narrow" has all layers but few channels, since launches do not depend on the width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce import Method, VisionZip

WORDS = 32  # text tokens in the prompt, besides the image
SIZES = ("full", "small", "narrow")
IMAGE, VIDEO, VISION_START, VISION_END = 3, 4, 5, 6  # token ids
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_TOKENS |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}


@dataclass(frozen=True)
class Published:
    """One published model.

    Attributes:
        model_type: as in transformers.
        text: the configuration of the language model.
        vision: the configuration of the vision tower.
        rest: the remaining configuration of the whole model.
        small_text: overrides of ``text`` for size "small".
        small_vision: overrides of ``vision`` for size "small".
        pixels: the shape of the ``pixel_values`` that the processor makes of one image.
        method: how its visual tokens are reduced, or the text of that; None where they cannot be.
        beside: further outputs of the processor, as lists.
    """

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    rest: dict[str, Any]
    small_text: dict[str, Any]
    small_vision: dict[str, Any]
    pixels: tuple[int, ...]
    method: Method | str | None = None
    beside: dict[str, list[list[int]]] = field(default_factory=dict)

    def build(
        self, size: str, dtype: torch.dtype, device: str, layers: int | None = None
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Build the model of one of the `SIZES` in evaluation mode, and the inputs of one prompt with one image.

        ``layers`` is the number of the language model's layers, if it is not that of the size.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText

        smaller = {"full": ({}, {}), "small": (self.small_text, self.small_vision), "narrow": self._narrow()}
        text = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **self.text, **smaller[size][0]}
        text["num_hidden_layers"] = layers or text["num_hidden_layers"]
        vision = {**self.vision, **smaller[size][1]}
        if self.model_type.startswith("qwen"):
            vision["out_hidden_size"] = text["hidden_size"]
        config = AutoConfig.for_model(self.model_type, text_config=text, vision_config=vision, **self.rest)
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        return model, self._inputs(model, dtype, device)

    def _narrow(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return both configurations with few channels; with fewer than two heads, copies would become views."""
        grouped = self.text["num_key_value_heads"] < self.text["num_attention_heads"]
        text = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2 if grouped else 4}
        if "head_dim" in self.text:
            text["head_dim"] = 16
        if scaling := self.text.get("rope_scaling"):
            text.update(mrope([4, 2, 2], **{k: v for k, v in scaling.items() if k == "mrope_interleaved"}))
        heads = "num_heads" if "num_heads" in self.vision else "num_attention_heads"
        vision = {"hidden_size": 32, "intermediate_size": 48, heads: 2}
        return {**text, "intermediate_size": 96, "vocab_size": 64}, vision

    def _inputs(self, model: Any, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        pixels = torch.randn(self.pixels, generator=torch.Generator().manual_seed(0))
        image = {"pixel_values": pixels.to(device, dtype)}
        image |= {name: torch.tensor(value, device=device) for name, value in self.beside.items()}
        with torch.no_grad():  # the model itself tells how many placeholders the image needs
            encoded = model.model.get_image_features(**image, return_dict=True).pooler_output
        visual = sum(rows.shape[:-1].numel() for rows in encoded)
        words = list(range(10, 10 + WORDS))
        ids = [words[0], VISION_START, *[IMAGE] * visual, VISION_END, *words[1:]]
        inputs = {"input_ids": torch.tensor([ids], device=device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.model_type.startswith("qwen"):
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return {**inputs, **image}


def text_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return only the text behind the image of a prompt."""
    return {name: inputs[name][:, 1 - WORDS :] for name in ("input_ids", "attention_mask")}


def _vit(hidden: int, layers: int, heads: int, mlp: int, **rest: Any) -> dict[str, Any]:
    layer = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": mlp}
    return {"num_hidden_layers": layers, **layer, **rest}


def qwen_vit(hidden: int, layers: int, heads: int, mlp: int, **rest: Any) -> dict[str, Any]:
    """Make the configuration of a vision tower of Qwen-VL."""
    return {"depth": layers, "hidden_size": hidden, "num_heads": heads, "intermediate_size": mlp, **rest}


def llama(hidden: int, layers: int, heads: int, kv: int, mlp: int, **rest: Any) -> dict[str, Any]:
    """Make the configuration of a language model."""
    return _vit(hidden, layers, heads, mlp, num_key_value_heads=kv, max_position_embeddings=32768, **rest)


def mrope(section: list[int], **rest: Any) -> dict[str, Any]:
    """Make the configuration of M-RoPE, in keys that every supported transformers reads."""
    return {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default", "mrope_section": section, **rest}}


SMALL_TEXT = llama(1024, 4, 8, 8, 2752, vocab_size=4096)
SMALL_GROUPED = {**SMALL_TEXT, "num_key_value_heads": 2}
SMALL_VIT = _vit(192, 6, 3, 768)
CLIP = _vit(1024, 24, 16, 4096, model_type="clip_vision_model", image_size=336, patch_size=14, projection_dim=768)
VICUNA = llama(4096, 32, 32, 32, 11008, model_type="llama", vocab_size=32064)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

MODELS = {
    "llava-1.5-7b": Published(
        "llava",
        VICUNA,
        CLIP,
        {"image_token_index": IMAGE},
        SMALL_TEXT,
        SMALL_VIT,
        (1, 3, 336, 336),
        VisionZip(dominant=54, contextual=10),
    ),
    "llava-next-7b": Published(
        "llava_next",
        VICUNA,
        CLIP,
        {"image_token_index": IMAGE, "image_grid_pinpoints": PINPOINTS},
        SMALL_TEXT,
        SMALL_VIT,
        (1, 5, 3, 336, 336),
        VisionZip(dominant=27, contextual=5),
        {"image_sizes": [[672, 672]]},
    ),
    "qwen2.5-vl-7b": Published(
        "qwen2_5_vl",
        llama(3584, 28, 28, 4, 18944, vocab_size=152064, **mrope([16, 24, 24])),
        qwen_vit(1280, 32, 16, 3420, patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
        QWEN_TOKENS,
        SMALL_GROUPED,
        qwen_vit(160, 4, 2, 432, fullatt_block_indexes=[3]),
        (64 * 64, 3 * 2 * 14 * 14),
        VisionZip(dominant=0.09, contextual=0.01),
        {"image_grid_thw": [[1, 64, 64]]},
    ),
    "qwen3-vl-8b": Published(
        "qwen3_vl",
        llama(4096, 36, 32, 8, 12288, head_dim=128, vocab_size=151936) | mrope([24, 20, 20], mrope_interleaved=True),
        qwen_vit(1152, 27, 16, 4304, patch_size=16, num_position_embeddings=2304)
        | {"deepstack_visual_indexes": [8, 16, 24]},
        QWEN_TOKENS,
        SMALL_GROUPED,
        qwen_vit(144, 4, 2, 432, deepstack_visual_indexes=[1, 2, 3]),
        (64 * 64, 3 * 2 * 16 * 16),
        VisionZip(dominant=0.09, contextual=0.01),
        {"image_grid_thw": [[1, 64, 64]]},
    ),
    "internvl3-8b": Published(
        "internvl",
        llama(3584, 28, 28, 4, 18944, model_type="qwen2", vocab_size=151674),
        _vit(1024, 24, 16, 4096, image_size=[448, 448], patch_size=[14, 14], attention_bias=True),
        {"image_token_id": IMAGE, "downsample_ratio": 0.5},
        SMALL_GROUPED,
        SMALL_VIT,
        (5, 3, 448, 448),
        VisionZip(dominant=0.2, contextual=0.05),
    ),
    "smolvlm-256m": Published(
        "smolvlm",
        llama(576, 30, 9, 3, 1536, model_type="llama", vocab_size=49280),
        _vit(768, 12, 12, 3072, image_size=512, patch_size=16),
        {"image_token_id": IMAGE, "scale_factor": 4, "pad_token_id": 0},
        {"num_hidden_layers": 10, "vocab_size": 4096},
        _vit(192, 4, 3, 768),
        (1, 17, 3, 512, 512),
    ),
}
