"""The columns of short prompts, on small cases written out."""

from __future__ import annotations

import pytest
import torch

from vlmfast.reduce.columns import Columns, drop_columns, new_images, without_gaps
from vlmfast.reduce.reduced_image import ReducedImage

PAD, V = 0, 3
MISMATCH = "Image features and image tokens do not match"


def image(columns: list[int], total: int) -> ReducedImage:
    return ReducedImage(
        torch.zeros(len(columns), 2), torch.tensor(columns, dtype=torch.int64), total, (), (1, total), (), ()
    )


def short(rows: list[list[int]], *images: ReducedImage) -> list[list[int]]:
    ids = torch.tensor(rows)
    return drop_columns(ids != PAD, (ids == V, images)).take(ids, PAD).tolist()


@pytest.mark.parametrize(
    ("rows", "images", "want"),
    [
        ([[7, V, V, V, 8]], [image([0, 2], 3)], [[7, V, V, 8]]),
        ([[7, V, V, 8]], [image([], 2)], [[7, 8]]),
        ([[0, 7, V, V], [8, V, V, V]], [image([1], 2), image([0, 1, 2], 3)], [[0, 0, 7, V], [8, V, V, V]]),
        ([[0, 0, 0, 7], [8, V, V, V]], [image([0], 3)], [[0, 7], [8, V]]),
        ([[7, 0, 0, 0], [8, V, V, V]], [image([0], 3)], [[7, 0], [8, V]]),
        ([[7, V, V, 0], [8, V, V, 9]], [image([0], 2), image([], 2)], [[7, V], [8, 9]]),
        ([[0, 7, V, V, 0], [8, V, V, 9, 5]], [image([0], 2), image([0], 2)], [[0, 0, 7, V], [8, V, 9, 5]]),
        ([[7, 8, 9], [0, 0, 7]], [], [[7, 8, 9], [0, 0, 7]]),
        ([[0, 7, V, V], [0, 8, V, V]], [image([0, 1], 2), image([0, 1], 2)], [[0, 7, V, V], [0, 8, V, V]]),
        ([[7, V, V, 0], [8, 9, 0, 0]], [image([0, 1], 2)], [[7, V, V, 0], [8, 9, 0, 0]]),
    ],
)
def test_columns(rows: list[list[int]], images: list[ReducedImage], want: list[list[int]]):
    assert short(rows, *images) == want


def test_a_masked_image_stays_where_it_is():
    ids = torch.tensor([[7, 8, V, V, 9], [V, V, 9, 7, 8]])
    mask = torch.tensor([[True, True, False, False, False], [False, False, False, True, True]])
    columns = drop_columns(mask, (ids == V, [image([1], 2), image([0], 2)]))
    assert columns.take(ids, PAD).tolist() == [[7, 8, V], [V, 7, 8]]
    assert columns.take(mask.long(), 0).tolist() == [[1, 1, 0], [0, 1, 1]]


def test_a_gap_of_the_callers_own_stays():
    ids = torch.tensor([[7, 8, V, V, 9]])
    mask = torch.tensor([[True, False, True, True, True]])
    columns = drop_columns(mask, (ids == V, [image([1], 2)]))
    assert columns.index.tolist() == [[0, 1, 3, 4]]
    assert columns.take(mask.long(), 0).tolist() == [[1, 0, 1, 1]]


def test_two_prompts_one_after_the_other():
    first = drop_columns(torch.ones(1, 3, dtype=torch.bool), (torch.tensor([[False, True, True]]), [image([1], 2)]))
    both = first.then(Columns.all(torch.zeros(1, 2))).select(torch.tensor([0, 0]))
    assert both.index.tolist() == [[0, 2, 3, 4]] * 2
    assert (both.total, both.dropped) == (5, 1)
    assert both.take(torch.arange(20).view(2, 2, 5), 9).tolist() == [
        [[0, 2, 3, 4], [5, 7, 8, 9]],
        [[10, 12, 13, 14], [15, 17, 18, 19]],
    ]


def test_positions_are_counted_on():
    present = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0, 1]]).bool()
    index = present.nonzero()[:, 1][None]
    columns = Columns(index, torch.ones_like(index, dtype=torch.bool), 9)
    plain = torch.arange(9)[None]
    assert without_gaps(plain, columns).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert without_gaps(plain + 5, columns).tolist() == [[5, 6, 7, 8, 9, 10]]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert without_gaps(packed, columns).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_images_of_samples():
    a, b, c = image([0], 2), image([0], 3), image([0], 2)

    def found(images: list[ReducedImage], cached: list[int], new: list[int]) -> list[list[int]]:
        numbers = {id(one): number for number, one in enumerate((a, b, c))}
        return [[numbers[id(one)] for one in sample] for sample in new_images(images, cached, new, MISMATCH)]

    assert found([a, b, c], [0, 0, 0], [2, 0, 5]) == [[0], [], [1, 2]]
    assert found([a, b, c], [2, 3], [0, 2]) == [[], [2]]  # the caller passes the images of the whole conversation
    assert found([c], [2, 3], [0, 2]) == [[], [2]]  # the caller passes only the new image
    for images, cached, new in (([a, b], [0, 0], [3, 2]), ([a], [0], [3]), ([a, b, c], [0], [5]), ([a, b], [3], [2])):
        with pytest.raises(ValueError, match=MISMATCH):
            found(images, cached, new)
