"""The base of the methods whose choice is one call of a greedy op, for images of all sizes together."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.functions import accepting
from vlmfast.host import to_device
from vlmfast.reduce.methods.method import Method, PruningMethod
from vlmfast.reduce.tokens import Selection, VisualTokens

Call = dict[str, Any]  # the arguments of an op by name, without the number of tokens


@dataclass(frozen=True)
class GreedyMethod(PruningMethod):
    """A method that chooses by an op of `vlmfast.ops.greedy_selection`, in one call whatever the sizes of the images.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither.
    """

    trusted: ClassVar[bool] = True

    @abc.abstractmethod
    def call(self, tokens: VisualTokens) -> tuple[Any, Call]:
        """Return the op and its arguments for B images of N tokens, of which there is at least one."""

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        """Choose from the images of a size."""
        return self.choose_each([tokens], [k])[0]

    def choose_each(self, groups: Sequence[VisualTokens], counts: Sequence[int]) -> list[Tensor]:
        """Choose from images of several sizes, grouped by size: so many of each image of a group."""
        chosen = [torch.zeros(tokens.batch, 0, dtype=torch.int64, device=tokens.device) for tokens in groups]
        asked = [number for number, k in enumerate(counts) if k]
        if asked:
            ops, calls = zip(*(self.call(groups[number]) for number in asked), strict=True)
            found = _together(ops[0], calls, [counts[number] for number in asked])
            for number, positions in zip(asked, found, strict=True):
                chosen[number] = positions
        return chosen

    def select_each(self, groups: Sequence[VisualTokens], videos: bool = False) -> list[Selection]:
        """Decide for groups of images or videos, those of a group of one size, by one choice.

        One that decides otherwise, by a `choose`, `select` or `select_videos` of its own, does so group by group.
        """
        used = self.choose, self.select, self.select_videos
        plain = GreedyMethod.choose, Method.select, Method.select_videos
        if any(getattr(one, "__func__", one) is not other for one, other in zip(used, plain, strict=True)):
            return super().select_each(groups, videos)
        images = [tokens.by_frame() if videos else tokens for tokens in groups]
        budgets = [self.counts(tokens.count, tokens.has_cls, tokens.total, tokens.crops) for tokens in images]
        chosen = self.choose_each(images, [kept for kept, *_ in budgets])
        found = [self._selection(*each) for each in zip(images, chosen, budgets, strict=True)]
        return [one.of_videos(own.crops) for one, own in zip(found, groups, strict=True)] if videos else found


def _together(op: Any, calls: Sequence[Call], counts: Sequence[int]) -> list[Tensor]:
    """Run an op once for groups of images, each (B, N, ...): return the (B, k) positions of each group."""
    rows = [next(value for value in call.values() if isinstance(value, Tensor)) for call in calls]
    run = accepting(op, rows[0])
    if len(calls) == 1:
        return [run(**calls[0], k=counts[0])]
    each = [(shown.shape[1], k) for shown, k in zip(rows, counts, strict=True) for _ in range(len(shown))]
    ends, kept = ([0, *accumulate(numbers)] for numbers in zip(*each, strict=True))
    longest = max(tokens for tokens, _ in each)
    bounds = to_device(rows[0].device, *(torch.tensor(numbers, dtype=torch.int32) for numbers in (ends, kept)))
    joined = {name: _joined(name, [call[name] for call in calls], longest) for name in calls[0]}
    chosen = run(**joined, k=kept[-1], cu_seqlens=bounds[0], cu_kept=bounds[1], longest=longest)[0]
    found, begin = [], 0
    for shown, own in zip(rows, chosen.split([len(x) * k for x, k in zip(rows, counts, strict=True)]), strict=True):
        starts = begin + shown.shape[1] * torch.arange(len(shown), device=own.device)
        found.append(own.view(len(shown), -1) - starts[:, None])
        begin += len(shown) * shown.shape[1]
    return found


def _joined(name: str, values: Sequence[Any], longest: int) -> Any:
    """Join an argument of several groups: tokens in one row, those with a column for each token padded by zeros."""
    if not isinstance(values[0], Tensor):
        return values[0]
    if name in ("similarity", "row_weights"):
        values = [F.pad(value, (0, longest - value.shape[-1])) for value in values]
    if name == "row_weights":  # (B, N): a row for each image
        return torch.cat(list(values))
    return torch.cat([value.flatten(0, 1) for value in values])[None]
