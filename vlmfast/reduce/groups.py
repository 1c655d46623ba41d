"""Groups of images or crops that can be reduced together: those of one size and method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


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
