"""The pictures of the demo: read as they were taken, drawn where the processor looked."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from vlmfast.demo_crops import find_boxes
from vlmfast.demo_model import Subject, open_image
from vlmfast.reduce.drawing import DIMMED, KEPT, Crop, draw, overlay

transformers = pytest.importorskip("transformers")


def processor(name: str, **settings):
    """An image processor that needs no torchvision: a class of its own in transformers 5, the plain one before."""
    cls = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    found = cls(**settings)
    return lambda image: found(images=[image], return_tensors="pt")


def gradient(size: tuple[int, int], most: int, kind: torch.dtype) -> Image.Image:
    levels = torch.linspace(0, most, size[0]).to(torch.int64).expand(size[1], -1).contiguous()
    return Image.fromarray(levels.numpy().astype(str(kind).removeprefix("torch.")))


# ---- reading ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp"])
def test_orientation_is_that_of_transformers(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (60, 40), (200, 0, 0))
    picture.paste((0, 0, 200), (0, 0, 30, 20))  # no symmetry is left
    picture.save(tmp_path / name, exif=exif)
    theirs = transformers.image_utils.load_image(str(tmp_path / name))
    ours = open_image(tmp_path / name)
    assert ours.size == theirs.size == ((40, 60) if orientation > 4 else (60, 40))
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["scan.png", "scan.tif"])
def test_sixteen_bits_are_scaled(name, tmp_path):
    gradient((256, 4), 65535, torch.uint16).save(tmp_path / name)
    read = open_image(tmp_path / name)
    assert read.mode == "RGB"
    row = [read.getpixel((column, 1)) for column in range(256)]
    assert all(max(abs(channel - column) for channel in pixel) <= 1 for column, pixel in enumerate(row))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_read_as_transformers_reads_them(mode, tmp_path):
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    gradient((16, 4), 255, torch.uint8).convert("RGB").convert(mode).save(path)
    assert open_image(path).tobytes() == transformers.image_utils.load_image(str(path)).tobytes()


# ---- where the crops lie ----


def close(found, expected, within=0.5):
    return all(abs(a - b) <= within for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(640, 427), (100, 300), (60, 60), (2000, 90)])
def test_centre_crop(size):
    [box] = find_boxes(processor("CLIPImageProcessor", size={"shortest_edge": 56}, crop_size=56), size)
    left, top = ((side - min(size)) / 2 for side in size)
    pixel = min(size) / 56  # the processor rounds to its own pixels
    assert close(box, (left, top, left + min(size), top + min(size)), within=pixel)
    assert close((box[2] - box[0], box[3] - box[1]), (min(size), min(size)), within=0.02 * min(size))


def test_stretched_whole_picture():
    for size in ((640, 427), (100, 300), (5, 40)):
        [box] = find_boxes(processor("SiglipImageProcessor", size={"height": 56, "width": 56}), size)
        assert close(box, (0, 0, *size))


def test_tiles_and_their_overview():
    tiles = processor("GotOcr2ImageProcessor", crop_to_patches=True, max_patches=6, size={"height": 56, "width": 56})
    *found, overview = find_boxes(tiles, (600, 400))
    assert close(overview, (0, 0, 600, 400))
    expected = [
        (200 * column, 200 * row, 200 * column + 200, 200 * row + 200) for row in (0, 1) for column in (0, 1, 2)
    ]
    assert all(map(close, found, expected))
    assert len(found) == 6


def test_padding_lies_outside_of_the_picture():
    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    process = processor("LlavaNextImageProcessor", image_grid_pinpoints=[[112, 112]], **settings)
    overview, *found = find_boxes(process, (448, 112))
    assert close(overview, (0, 0, 448, 112))
    assert close(found[0], (0, -168, 224, 56), 2)  # 112 x 28 pixels, with 42 rows of padding above and below
    assert close(found[3], (224, 56, 448, 280), 2)


def test_a_crop_of_padding_alone_has_no_place():
    def process(image):
        pixels = torch.zeros(2, 3, 8, 8)
        pixels[1] = torch.tensor(list(image.resize((8, 8)).getdata())).view(8, 8, 3).permute(2, 0, 1)
        return {"pixel_values": pixels}

    for size in ((80, 80), (1, 40), (1, 1)):
        nothing, whole = find_boxes(process, size)
        assert nothing is None
        assert close(whole, (0, 0, *size))


def test_patches_of_the_whole_picture_are_no_crops():
    assert find_boxes(lambda image: {"pixel_values": torch.zeros(12, 588)}, (30, 40)) is None


# ---- drawing ----


def test_what_a_crop_never_saw_is_dimmed():
    picture = Image.new("RGB", (90, 30), (200, 90, 20))
    shown = overlay(picture, range(4), (2, 2), box=(30, 0, 60, 30))
    assert shown.size == picture.size
    dimmed = shown.getpixel((5, 5))
    assert abs(dimmed[0] - 200) > (1 - DIMMED) * 20
    for column in range(90):
        colours = {shown.getpixel((column, row)) for row in range(30)}
        if 30 <= column < 60:
            assert KEPT in colours
            assert dimmed not in colours
        else:
            assert colours == {dimmed}


def test_a_box_may_reach_out_of_the_picture():
    shown = overlay(Image.new("RGB", (40, 20)), range(4), (2, 2), box=(-10, -10, 50, 30))
    assert shown.getpixel((19, 10)) == KEPT
    with pytest.raises(ValueError, match=r"box must be .* with an area, got \(5, 0, 5, 9\)"):
        overlay(Image.new("RGB", (40, 20)), [0], (2, 2), box=(5, 0, 5, 9))


def test_crops_side_by_side_share_a_picture_and_others_do_not():
    picture = Image.new("RGB", (90, 30), (200, 90, 20))
    tiles = [Crop([index], (1, 3), box=(30 * index, 0, 30 * index + 30.4, 30)) for index in range(3)]
    one = draw(picture, tiles)
    assert one.size == (90, 30)
    kept = [column for column in range(0, 90, 10) if one.getpixel((column, 0)) == KEPT]
    assert kept == [0, 40, 80]
    both = draw(picture, [*tiles, Crop([0], (1, 3), box=(0, 0, 90, 30))])
    assert both.size == (90, 60)
    assert both.crop((0, 0, 90, 30)).tobytes() == one.tobytes()
    assert both.getpixel((29, 45)) == KEPT
    assert draw(picture, [Crop([0], (1, 1)), Crop([0], (1, 1))]).size == (90, 60)


# ---- the demo ----


def test_every_tile_counts_and_is_drawn(tmp_path):
    """An InternVL for which the tiles of a picture are images of their own."""
    from rich.console import Console

    from tests.conftest import shortens_prompts
    from tests.helpers.tiny_types import build
    from vlmfast import EvenTokens, demo_reduce

    if not shortens_prompts():
        pytest.skip("this transformers is too old")
    model = build("internvl")[0]
    size = model.config.vision_config.image_size
    side = size[0] if isinstance(size, (list, tuple)) else size
    tiles = processor(
        "GotOcr2ImageProcessor", crop_to_patches=True, max_patches=3, size={"height": side, "width": side}
    )
    picture = Image.new("RGB", (90, 30), (200, 90, 20))
    pixels = tiles(picture)["pixel_values"]
    assert len(pixels) == 4
    tokens = int(side / model.config.vision_config.patch_size[0] * model.config.downsample_ratio) ** 2
    ids = torch.tensor([[1, *[model.config.image_token_id] * 4 * tokens, 2]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    subject, text = Subject("tiles", model, inputs, picture.size, str, tiles), io.StringIO()
    path = tmp_path / "kept.png"
    demo_reduce.compare(Console(file=text, width=200), subject, EvenTokens(1), picture, path, 1)
    row = next(line.split() for line in text.getvalue().splitlines() if line.strip().startswith("visual tokens"))
    assert row[2:4] == [str(4 * tokens), "4"]
    with Image.open(path) as drawn:
        assert drawn.size == (90, 60)  # three tiles over the picture, the overview below
        for left in (0, 30, 60):
            tile = drawn.crop((left, 0, left + 30, 30))
            assert KEPT in {colour for _, colour in tile.getcolors()}
