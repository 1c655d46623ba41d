"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision, which see an image as an overview and a grid of crops.

Each crop is reduced by itself, with a budget of its own, before the projector. Then the crops are packed: both models
lay them side by side, cut off the padding, and put a learned token after each row (a newline). Which patch goes where
is found by running the model's own packing on the numbers of the patches. Videos are in llava_videos.py.

LLaVA-OneVision interpolates the grid of a large photograph to a smaller one. Then a token is not one patch, and the
image is reduced as a whole, after packing. So is any image if the method's ``packing`` is "whole".
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.host import on_host
from vlmfast.reduce.groups import by_group
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage
from vlmfast.reduce.text import Texts, unknown_texts
from vlmfast.reduce.tokens import VisualTokens
from vlmfast.reduce.towers import EncodedImages, encode, sizes_in, vision_setting

NEWLINE, MIXED = -1, -2

Packer = Callable[[Tensor, Tensor], Tensor]  # crops (T, patches, C) and a newline (C,) -> one image (L, C)


def reduce_next(
    model: nn.Module, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts
) -> list[ReducedImage]:
    """Reduce the images of LLaVA-NeXT and LLaVA-NeXT-Video, packed as the method's ``packing`` says, if it has one.

    The model's own packing has no place for a CLS token: it is left out, and the whole budget goes to patches. With
    "whole", the image is reduced after packing, see `Packing.reduce`.
    """
    strategy = vision_setting(model, inputs, "vision_feature_select_strategy")
    return _reduce(model, inputs, method, texts, True, vision_feature_select_strategy=strategy)


def reduce_onevision(
    model: nn.Module, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts
) -> list[ReducedImage]:
    """Reduce the images of LLaVA-OneVision, always in the model's own packing, crop by crop or as a whole.

    With ``vision_aspect_ratio="anyres_max_9"`` the model makes a grid of more than about 9 crops smaller, so that a
    token is made of several patches: `Packing.reduce` takes such an image, with the budget of all its crops.
    """
    ratio = vision_setting(model, inputs, "vision_aspect_ratio")
    return _reduce(model, inputs, method, texts, False, vision_aspect_ratio=ratio)


def _reduce(
    model: Any, inputs: Mapping[str, Any], method: Method, texts: Texts, published: bool, **settings: Any
) -> list[ReducedImage]:
    sizes: list[list[int]] = on_host(sizes_in(inputs, "image_sizes", "pixel_values")).tolist()
    counts = _crop_counts(model, sizes, inputs.get("batch_num_images"))
    config, grid_of = model.config, _upstream(model).get_anyres_image_grid_shape
    side = config.vision_config.image_size // config.vision_config.patch_size
    packings = []
    for size, count in zip(sizes, counts, strict=True):
        pack = packer(model.pack_image_features, size, **settings)
        numbers = pack_numbers(pack, count, side**2)
        grid = grid_of(size, config.image_grid_pinpoints, config.vision_config.image_size)
        packings.append(Packing(pack, numbers, count, tuple(grid), side, model.image_newline))

    encoded = encode_crops(model, inputs, counts, side)
    return reduce_packed(encoded, packings, [method] * len(packings), model.multi_modal_projector, published, texts)


def reduce_packed(
    encoded: EncodedImages,
    packings: Sequence[Packing],
    methods: Sequence[Method],
    project: Any,
    published: bool,
    texts: Texts = unknown_texts,
) -> list[ReducedImage]:
    """Reduce the images of encoded crops; crops with the same method and number of tokens are computed together.

    Args:
        encoded: the crops of all images, one after the other.
        packings: how those of each image are packed.
        methods: the method of each image.
        project: the projector.
        published: whether the model has VisionZip's published packing.
        texts: a function that returns the text about each image.
    """
    # all crops at once, as in the model: with other numbers of rows a projector may round differently
    projected = functools.cache(lambda: project(encoded.patches))
    chosen = [
        "whole" if image.makes_smaller else packing_of(method, published)
        for image, method in zip(packings, methods, strict=True)
    ]
    text = texts([len(image.numbers) for image in packings])
    image_of_crop = [number for number, image in enumerate(packings) for _ in range(image.crops)]
    keeps_cls = encoded.has_cls and "published" in chosen
    patches = encoded.patches.shape[1]
    tokens = encoded.visual_tokens(projected, keeps_cls, patches, lambda: text()[image_of_crop])
    totals = [
        total
        for image, packing in zip(packings, chosen, strict=True)
        for total in (image.shown if packing == "published" else [patches] * image.crops)
    ]
    single = [crop for crop, image in enumerate(image_of_crop) if chosen[image] != "whole"]
    kinds = [(totals[crop], methods[image_of_crop[crop]]) for crop in single]
    crops = dict(zip(single, _reduce_crops(encoded, tokens, single, kinds, project), strict=True))
    images, end = [], 0
    for image, method, packing in zip(packings, methods, chosen, strict=True):
        own, end = slice(end, end + image.crops), end + image.crops
        if packing == "whole":
            images.append(image.reduce(projected()[own], tokens, own, method))
        else:
            arrange = image.as_published if packing == "published" else image.in_model_order
            images.append(arrange([crops[crop] for crop in range(own.start, own.stop)]))
    return images


