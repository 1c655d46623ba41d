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
from vlmfast.registry import Op

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
    """Choose from groups of images by an op: return the (B, k) positions of each group.

    One call chooses from all. Only where it would be the definition's each group has its own, because the definition
    pads all images to the size of the largest.

    Args:
        op: the op.
        calls: its arguments, of which the first is the (B, N, ...) tokens.
        counts: how many are chosen of each image of a group.
    """
    rows: list[Tensor] = [next(iter(call.values())) for call in calls]
    entry: Op = op.op
    run, each_k = accepting(op, rows[0]), [{**call, "k": k} for call, k in zip(calls, counts, strict=True)]
    if len(calls) == 1 or run is not op or any(_is_defined(entry, arguments) for arguments in each_k):
        return [run(**arguments) for arguments in each_k]
    each = [(shown.shape[1], k) for shown, k in zip(rows, counts, strict=True) for _ in range(len(shown))]
    ends, kept = ([0, *accumulate(numbers)] for numbers in zip(*each, strict=True))
    longest = max(tokens for tokens, _ in each)
    bounds = to_device(rows[0].device, *(torch.tensor(numbers, dtype=torch.int32) for numbers in (ends, kept)))
    del each_k  # so that each argument is freed when it is joined
    joined = {name: _joined(name, [call.pop(name) for call in calls], longest) for name in list(calls[0])}
    chosen = run(**joined, k=kept[-1], cu_seqlens=bounds[0], cu_kept=bounds[1], longest=longest)[0]
    found, begin = [], 0
    for shown, own in zip(rows, chosen.split([len(x) * k for x, k in zip(rows, counts, strict=True)]), strict=True):
        starts = begin + shown.shape[1] * torch.arange(len(shown), device=own.device)
        found.append(own.view(len(shown), -1) - starts[:, None])
        begin += len(shown) * shown.shape[1]
    return found


def _is_defined(entry: Op, arguments: Call) -> bool:
    """Tell whether the definition would run a call."""
    return entry.choose(entry.positional((), arguments)).name == "torch"


def _joined(name: str, values: Sequence[Any], longest: int) -> Any:
    """Join an argument of several groups: tokens in one row, those with a column for each token padded by zeros."""
    if not isinstance(values[0], Tensor):
        return values[0]
    if name == "row_weights":  # (B, N): a row for each image
        return torch.cat([F.pad(value, (0, longest - value.shape[1])) for value in values])
    flat = [value.flatten(0, 1) for value in values]
    if name != "similarity":
        return torch.cat(flat)[None]
    joined = flat[0].new_zeros(1, sum(map(len, flat)), longest)
    for place, own in zip(joined[0].split([len(own) for own in flat]), flat, strict=True):
        place[:, : own.shape[1]] = own
    return joined
