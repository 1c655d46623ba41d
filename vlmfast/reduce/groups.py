"""Groups of images or crops that can be reduced together: those of one size and method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def groups(kinds: Sequence[T]) -> list[tuple[T, list[int]]]:
    """Return each kind with the ascending numbers of its members; kinds need not be hashable, as methods may not be."""
    found: list[tuple[T, list[int]]] = []
    for number, kind in enumerate(kinds):
        for other, members in found:
            if other == kind:
                members.append(number)
                break
        else:
            found.append((kind, [number]))
    return found


def by_group(kinds: Sequence[T], compute: Callable[[T, list[int]], Iterable[R]]) -> list[R]:
    """Compute the members of each group together, given as ascending numbers, and return all in their order."""
    found: dict[int, R] = {}
    for kind, members in groups(kinds):
        found |= zip(members, compute(kind, members), strict=True)
    return [found[number] for number in range(len(kinds))]