def packing_of(method: Method, published: bool) -> str:
    """Return the packing of a method: "whole", "model", or "published" where the model has that one."""
    packing: str = getattr(method, "packing", "model")
    return packing if published or packing == "whole" else "model"


def _reduce_crops(
    encoded: EncodedImages,
    tokens: VisualTokens,
    numbers: Sequence[int],
    kinds: Sequence[tuple[int, Method]],
    project: Any,
) -> list[Crop]:
    """Reduce each crop by itself.

    Args:
        encoded: the crops.
        tokens: the visual tokens of all crops.
        numbers: which of them are reduced, ascending.
        kinds: of each of these the number of tokens that the model makes of it, and the method.
        project: the projector.
    """

    def reduce_alike(kind: tuple[int, Method], members: list[int]) -> list[Crop]:
        total, method = kind
        own = [numbers[member] for member in members]
        selection = method.select(tokens.take(own, total))
        rows = project(encoded.reduce(selection, own))
        places = selection.positions().to(rows.device)  # the tower may be on another one
        return [Crop(row, place, selection.contextual) for row, place in zip(rows, places, strict=True)]

    return by_group(kinds, reduce_alike)


def encode_crops(model: nn.Module, inputs: Mapping[str, Any], counts: list[int], side: int) -> EncodedImages:
    """Run the tower on the crops of all images, one after the other."""
    pixels: Tensor = inputs["pixel_values"]
    if pixels.dim() == 5:  # the crops of each image, padded to one number
        pixels = torch.cat([crops[:count] for crops, count in zip(pixels, counts, strict=True)])
    if pixels.dim() != 4 or len(pixels) != sum(counts):
        raise ValueError(
            f"pixel_values must hold {counts} crops, as image_sizes say, got {tuple(inputs['pixel_values'].shape)}"
        )
    encoded = encode(model.vision_tower, pixels, vision_setting(model, inputs, "vision_feature_layer"))  # type: ignore[arg-type]
    cut = vision_setting(model, inputs, "vision_feature_select_strategy") == "default"
    if cut != encoded.has_cls or encoded.patches.shape[1] != side**2:
        raise ValueError(
            f"the visual tokens must be the {side} x {side} patches of a crop, but {encoded.patches.shape[1]} patches "
            f"{'and a CLS token' if encoded.has_cls else 'without a CLS token'} were encoded, and "
            f"vision_feature_select_strategy {'cuts off' if cut else 'does not cut off'} the first token"
        )
    return encoded


def _crop_counts(model: nn.Module, sizes: list[list[int]], images_of_prompt: Any) -> list[int]:
    """Return the number of crops of each image; LLaVA-OneVision does not crop the images of a prompt with several."""
    config: Any = model.config
    count = _upstream(model).image_size_to_num_patches
    numbers = [] if images_of_prompt is None else [int(number) for number in images_of_prompt]
    cropped = [number == 1 for number in numbers for _ in range(number)] or [True] * len(sizes)
    return [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) if is_cropped else 1
        for size, is_cropped in zip(sizes, cropped, strict=True)
    ]


