"""A family: which methods of which classes are replaced in the models of one kind."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class Family:
    """One model family. Every module of this package that defines ``FAMILY`` adds one.

    Args:
        model_types: the values of ``config.model_type`` that it covers, those of the sub-models included.
        replace: site, "<model folder>.<Class>.<method>" of transformers -> a function with the same parameters.
        tiny: builds a small random model and its inputs, for tests and demonstrations.
    """

    model_types: tuple[str, ...]
    replace: Mapping[str, Callable[..., Any]]
    tiny: Callable[[], tuple[nn.Module, dict[str, Any]]]


@functools.cache
def families() -> Mapping[str, Family]:
    """Every family, by model type."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        module = importlib.import_module(info.name)
        if not hasattr(module, "FAMILY"):
            continue
        family: Family = module.FAMILY
        for model_type in family.model_types:
            if model_type in found:
                raise ValueError(f"two families claim the model type {model_type!r}")
            found[model_type] = family
    return found
