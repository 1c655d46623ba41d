"""Prompts with too few or too many placeholders, and dtypes that the ops refuse, are handled as upstream does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.patches_models import COMMON, cast, logits, tiny
from tests.helpers.tiny_models import IMAGE

NORMS = "*Norm*.forward"


@pytest.fixture(autouse=True)
def on_the_definition() -> Iterator[None]:
    with vlmfast.use("torch"):
        yield


def outcome(model: nn.Module, prompts: dict[str, Any]) -> Tensor | Exception:
    try:
        return logits(model, prompts)
    except (ValueError, RuntimeError) as error:
        return error


@pytest.mark.parametrize("model_type", COMMON)
def test_counts_that_do_not_match_are_an_error(model_type: str):
    """The message is upstream's where upstream counts; features that upstream ignores are ignored."""
    model, inputs = tiny(model_type)
    ids = inputs["input_ids"]
    first = ids.flatten().tolist().index(IMAGE)
    for token, position in ((10, first), (IMAGE, 0)):  # a placeholder too few, one too many
        changed = ids.clone()
        changed.view(-1)[position] = token
        prompts = {**inputs, "input_ids": changed}
        prompts.pop("mm_token_type_ids", None)  # otherwise upstream fails earlier, while it computes positions
        want = outcome(model, prompts)
        with vlmfast.patch(model, exclude=NORMS):
            got = outcome(model, prompts)
        if isinstance(want, Tensor):
            assert torch.equal(got, want)
        else:
            whole = "At least one sample has <image> tokens not divisible by patch_size"  # SmolVLM up to 5.17
            assert (whole if whole in str(want) else "Image features and image tokens do not match") in str(got)
            assert isinstance(got, ValueError)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava"])
def test_tower_of_another_dtype(model_type: str):
    model, inputs = tiny(model_type, torch.bfloat16)
    for name, part in model.named_modules():
        if name.endswith(("language_model", "lm_head")):
            part.float()
    want = logits(model, inputs)
    with vlmfast.patch(model, exclude=NORMS):
        assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize("model_type", COMMON)
def test_dtype_that_the_ops_do_not_take(model_type: str):
    """Every replacement falls back on upstream's code, also where the model is cast after the patch."""
    model, inputs = tiny(model_type)
    patch = vlmfast.patch(model)
    model.double()
    inputs = {name: cast(value, torch.float64) for name, value in inputs.items()}
    got = outcome(model, inputs)
    patch.undo()
    want = outcome(model, inputs)
    if not isinstance(want, Tensor):
        pytest.skip(f"upstream: {want}")
    assert torch.equal(got, want)
    assert want.dtype == torch.float64
