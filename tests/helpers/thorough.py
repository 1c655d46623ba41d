"""Choose the test parameters that only `make test-thorough` runs, because others exercise the same code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

INTERPRETED = ("triton", "emulated")  # where a call on the CPU takes up to a second
# Model types that add nothing: another type has each of their bodies (a test of the models checks this) and reduces its
# visual tokens in the same way.
REPEATED = {
    *("aria", "cohere2_vision", "deepseek_vl", "ernie4_5_vl_moe", "exaone4_5", "florence2", "fuyu", "gemma"),
    *("gemma3_text", "gemma3n_text", "glm46v", "glm4v_moe", "glm_ocr", "got_ocr2", "idefics2", "instructblip"),
    *("lighton_ocr", "llama", "mistral", "mistral3", "mixtral", "mllama", "nanochat", "ovis2", "paligemma", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe", "qwen3_moe", "qwen3_vl_moe"),
    *("step3p7", "video_llama_3", "vipllava"),
}


def first_of(values: Iterable[Any]) -> list:
    """One pytest parameter per value, of which all but the first are left to `make test-thorough`."""
    return [pytest.param(value, marks=[pytest.mark.thorough] if index else []) for index, value in enumerate(values)]


def is_thorough(item: pytest.Item) -> bool:
    """Tell whether a test is of a `REPEATED` type, or runs an interpreter in a dtype other than bfloat16."""
    given: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if given.get("model_type") in REPEATED:
        return True
    interpreted = given.get("place", ("cpu", given.get("backend"))) in [("cpu", backend) for backend in INTERPRETED]
    return interpreted and given.get("dtype", torch.bfloat16) != torch.bfloat16
