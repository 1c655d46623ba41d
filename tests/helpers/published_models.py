"""The published models of the benchmarks, made as small as possible without changing what they launch."""

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
    """Return the model with its "narrow" widths, few layers and a smaller image; size "small" is the same."""
    model = MODELS[name]
    # LLaVA takes the features of the last layer but one.
    depth = {"depth": 2} if "depth" in model.vision else {"num_hidden_layers": 3}
    if "deepstack_visual_indexes" in model.vision:
        depth["deepstack_visual_indexes"] = [0, 1]
    result = dataclasses.replace(model, text={**model.text, "num_hidden_layers": 2}, vision={**model.vision, **depth})
    text, vision = result._narrow()
    return dataclasses.replace(result, small_text=text, small_vision=vision, **SMALLER_IMAGES.get(name, {}))
