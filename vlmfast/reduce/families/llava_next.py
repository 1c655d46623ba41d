"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision, which see an image as an overview and a grid of crops.

Each crop is reduced by itself, with a budget of its own, before the projector. Then the crops are packed: both models
lay them side by side, cut off the padding, and put a learned token after each row (a newline). Which patch goes where
is found by running the model's own packing on the numbers of the patches.

LLaVA-OneVision makes a grid that is too large, that of a large photograph, smaller by interpolation. A token is not one
patch then, and the image is reduced as a whole, after its packing. Videos stay as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
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

    The model's own packing has no place for a CLS token: it is left out, and the whole budget goes to patches.
    """
    strategy = setting(model, inputs, "vision_feature_select_strategy")
    packing = getattr(method, "packing", "model")
    return _reduce(model, inputs, method, packing, vision_feature_select_strategy=strategy)


def reduce_onevision(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """Reduce the images of LLaVA-OneVision, always in the model's own packing.

    With ``vision_aspect_ratio="anyres_max_9"`` the model makes a grid of more than about 9 crops smaller, so that a
    token is made of several patches: `Packing.reduce` takes such an image, with the budget of all its crops.
    """
    ratio = setting(model, inputs, "vision_aspect_ratio")
    return _reduce(model, inputs, method, "model", vision_aspect_ratio=ratio)


def _reduce(model: Any, inputs: Mapping[str, Any], method: Method, packing: str, **settings: Any) -> list[ReducedImage]:
    sizes: list[list[int]] = torch.as_tensor(inputs["image_sizes"]).tolist()
    counts = _crop_counts(model, sizes, inputs.get("batch_num_images"))
    config, grid_of = model.config, _upstream(model).get_anyres_image_grid_shape
    side = config.vision_config.image_size // config.vision_config.patch_size
    packings = []
    for size, count in zip(sizes, counts, strict=True):
        pack = packer(model.pack_image_features, size, **settings)
        numbers = pack_numbers(pack, count, side**2)
        grid = grid_of(size, config.image_grid_pinpoints, config.vision_config.image_size)
        packings.append(Packing(pack, numbers, tuple(grid), side, model.image_newline))

    encoded = _encode(model, inputs, counts, side)
    project = model.multi_modal_projector
    # of all crops at once, as the model has it: a projector may round otherwise for another number of rows
    projected = functools.cache(lambda: project(encoded.patches))
    tokens = encoded.visual_tokens(projected, encoded.has_cls and packing == "published")
    method.checked_budget(tokens)  # one that does not fit a crop is refused, whatever becomes of the crops
    if not all(packing.makes_smaller for packing in packings):
        selection = method.select(tokens)
        rows = project(encoded.reduce(selection))
        places = selection.positions().to(rows.device)  # the tower may be on another one
    images, end = [], 0
    for image, count in zip(packings, counts, strict=True):
        crops, end = slice(end, end + count), end + count
        if image.makes_smaller:
            images.append(image.reduce(projected()[crops], tokens, crops, method))
        else:
            arrange = image.in_model_order if packing == "model" else image.as_published
            images.append(arrange(rows[crops], places[crops], selection.contextual))
    return images


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


def _upstream(model: nn.Module) -> Any:
    """Find the module of transformers that the model's class comes from, also where a subclass replaced the class."""
    names = [cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")]
    return sys.modules[names[0]]


# ---- packing ----


def packer(pack: Callable[..., Any], size: list[int], **settings: Any) -> Packer:
    """Return a model's ``pack_image_features`` with its other arguments, for one image of that (height, width)."""
    return lambda crops, newline: pack([crops], [size], image_newline=newline, **settings)[0][0]  # type: ignore[no-any-return]


def pack_numbers(pack: Packer, crops: int, patches: int) -> Tensor:
    """Run a model's packing of one image on the numbers of its patches, those of so many crops.

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
class Packing:
    """How the model packs the T crops of one image, of which the overview is the first."""

    pack: Packer
    numbers: Tensor  # (L,) int64 on the CPU, as `pack_numbers` gives them
    grid: tuple[int, int]  # (height, width) of the other crops
    side: int  # patches along a side of a crop
    newline: Tensor  # (D,)

    @property
    def makes_smaller(self) -> bool:
        """Whether a token is made of several patches."""
        return bool((self.numbers == MIXED).any())

    def as_published(self, rows: Tensor, places: Tensor, contextual: int) -> ReducedImage:
        """Arrange the rows of reduced crops as VisionZip does.

        First come the overview's rows; then of the other crops the kept patches in raster order over the whole grid,
        their CLS tokens crop by crop, and their contextual tokens crop by crop. There are no newlines, and padding
        counts as image. The placeholders are all alike: the first ones stay.

        Args:
            rows: (T, r, D), projected: the CLS token where it is kept, the kept patches, the contextual tokens.
            places: (T, k + C) int64, where the patches stood in their crop, a contextual token at its target.
            contextual: C.

        Raises:
            ValueError: if the image has fewer placeholders than tokens are left.
        """
        kept_count, left = places.shape[1] - contextual, rows.shape[:2].numel()
        if left > len(self.numbers):
            raise ValueError(
                f"{left} visual tokens are left of an image of {len(rows)} crops, which has {len(self.numbers)} "
                'placeholders in the prompt: choose smaller budgets, or packing="model"'
            )
        cls, kept, merged = torch.split(rows[1:], [rows.shape[1] - places.shape[1], kept_count, contextual], 1)
        height, width = self.grid
        whole = torch.arange(height * width * self.side**2, device=places.device).view(
            height, self.side, width, self.side
        )
        raster = whole.transpose(1, 2).flatten(2).flatten(0, 1).gather(1, places[1:, :kept_count]).flatten().argsort()
        features = torch.cat([rows[0], kept.flatten(0, 1)[raster], cls.flatten(0, 1), merged.flatten(0, 1)])
        columns = torch.arange(len(features), device=places.device)
        return self._image(features, columns, places[:, :kept_count], places[:, kept_count:])

    def in_model_order(self, rows: Tensor, places: Tensor, contextual: int) -> ReducedImage:
        """Arrange the rows of reduced crops, as `as_published` takes them, in the model's order, cut by position.

        Each row stays where the model puts its patch, a contextual token where it puts its target. What the model cuts
        off as padding is left out, be it a kept patch or a contextual token whose target is padding: such a token
        stands for patches that look like padding.
        """
        column_of = self.numbers.new_full((len(rows) * self.side**2,), -1)
        columns = (self.numbers >= 0).nonzero().flatten()
        column_of[self.numbers[columns]] = columns
        first = torch.arange(len(rows), device=places.device)[:, None] * self.side**2
        columns = column_of.to(places.device)[first + places]
        shown, kept_count = columns >= 0, places.shape[1] - contextual
        seen = [place[own] for place, own in zip(places[:, :kept_count], shown[:, :kept_count], strict=True)]
        targets = [place[own] for place, own in zip(places[:, kept_count:], shown[:, kept_count:], strict=True)]
        return self._with_newlines(rows[shown], columns[shown], seen, targets)

    def reduce(self, features: Tensor, tokens: VisualTokens, crops: slice, method: Method) -> ReducedImage:
        """Reduce the packed tokens of an image that the model makes smaller, with the budget of all its crops.

        Scores and metric, which ``tokens`` has for the crops of all images, are packed in float32 as the projected
        features (T, side**2, D) are. Tokens are merged after packing, so after the projector. A contextual token takes
        the place of its target. ``kept`` and ``merged`` are about the overview alone, which shows all of the image.
        """
        patches = (self.numbers != NEWLINE).nonzero().flatten().to(features.device)

        def as_packed(channels: Tensor) -> Tensor:
            """(T, side**2, M) -> (1, N, M), without newlines."""
            channels = channels.to(features.device, torch.float32)
            return self.pack(channels, channels.new_zeros(channels.shape[2]))[None, patches]

        packed = self.pack(features, self.newline)[None, patches]
        whole = VisualTokens(
            hidden=packed,
            grid=None,
            scores=lambda: as_packed(tokens.scores()[crops].unsqueeze(2)).squeeze(2),
            metric=lambda: as_packed(tokens.metric()[crops]),
            features=packed.detach,
            crops=len(features),
        )
        selection = method.select(whole)
        places = patches[selection.positions()[0]]
        kept_count = selection.kept.shape[1]
        kept, targets = (part[part < self.side**2] for part in (places[:kept_count], places[kept_count:]))
        return self._with_newlines(selection.apply(packed)[0], places, [kept], [targets])

    def _with_newlines(
        self, rows: Tensor, columns: Tensor, kept: Iterable[Tensor], merged: Iterable[Tensor]
    ) -> ReducedImage:
        """Put each row into its column of the packed image, and the newlines, all of which stay, into theirs."""
        newlines = (self.numbers == NEWLINE).nonzero().flatten().to(columns.device)
        columns, order = torch.cat([columns, newlines]).sort()
        features = torch.cat([rows, self.newline.to(rows).expand(len(newlines), -1)])[order]
        return self._image(features, columns, kept, merged)

    def _image(
        self, features: Tensor, columns: Tensor, kept: Iterable[Tensor], merged: Iterable[Tensor]
    ) -> ReducedImage:
        side = (self.side, self.side)
        return ReducedImage(features, columns, len(self.numbers), (), side, tuple(kept), tuple(merged))
