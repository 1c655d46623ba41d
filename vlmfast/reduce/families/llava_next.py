"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision, which see an image as an overview and a grid of crops.

Each crop is reduced by itself, with a budget of its own, before the projector. Then the crops are packed: both models
lay them side by side, cut off the padding, and put a learned token after each row (a newline). Which patch goes where
is asked of the model: its own packing is run on the numbers of the patches.

LLaVA-OneVision makes the grid smaller where it is too large, by interpolation, such as that of a large photograph. A
token is not one patch then, and such an image is reduced as a whole, after its packing. Videos stay as they are.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage
from vlmfast.reduce.tokens import VisualTokens
from vlmfast.reduce.towers import EncodedImages, encode, setting

NEWLINE, MIXED = -1, -2

Packer = Callable[[Tensor, Tensor], Tensor]  # crops (T, patches, C) and a newline (C,) -> one image (L, C)


def reduce_next(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """Reduce the images of LLaVA-NeXT and LLaVA-NeXT-Video, packed as the method's ``packing`` says, if it has one.

    In the model's own packing there is no place for a CLS token: it is left out, and all of the budget are patches.
    """
    strategy = setting(model, inputs, "vision_feature_select_strategy")
    packing = getattr(method, "packing", "model")
    return _reduce(model, inputs, method, packing, vision_feature_select_strategy=strategy)


def reduce_onevision(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """Reduce the images of LLaVA-OneVision, always in the model's own packing.

    With ``vision_aspect_ratio="anyres_max_9"`` the model makes a grid of more than about 9 crops smaller, so that a
    token is made of several patches: `reduce_packed` takes such an image, with the budget of all its crops.
    """
    ratio = setting(model, inputs, "vision_aspect_ratio")
    return _reduce(model, inputs, method, "model", vision_aspect_ratio=ratio)


def _reduce(
    model: nn.Module, inputs: Mapping[str, Any], method: Method, packing: str, **settings: Any
) -> list[ReducedImage]:
    sizes: list[list[int]] = torch.as_tensor(inputs["image_sizes"]).tolist()
    counts = _crop_counts(model, sizes, inputs.get("batch_num_images"))
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    packs = [packer(model.pack_image_features, size, **settings) for size in sizes]  # type: ignore[arg-type]
    packed = [pack_numbers(pack, count, side**2) for pack, count in zip(packs, counts, strict=True)]
    smaller = [index for index, numbers in enumerate(packed) if (numbers == MIXED).any()]

    encoded = _encode(model, inputs, counts, side)
    project: Any = model.multi_modal_projector
    newline: Any = model.image_newline
    # of all crops at once, as the model has it: a projector may round otherwise for another number of rows
    projected = functools.cache(lambda: project(encoded.patches))
    tokens = encoded.visual_tokens(projected, encoded.has_cls and packing == "published")
    method.checked_budget(tokens)  # one that does not fit a crop is refused, whatever becomes of the crops
    images: dict[int, ReducedImage] = {}
    if len(smaller) < len(sizes):
        selection = method.select(tokens)
        rows = project(encoded.reduce(selection))
        places = selection.positions().to(rows.device)  # the tower may be on another one
        arrange = arrange_in_model_order if packing == "model" else arrange_as_published
        parts = zip(sizes, packed, torch.split(rows, counts), torch.split(places, counts), strict=True)
        for index, (size, numbers, crop_rows, crop_places) in enumerate(parts):
            if index not in smaller:
                grid = _grid(model, size)
                crops = Crops(crop_rows, crop_places, selection.contextual, grid, side, numbers, newline)
                images[index] = arrange(crops)
    ends = list(itertools.accumulate(counts))
    for index in smaller:
        part = ends[index] - counts[index], ends[index]
        features = projected()[slice(*part)]
        images[index] = reduce_packed(packs[index], features, newline, packed[index], tokens.part(*part), method)
    return [images[index] for index in range(len(sizes))]


def _encode(model: nn.Module, inputs: Mapping[str, Any], counts: list[int], side: int) -> EncodedImages:
    """Run the tower on the crops of all images, one after the other."""
    pixels: Tensor = inputs["pixel_values"]
    if pixels.dim() == 5:  # the crops of each image, padded to one number
        pixels = torch.cat([crops[:count] for crops, count in zip(pixels, counts, strict=True)])
    if pixels.dim() != 4 or len(pixels) != sum(counts):
        raise ValueError(
            f"pixel_values must hold {counts} crops, as image_sizes say, got {tuple(inputs['pixel_values'].shape)}"
        )
    encoded = encode(model.vision_tower, pixels, setting(model, inputs, "vision_feature_layer"))  # type: ignore[arg-type]
    cut = setting(model, inputs, "vision_feature_select_strategy") == "default"
    if cut != encoded.has_cls or encoded.patches.shape[1] != side**2:
        raise ValueError(
            f"the visual tokens must be the {side} x {side} patches of a crop, but {encoded.patches.shape[1]} patches "
            f"{'and a CLS token' if encoded.has_cls else 'without a CLS token'} were encoded, and "
            f"vision_feature_select_strategy {'cuts off' if cut else 'does not cut off'} the first token"
        )
    return encoded


def _crop_counts(model: nn.Module, sizes: list[list[int]], images_of_prompt: Any) -> list[int]:
    """Return how many crops each image has. LLaVA-OneVision does not crop the images of a prompt that has several."""
    config: Any = model.config
    count = _upstream(model).image_size_to_num_patches
    numbers = [] if images_of_prompt is None else [int(number) for number in images_of_prompt]
    cropped = [number == 1 for number in numbers for _ in range(number)] or [True] * len(sizes)
    return [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) if is_cropped else 1
        for size, is_cropped in zip(sizes, cropped, strict=True)
    ]


def _grid(model: nn.Module, size: list[int]) -> tuple[int, int]:
    """Return (height, width) of the crops of an image of that size."""
    config: Any = model.config
    shape = _upstream(model).get_anyres_image_grid_shape
    height, width = shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return height, width


def _upstream(model: nn.Module) -> Any:
    """Find the module of transformers that the model's class comes from, also where a subclass replaced the class."""
    names = [cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")]
    return sys.modules[names[0]]


# ---- packing ----


def packer(pack: Callable[..., Any], size: list[int], **settings: Any) -> Packer:
    """Return a model's ``pack_image_features`` with its other arguments, for one image of that (height, width)."""
    return lambda crops, newline: pack([crops], [size], image_newline=newline, **settings)[0][0]  # type: ignore[no-any-return]


def pack_numbers(pack: Packer, crops: int, patches: int) -> Tensor:
    """Run a model's packing on the numbers of the patches of one image.

    Args:
        pack: the model's packing of this image.
        crops: T, how many crops the image has.
        patches: how many patches a crop has.

    Returns:
        (L,) int64 on the CPU: numbers, `NEWLINE`, and `MIXED` for a token made of several patches, as there are where
        the model makes the image smaller.
    """
    numbers = torch.arange(crops * patches, dtype=torch.float64).view(crops, patches)
    # a mean of numbers may be a number as well, but then it is not the root of the mean of their squares
    channels = torch.stack([numbers, numbers**2], -1)
    newline = torch.tensor([float(NEWLINE), float(NEWLINE) ** 2], dtype=torch.float64)
    first, square = pack(channels, newline).unbind(1)
    return torch.where(first**2 == square, first, MIXED).long()


@dataclass(frozen=True)
class Crops:
    """One image after its crops, T of them, the overview first, were reduced to r rows each.

    Attributes:
        rows: (T, r, D), projected: the CLS token where it is kept, the kept patches, the contextual tokens.
        places: (T, k + C) int64, where the patches stood in their crop; of a contextual token where its target did.
        contextual: C.
        grid: (height, width) of the other crops.
        side: patches along a side of a crop.
        packed: (L,) int64 on the CPU, what the model's packing makes of the T * side**2 patches, see `pack_numbers`;
            none is `MIXED`.
        newline: (D,).
    """

    rows: Tensor
    places: Tensor
    contextual: int
    grid: tuple[int, int]
    side: int
    packed: Tensor
    newline: Tensor

    def image(self, order: Tensor, columns: Tensor, shown: Tensor) -> ReducedImage:
        """Return the image of these rows, counted over all crops and then the newline; ``shown`` (T, k + C) bool."""
        table = torch.cat([self.rows.flatten(0, 1), self.newline[None].to(self.rows)])
        cut = self.places.shape[1] - self.contextual
        pairs = [(row[:cut][seen[:cut]], row[cut:][seen[cut:]]) for row, seen in zip(self.places, shown, strict=True)]
        kept, merged = zip(*pairs, strict=True)
        return ReducedImage(table[order], columns, len(self.packed), (), (self.side, self.side), kept, merged)


def arrange_as_published(crops: Crops) -> ReducedImage:
    """Arrange the rows as VisionZip does.

    First come the overview's rows; then of the other crops the kept patches in raster order over the whole grid, their
    CLS tokens crop by crop, and their contextual tokens crop by crop. There are no newlines, and padding counts as
    image. The placeholders are all alike: the first ones stay.

    Raises:
        ValueError: if the image has fewer placeholders than tokens are left.
    """
    count, rows, _ = crops.rows.shape
    chosen = crops.places.shape[1] - crops.contextual
    numbers = torch.arange(count * rows, device=crops.places.device).view(count, rows)
    overview, others = numbers[0], numbers[1:]
    cls, kept, merged = torch.split(others, [rows - chosen - crops.contextual, chosen, crops.contextual], 1)
    _, width = crops.grid
    crop = torch.arange(count - 1, device=numbers.device)[:, None]
    patch = crops.places[1:, :chosen]
    y = crop // width * crops.side + patch // crops.side
    x = crop % width * crops.side + patch % crops.side
    raster = (y * width * crops.side + x).flatten().argsort()
    order = torch.cat([overview, kept.flatten()[raster], cls.flatten(), merged.flatten()])
    if len(order) > len(crops.packed):
        raise ValueError(
            f"{len(order)} visual tokens are left of an image of {count} crops, which has {len(crops.packed)} "
            f'placeholders in the prompt: choose smaller budgets, or packing="model"'
        )
    columns = torch.arange(len(order), device=order.device)
    return crops.image(order, columns, torch.ones_like(crops.places, dtype=torch.bool))


def arrange_in_model_order(crops: Crops) -> ReducedImage:
    """Arrange the rows in the model's own order, cut by position.

    Each row stays where the model's packing puts its patch, a contextual token where it puts its target. All newlines
    stay. What the model cuts off as padding is left out, be it a kept patch or a contextual token whose target is
    padding: such a token stands for patches that look like padding.
    """
    count, rows, _ = crops.rows.shape
    number = torch.arange(count, device=crops.places.device)[:, None]
    row_of = crops.places.new_full((count * crops.side**2,), -1)
    row_of[number * crops.side**2 + crops.places] = number * rows + torch.arange(rows, device=row_of.device)
    packed = crops.packed.to(row_of.device)
    order = torch.where(packed == NEWLINE, count * rows, row_of[packed.clamp(min=0)])
    columns = (order >= 0).nonzero().flatten()
    used = torch.zeros(count * rows + 1, dtype=torch.bool, device=order.device)
    used[order[columns]] = True
    return crops.image(order[columns], columns, used[:-1].view(count, rows))


def reduce_packed(
    pack: Packer, features: Tensor, newline: Tensor, packed: Tensor, crops: VisualTokens, method: Method
) -> ReducedImage:
    """Reduce the packed tokens of an image that the model makes smaller at once, with the budget of all its crops.

    Scores and metric are packed as the features are, in float32. Tokens are merged as they are packed, so after the
    projector. A contextual token takes the place of its target, and all newlines stay.

    Args:
        pack: the model's packing of this image.
        features: (T, side**2, D), the projected patches of its crops.
        newline: (D,).
        packed: (L,) int64 on the CPU, as `pack_numbers` gives it.
        crops: what a method may ask about the T crops.
        method: how they are reduced.

    Returns:
        The image. Its ``grid``, ``kept`` and ``merged`` are about the overview alone, which shows all of the image.
    """
    is_newline = (packed == NEWLINE).to(features.device)
    patches, newlines = (~is_newline).nonzero().flatten(), is_newline.nonzero().flatten()

    def as_packed(channels: Tensor) -> Tensor:
        """(T, side**2, M) -> (1, N, M), without newlines."""
        channels = channels.to(features.device, torch.float32)
        return pack(channels, channels.new_zeros(channels.shape[2]))[None, patches]

    whole = pack(features, newline)
    tokens = VisualTokens(
        batch=1,
        count=len(patches),
        device=features.device,
        has_cls=False,
        grid=None,
        scores=lambda: as_packed(crops.scores().unsqueeze(2)).squeeze(2),
        metric=lambda: as_packed(crops.metric()),
        features=lambda: whole[None, patches].detach(),
        crops=len(features),
    )
    selection = method.select(tokens)
    rows = torch.cat([selection.apply(whole[None, patches])[0], whole[newlines]])
    places = patches[selection.positions()[0]]
    columns, order = torch.cat([places, newlines]).sort()
    area, chosen = features.shape[1], selection.kept.shape[1]
    side = math.isqrt(area)
    kept, merged = (part[part < area] for part in (places[:chosen], places[chosen:]))  # the overview is packed first
    return ReducedImage(rows[order], columns, len(packed), (), (side, side), (kept,), (merged,))
