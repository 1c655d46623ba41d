"""The published models of the benchmarks, as small as what they launch allows."""

from __future__ import annotations

import dataclasses

from vlmfast.benchmarks.published import MODELS, Published

SMALLER_IMAGES = {
    "qwen2.5-vl-7b": {"pixels": (16 * 16, 3 * 2 * 14 * 14), "beside": {"image_grid_thw": [[1, 16, 16]]}},
    "qwen3-vl-8b": {"pixels": (16 * 16, 3 * 2 * 16 * 16), "beside": {"image_grid_thw": [[1, 16, 16]]}},
    "internvl3-8b": {"pixels": (2, 3, 448, 448)},
    "smolvlm-256m": {"pixels": (1, 2, 3, 512, 512)},
}


def little(name: str) -> Published:
    """Make the model as narrow as it is counted, with two layers and a smaller image, as its small size too."""
    model = MODELS[name]
    depth = {"depth": 2} if "depth" in model.vision else {"num_hidden_layers": 3}  # LLaVA uses the last but one
    if "deepstack_visual_indexes" in model.vision:
        depth["deepstack_visual_indexes"] = [0, 1]
    result = dataclasses.replace(model, text={**model.text, "num_hidden_layers": 2}, vision={**model.vision, **depth})
    text, vision = result._narrow()
    return dataclasses.replace(result, small_text=text, small_vision=vision, **SMALLER_IMAGES.get(name, {}))
