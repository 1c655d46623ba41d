"""A user's method, in a module of theirs, that every process of vLLM imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfast.reduce import PruningMethod, VisualTokens


@dataclass(frozen=True)
class Last(PruningMethod):
    """The last tokens of an image. Videos stay as they are."""

    takes: ClassVar[tuple[str, ...]] = ("image",)

    def choose(self, tokens: VisualTokens, k: int) -> torch.Tensor:
        return torch.arange(tokens.count - k, tokens.count).expand(tokens.batch, -1)
