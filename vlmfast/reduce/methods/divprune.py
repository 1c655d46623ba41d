"""DivPrune and Cen-Prune: tokens that are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.ops.greedy_selection import farthest
from vlmfast.ops.greedy_selection.definition import SAME
from vlmfast.reduce.methods.greedy_method import Call, GreedyMethod
from vlmfast.reduce.tokens import VisualTokens


@dataclass(frozen=True)
class DivPrune(GreedyMethod, name="divprune"):
    """DivPrune (CVPR 2025): each time the token that is least like those chosen before; no attention is needed.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.
        centered: Cen-Prune: the mean of an image's tokens is subtracted, and tokens that are unlike all others get a
            larger weight.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither. TypeError: for a ``centered`` that is no bool.

    Source:
        DivPrune, on the tokens that the language model gets, image by image; its cosines are in the model's dtype, and
        it may choose a token twice. Cen-Prune as its paper says it.
    """

    centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.centered, bool):
            raise TypeError(f"centered must be a bool, got {self.centered!r}")

    def call(self, tokens: VisualTokens) -> tuple[Any, Call]:
        """Return `farthest` on the features, for Cen-Prune on the centred ones with their distinctiveness."""
        features = tokens.features()
        if not self.centered:
            return farthest, {"features": features}
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        centered = rows - rows.mean(1, keepdim=True)
        return farthest, {"features": centered, "quality": distinctiveness(rows), "first_by_quality": False}


def distinctiveness(rows: Tensor) -> Tensor:
    """Return how unlike the others of its image each token is, (B, N, D) -> (B, N), from 0 to 1.

    That is the mean of its cosines to the others, negated and scaled: the sum of a token's cosines is its dot product
    with the sum of all unit vectors, so no matrix is needed. If all means are equal, it is 1 for all tokens.
    """
    unit = F.normalize(rows, dim=2)
    alike = (unit * (unit.sum(1, keepdim=True) - unit)).sum(2) / max(rows.shape[1] - 1, 1)
    least, most = alike.aminmax(dim=1, keepdim=True)
    spread = most - least
    return torch.where(spread > SAME, (most - alike) / spread.clamp(min=SAME), 1.0)
