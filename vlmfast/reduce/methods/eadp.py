"""EADP: tokens that cover what the words of the question agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.ops.greedy_selection import coverage
from vlmfast.reduce.methods.greedy_method import Call, GreedyMethod
from vlmfast.reduce.methods.method import check_power
from vlmfast.reduce.methods.relevance import scaled, unlikeness
from vlmfast.reduce.text import Text
from vlmfast.reduce.tokens import Grid, VisualTokens

SHARPNESS = 100.0  # of the softmax over visual tokens, whose entropy ranks the words
WORDS = 0.2  # the share of the words that counts
WARMTH = 0.01 + 1e-6  # of the softmax over these words


@dataclass(frozen=True)
class EADP(GreedyMethod, name="eadp"):
    """EADP (ECCV 2026): tokens that cover all others, each as important as the words of the question say.

    The importance of a token is half by its cosine to the mean of the text, half by those to the fifth of the words
    whose cosines single out the fewest tokens; both count the less alike more, as in `CDPruner`. It is smoothed over
    the neighbours in the grid. The choice is `vlmfast.coverage` of the tokens that the language model gets.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.
        beta: the power of the importance.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither, or a ``beta`` that is no number of at least 0.
            ValueError: in a call, for a prompt without text.

    Source:
        EADP, with the embeddings of the language model, as its authors have it for Qwen; for LLaVA they use CLIP's.
        Importance is scaled in each image, or crop, and a crop has a budget of its own.
    """

    beta: float = 1.0
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power("beta", self.beta)

    def call(self, tokens: VisualTokens) -> tuple[Any, Call]:
        """Return `coverage` of the features, weighed by their importance for the text."""
        features = tokens.features()
        unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=2)
        weights = importance(features, tokens.text(), tokens.grid) ** self.beta
        return coverage, {"similarity": (1 + unit @ unit.mT) / 2, "row_weights": weights}


def importance(features: Tensor, text: Text, grid: Grid | None) -> Tensor:
    """(B, N), from 0 to 1: the importance of each token for the text."""
    whole = unlikeness(features, text.mean()[:, None])[..., 0]
    words, mask = unlikeness(features, text.embeddings), text.mask.to(features.device)
    shares = (SHARPNESS * words).softmax(1)
    entropy = (-shares * (shares + 1e-12).log()).sum(1).masked_fill(~mask, torch.inf)
    # the first of equal ones
    rank = entropy.argsort(dim=1, stable=True).argsort(dim=1)
    counted = rank < (mask.sum(1, keepdim=True) * WORDS).floor().clamp(min=1)
    weights = (-entropy / WARMTH).masked_fill(~counted, -torch.inf).softmax(1)
    local = (words * weights[:, None]).sum(2)
    return smoothed(scaled((whole + local) / 2), grid)


def smoothed(worth: Tensor, grid: Grid | None) -> Tensor:
    """(B, N): smoothed by a 3 x 3 Gaussian, if there is a grid of at least 2 x 2."""
    if grid is None or math.prod(grid) != worth.shape[1] or min(grid[1:]) < 2:
        return worth
    near = math.exp(-0.5)
    maps = F.pad(worth.view(-1, *grid), (1, 1, 1, 1), mode="reflect")
    maps = near * maps[..., :-2] + maps[..., 1:-1] + near * maps[..., 2:]
    maps = near * maps[..., :-2, :] + maps[..., 1:-1, :] + near * maps[..., 2:, :]
    return (maps / (1 + 2 * near) ** 2).reshape(worth.shape)
