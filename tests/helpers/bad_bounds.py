"""Bounds of images in a row that kernels must refuse: on a GPU nobody else can look at them without waiting."""

import torch

TOKENS, CHOSEN = 10, 3
_SEQLENS = "cu_seqlens must rise from 0 to the tokens, by at most longest"
_KEPT = "cu_kept must rise from 0 to k, no faster than cu_seqlens"


def _bounds(seqlens: list[int], kept: list[int], longest: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    return torch.tensor(seqlens, dtype=torch.int32), torch.tensor(kept, dtype=torch.int32), longest


# (message, last arguments of a greedy op that chooses 3 of 10 tokens)
BAD_BOUNDS = [
    (_SEQLENS, _bounds([0, 4, 12], [0, 1, 3], 8)),
    (_SEQLENS, _bounds([0, 4, 9], [0, 1, 3], 6)),
    (_SEQLENS, _bounds([1, 4, 10], [0, 1, 3], 6)),
    (_SEQLENS, _bounds([0, 8, 4, 10], [0, 1, 2, 3], 8)),
    (_SEQLENS, _bounds([0, 4, 10], [0, 1, 3], 5)),
    (_KEPT, _bounds([0, 4, 10], [0, 1, 4], 6)),
    (_KEPT, _bounds([0, 4, 10], [0, 1, 2], 6)),
    (_KEPT, _bounds([0, 4, 10], [1, 1, 3], 6)),
    (_KEPT, _bounds([0, 4, 10], [0, 5, 3], 6)),
    (_KEPT, _bounds([0, 1, 10], [0, 2, 3], 9)),
]
