"""`vlmfast.reduce.overlay`: the picture that shows which tokens were kept."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vlmfast.reduce.drawing import KEPT, MERGED, Crop, draw, overlay

GRID = (3, 5)


def image(size: tuple[int, int] = (103, 61)) -> Image.Image:
    channels = [Image.new("L", size, level) for level in (200, 90, 20)]  # no grey
    return Image.merge("RGB", channels)


def inside(size: tuple[int, int], position: int) -> tuple[int, int]:
    """Return the pixel in the middle of a token."""
    row, column = divmod(position, GRID[1])
    return (2 * column + 1) * size[0] // (2 * GRID[1]), (2 * row + 1) * size[1] // (2 * GRID[0])


def test_kept_and_merged_stay_and_the_rest_is_dimmed():
    picture = image()
    shown = overlay(picture, torch.tensor([0, 7]), GRID, merged=[14])
    assert shown.size == picture.size
    assert shown.mode == "RGB"
    for position in range(15):
        pixel = inside(picture.size, position)
        same = shown.getpixel(pixel) == picture.getpixel(pixel)
        assert same == (position in (0, 7, 14)), position


def test_frames():
    shown = overlay(image((100, 60)), [0], GRID, merged=[14])
    assert shown.getpixel((0, 0)) == shown.getpixel((19, 19)) == KEPT
    assert shown.getpixel((80, 40)) == shown.getpixel((99, 59)) == MERGED


def test_grid_is_height_and_width():
    """Token 1 lies to the right of token 0, and token 5 below it."""
    picture = image((100, 60))
    assert overlay(picture, [1], GRID).getpixel((30, 10)) == picture.getpixel((30, 10))
    assert overlay(picture, [5], GRID).getpixel((10, 30)) == picture.getpixel((10, 30))


@pytest.mark.parametrize(("begin", "copies"), [(50, 1), (49, 1), (48, 1), (47, 2)])
def test_crops_that_overlap_by_no_more_than_rounding_share_a_picture(begin: int, copies: int):
    crops = [Crop([0], GRID, box=(0, 0, 50, 60)), Crop([0], GRID, box=(begin, 0, 100, 60))]
    assert draw(image((100, 60)), crops).size == (100, 60 * copies)


def test_original_is_untouched_and_nothing_kept_is_fine():
    picture = image()
    before = picture.tobytes()
    overlay(picture, [], GRID)
    overlay(picture, range(15), GRID)
    assert picture.tobytes() == before


def test_smaller_than_its_grid():
    assert overlay(image((2, 2)), range(15), GRID).size == (2, 2)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes(mode: str):
    assert overlay(image().convert(mode), [3], GRID).mode == "RGB"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: overlay("photo.jpg", [0], GRID), TypeError, "image must be a PIL image, got str"),
        (lambda: overlay(image(), [0], (3,)), ValueError, r"grid must be \(height, width\), .* got \(3,\)"),
        (lambda: overlay(image(), [0], (0, 5)), ValueError, r"grid must be \(height, width\)"),
        (lambda: overlay(image(), [15], GRID), ValueError, "kept must be positions within a grid of 3 x 5 .* got 15"),
        (lambda: overlay(image(), [0], GRID, [-1]), ValueError, "merged must be positions within .* got -1"),
        (lambda: overlay(image(), [0], GRID, box=(5, 0, 5, 9)), ValueError, "box must be .* with an area"),
        (lambda: overlay(image(), [0], GRID, box=(0, 9, 5, 9)), ValueError, "box must be .* with an area"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
