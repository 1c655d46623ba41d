"""The tiny models of the families, as the installed transformers has them."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from vlmfast.ops.rms_norm import rms_norm
from vlmfast.patches import Family, families
from vlmfast.patches.swap import PatchedModule

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("native", "torch")  # on x86 both add in the order of torch's own sums


def in_this_transformers(model_type: str) -> tuple:
    missing = model_type not in CONFIG_MAPPING
    return (pytest.mark.skipif(missing, reason=f"transformers {transformers.__version__} has no {model_type}"),)


EACH_FAMILY = [
    pytest.param(family, id=family.model_types[0], marks=in_this_transformers(family.model_types[0]))
    for family in dict.fromkeys(families().values())
]


def tiny(family: Family | str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = (families()[family] if isinstance(family, str) else family).tiny()
    return model.to(dtype), {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def rms_norms(model: nn.Module) -> list[nn.Module]:
    """Told by their names, so that a class that the tables forgot is found."""
    return [module for module in model.modules() if "RMSNorm" in type(module).__name__]


def patched(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PatchedModule)]


def state(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """The class and the attributes of every module."""
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


def require(backend: str) -> None:
    found = rms_norm.op.backend(backend)
    if isinstance(found, str):
        pytest.skip(found)


def assert_same(got: Tensor, want: Tensor, backend: str = "torch") -> None:
    """Bit-equal; where sums are in another order (native beyond x86), within one rounding of the largest value."""
    assert got.dtype == want.dtype
    if backend == "torch" or platform.machine() == "x86_64":
        assert torch.equal(got, want)
    else:
        assert (got - want).abs().max() <= torch.finfo(want.dtype).eps * want.abs().max()
