"""Tokens at even distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.reduce.methods.method import PruningMethod
from vlmfast.reduce.tokens import VisualTokens


@dataclass(frozen=True)
class EvenTokens(PruningMethod, name="even"):
    """Every n-th token in raster order.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither.
    """

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        """Choose position ``i * N // k`` for each i."""
        positions = torch.arange(k) * tokens.count // max(k, 1)
        return positions.expand(tokens.batch, -1)
