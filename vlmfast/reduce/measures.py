"""What a choice of visual tokens keeps, by numbers that need no answer: of the attention, and of all that is seen."""

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
    """What a choice keeps.

    Attributes:
        attention: the share of the attention that the tokens get in the tower which is paid to the kept ones.
        coverage: the mean over all tokens of the cosine to the kept one that is most like it.
        worst: the same over the twentieth of the tokens that is covered least.
    """

    attention: float
    coverage: float
    worst: float


def kept(tokens: VisualTokens, positions: Tensor) -> Kept:
    """Measure a choice.

    Args:
        tokens: of B images.
        positions: (B, k) of those that are kept, at least one of each image.
    """
    return kept_of_all([(tokens, positions)])


def kept_of_all(choices: Iterable[tuple[VisualTokens, Tensor]]) -> Kept:
    """Measure choices together, such as those of crops of which a model shows other numbers of tokens."""
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
    """Return a copy of a method, and the list in which it notes what it was shown and what it chose."""
    seen: list[tuple[VisualTokens, Selection]] = []

    def select(tokens: VisualTokens) -> Selection:
        selection = method.select(tokens)
        seen.append((tokens, selection))
        return selection

    noting = copy.copy(method)
    object.__setattr__(noting, "select", select)  # methods are frozen
    return noting, seen
