"""Stand-alone attention modules of vision towers, and inputs with segments of many lengths."""

from __future__ import annotations

import importlib
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

CLASSES = (
    "qwen2_vl.VisionAttention",
    "qwen2_5_vl.Qwen2_5_VLVisionAttention",
    "qwen3_vl.Qwen3VLVisionAttention",
    "qwen3_5.Qwen3_5VisionAttention",
    "glm4v.Glm4vVisionAttention",
    "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention",
    "cohere_compass.CohereCompassVisionAttention",
)
QWEN = CLASSES[1]
HEADS, HEAD_DIM = 2, 8
WIDTH = HEADS * HEAD_DIM
LENGTHS = {
    "windows": [16] * 9,
    "windows with edges": [16, 16, 8, 16, 16, 8, 8, 8, 4],
    "images": [64, 64, 100, 36],
    "an image": [49],
    "an image twice": [25, 9, 25],
    "tokens": [1, 1, 1],
    **{f"drawn {n}": random.Random(n).choices([1, 2, 3, 8, 33], k=3 + n) for n in range(6)},
}
IMPLEMENTATIONS = ("sdpa", "eager")


def attention_of(name: str = QWEN, implementation: str = "sdpa", head_dim: int = HEAD_DIM) -> Any:
    """Make an attention module that has only the attributes that its forward reads."""
    folder, class_name = name.split(".")
    try:
        cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), class_name)
    except ModuleNotFoundError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    torch.manual_seed(0)
    width = HEADS * head_dim
    module.qkv, module.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    module.config = SimpleNamespace(_attn_implementation=implementation)
    module.num_heads, module.head_dim, module.num_key_value_groups = HEADS, head_dim, 1
    module.scaling, module.attention_dropout, module.is_causal = head_dim**-0.5, 0.0, False
    return module.eval()


def inputs_of(lengths: list[int], dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """Make the arguments that a block passes: tokens, ``cu_seqlens``, cos and sin."""
    torch.manual_seed(sum(lengths))
    angles = torch.randn(sum(lengths), head_dim // 2).repeat(1, 2)
    return {
        "hidden_states": torch.randn(sum(lengths), HEADS * head_dim, dtype=dtype),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "position_embeddings": (angles.cos(), angles.sin()),
    }


def results(module: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Return the output and the gradients of the input and of every weight."""
    leaf = inputs["hidden_states"].detach().clone().requires_grad_()
    output = module(**{**inputs, "hidden_states": leaf})
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, [leaf, *module.parameters()], grad)]
