"""Measures of a choice of visual tokens that need no answers: the attention that it keeps, and its coverage."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.reduce.methods import Method
from vlmfast.reduce.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class Kept:
    """The measures of a choice.

    Attributes:
        attention: the share of the tower's attention that goes to the kept tokens.
        coverage: the mean over all tokens of the cosine to the nearest kept token.
        worst: the same over the 5 % of the tokens that are covered least.
    """

    attention: float
    coverage: float
    worst: float


def kept(tokens: VisualTokens, positions: Tensor) -> Kept:
    """Measure a choice.

    Args:
        tokens: of B images.
        positions: (B, k), those of the kept tokens, at least one of each image.
    """
    return kept_of_all([(tokens, positions)])


def kept_of_all(choices: Iterable[tuple[VisualTokens, Tensor]]) -> Kept:
    """Measure several choices together, such as those of crops with different numbers of tokens."""
    paid, cosines = [], []
    for tokens, positions in choices:
        scores = tokens.scores().double()
        paid.append(torch.stack([scores.gather(1, positions).sum(), scores.sum()]))
        unit = F.normalize(tokens.hidden.detach().float(), dim=2)
        chosen = unit.take_along_dim(positions[..., None], 1)
        cosines.append((unit @ chosen.mT).amax(2).flatten())
    part, whole = torch.stack(paid).sum(0).tolist()
    every = torch.cat(cosines).double().sort().values
    return Kept(part / whole, float(every.mean()), float(every[: max(1, len(every) // 20)].mean()))


def watched(method: Method) -> tuple[Method, list[tuple[VisualTokens, Selection]]]:
    """Return a copy of a method, and the list to which it appends the tokens that it gets and what it selects."""
    seen: list[tuple[VisualTokens, Selection]] = []

    def select(tokens: VisualTokens) -> Selection:
        selection = method.select(tokens)
        seen.append((tokens, selection))
        return selection

    noting = copy.copy(method)
    object.__setattr__(noting, "select", select)  # methods are frozen
    return noting, seen
