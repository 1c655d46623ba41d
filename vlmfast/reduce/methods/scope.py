"""SCOPE: tokens that cover all others, those with much attention first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlmfast.ops.greedy_selection import coverage
from vlmfast.reduce.methods.greedy_method import Call, GreedyMethod
from vlmfast.reduce.methods.method import check_power
from vlmfast.reduce.tokens import VisualTokens


@dataclass(frozen=True)
class SCOPE(GreedyMethod, name="scope"):
    """SCOPE (NeurIPS 2025): each time the token that adds most to how well all are covered, times its attention.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.
        alpha: the power of the attention that a token gets: with 0 it does not count.

    Raises:
        TypeError or ValueError: for an argument that is none of these.

    Source:
        SCOPE, on the rows of the tower, before the projector; in Qwen-VL, as in AngelSlim's port, behind the merger.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power("alpha", self.alpha)

    def call(self, tokens: VisualTokens) -> tuple[Any, Call]:
        """Return `coverage` on the cosines of the tokens, weighed by their attention."""
        rows = tokens.hidden.detach()
        unit = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=2)
        scores = tokens.scores().detach() if self.alpha else None
        quality = scores if scores is None or self.alpha == 1 else scores.pow(self.alpha)
        return coverage, {"similarity": unit @ unit.transpose(1, 2), "quality": quality}
