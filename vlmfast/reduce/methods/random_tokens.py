"""A random choice of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.reduce.methods.method import PruningMethod
from vlmfast.reduce.tokens import VisualTokens


@dataclass(frozen=True)
class RandomTokens(PruningMethod, name="random"):
    """A random choice: the baseline that a method has to beat.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.
        seed: the same seed chooses the same tokens at every call.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither.
    """

    seed: int = 0

    def score(self, tokens: VisualTokens) -> Tensor:
        """Draw numbers on the CPU, so that every device has the same."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(tokens.batch, tokens.count, generator=generator).to(tokens.device)