def _upstream(model: nn.Module) -> Any:
    """Return the module of transformers that defines the model's class, or the class that it derives from."""
    names = [cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")]
    return sys.modules[names[0]]


# ---- packing ----


def packer(pack: Callable[..., Any], size: list[int], **settings: Any) -> Packer:
    """Return a model's ``pack_image_features`` with its other arguments, for one image of that (height, width)."""
    return lambda crops, newline: pack([crops], [size], image_newline=newline, **settings)[0][0]  # type: ignore[no-any-return]


def pack_numbers(pack: Packer, crops: int, patches: int) -> Tensor:
    """Run a model's packing of one image on the numbers of its patches.

    Returns:
        (L,) int64 on the CPU: numbers, `NEWLINE`, and `MIXED` for a token made of several patches, as there are where
        the model makes the image smaller.
    """
    numbers = torch.arange(crops * patches, dtype=torch.float64).view(crops, patches)
    # a mean may be an integer too, but then it differs from the root of the mean of the squares
    channels = torch.stack([numbers, numbers**2], -1)
    newline = torch.tensor([float(NEWLINE), float(NEWLINE) ** 2], dtype=torch.float64)
    first, square = pack(channels, newline).unbind(1)
    return torch.where(first**2 == square, first, MIXED).long()


@dataclass(frozen=True)
class Crop:
    """One crop after reduction."""

    rows: Tensor  # (r, D), projected: the CLS token where it is kept, the kept patches, the contextual tokens
    places: Tensor  # (k + C,) int64, where the patches stood in the crop, a contextual token at its target
    contextual: int  # C

    @property
    def kept(self) -> Tensor:
        """(k,): the places of the patches that are kept."""
        return self.places[: len(self.places) - self.contextual]

    @property
    def merged(self) -> Tensor:
        """(C,): the places of the targets."""
        return self.places[len(self.places) - self.contextual :]


@dataclass(frozen=True)
class Packing:
    """How the model packs the crops of one image, of which the overview is the first."""

    pack: Packer
    numbers: Tensor  # (L,) int64 on the CPU, as `pack_numbers` gives them
    crops: int  # T
    grid: tuple[int, int]  # (height, width) of the other crops
    side: int  # patches along a side of a crop
    newline: Tensor  # (D,)

    @property
    def makes_smaller(self) -> bool:
        """Whether a token is made of several patches."""
        return bool((self.numbers == MIXED).any())

    @property
    def shown(self) -> list[int]:
        """The number of patches of each crop that the model does not cut off as padding."""
        return (self.numbers[self.numbers >= 0] // self.side**2).bincount(minlength=self.crops).tolist()

    def tokens_left(self, method: Method, has_cls: bool, published: bool) -> int:
        """Return, before encoding, how many tokens a method leaves, where that does not depend on the picture.

        Args:
            method: the method, in its published packing or with "whole".
            has_cls: whether the tower has a CLS token.
            published: as `reduce_packed`.
        """
        if not self.makes_smaller and packing_of(method, published) == "published":
            return sum(sum(method.counts(self.side**2, has_cls, shown)) for shown in self.shown)
        count = int((self.numbers != NEWLINE).sum())
        return sum(method.counts(count, False, count, self.crops)) + len(self.numbers) - count

    def as_published(self, crops: Sequence[Crop]) -> ReducedImage:
        """Arrange the rows of reduced crops as VisionZip does.

        First come the overview's rows; then of the other crops the kept patches in raster order over the whole grid,
        their CLS tokens crop by crop, and their contextual tokens crop by crop. There are no newlines, and padding
        counts as image. The placeholders are all alike: the first ones stay.
        """
        height, width = self.grid
        whole = torch.arange(height * width * self.side**2, device=crops[0].places.device).view(
            height, self.side, width, self.side
        )
        tiles = whole.transpose(1, 2).flatten(2).flatten(0, 1)
        raster = torch.cat([tile[crop.kept] for tile, crop in zip(tiles, crops[1:], strict=True)]).argsort()
        parts = [
            torch.split(crop.rows, [len(crop.rows) - len(crop.places), len(crop.kept), crop.contextual])
            for crop in crops[1:]
        ]
        cls, kept, merged = zip(*parts, strict=True)
        features = torch.cat([crops[0].rows, torch.cat(kept)[raster], *cls, *merged])
        columns = torch.arange(len(features), device=raster.device)
        return self._image(features, columns, [crop.kept for crop in crops], [crop.merged for crop in crops])

    def in_model_order(self, crops: Sequence[Crop]) -> ReducedImage:
        """Arrange the rows of reduced crops in the model's order, cut by position.

        Each row stays where the model puts its patch, a contextual token where it puts its target. What the model cuts
        off as padding is left out, be it a kept patch or a contextual token whose target is padding: such a token
        stands for patches that look like padding.
        """
        rows, places = (torch.stack([getattr(crop, name) for crop in crops]) for name in ("rows", "places"))
        column_of = self.numbers.new_full((len(rows) * self.side**2,), -1)
        columns = (self.numbers >= 0).nonzero().flatten()
        column_of[self.numbers[columns]] = columns
        first = torch.arange(len(rows), device=places.device)[:, None] * self.side**2
        columns = column_of.to(places.device)[first + places]
        shown, kept_count = columns >= 0, places.shape[1] - crops[0].contextual
        seen = [place[own] for place, own in zip(places[:, :kept_count], shown[:, :kept_count], strict=True)]
        targets = [place[own] for place, own in zip(places[:, kept_count:], shown[:, kept_count:], strict=True)]
        return self._with_newlines(rows[shown], columns[shown], seen, targets)

    def reduce(self, features: Tensor, tokens: VisualTokens, crops: slice, method: Method) -> ReducedImage:
        """Reduce the packed tokens of an image as a whole, with the budget of all its crops.

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
            pixels=lambda: tokens.pixels()[None, crops],
            text=lambda: tokens.text()[crops.start : crops.start + 1],
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
