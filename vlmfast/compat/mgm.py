"""Mini-Gemini (github.com/dvlab-research/MGM): patch-info mining and token reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.patches.apply import Patch, Replacements, patch_projects
from vlmfast.patches.bodies import Body
from vlmfast.patches.mining import mine, norm_and_linear
from vlmfast.patches.plan import difference
from vlmfast.patches.projects import Named
from vlmfast.reduce.methods import Method, told
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.reduced_image import ReducedImage, cut
from vlmfast.reduce.spelling import spelled
from vlmfast.reduce.towers import EncodedImages, encode

_CLASS = "MGMMetaForCausalLM"
_ENCODE = (
    "getattr config shape flatten contiguous torch cat get_model get_vision_tower len get_vision_tower_aux to dtype "
    "device F interpolate float unified_resampler reshape permute mm_projector"
)


def patch(model: nn.Module, reduce: Method | str | None = None) -> Patch:
    """Replace the patch-info mining of a Mini-Gemini model and, with ``reduce``, reduce its visual tokens.

    In the mining each token attends to the pixels of its block in a finer feature map. Upstream projects each of the
    map's 36 864 pixels to a key and a value: 435 GFLOP for a picture, 2.2 TFLOP in HD. Here the key's weights are
    applied to the query and the value's weights to the weighted sum. That is equal in real arithmetic and takes 7.2
    GFLOP (36 in HD); gradients too. It rounds fewer intermediate results, so results in half precision are not
    bit-equal to upstream's. Where a projector was replaced (LoRA, quantisers) or has hooks, all pixels are projected,
    as upstream does.

    With ``reduce`` the tokens of each picture, or of each crop in HD, are chosen by the attention of the CLS token in
    the selected layer of CLIP, before the mining. Only kept tokens are mined, unless the method merges tokens: then all
    are, because all take part in the averages. Kept tokens equal those of the full model exactly. The CLS token has no
    pixels and is never kept: a budget counts patches, and ``VisionZip(dominant=54, contextual=10)`` keeps 54 of them.

    Args:
        model: an MGM model such as ``MGMLlamaForCausalLM``, or a wrapper around it; float32, float16 or bfloat16.
        reduce: how visual tokens are reduced, such as ``vlmfast.VisionZip(dominant=54, contextual=10)`` or its text,
            "visionzip:54:10"; None keeps all of them. Needs the CLIP tower.

    Returns:
        A `vlmfast.Patch`, with ``report()`` and ``undo()``, which is also a context manager.

    Raises:
        TypeError: if ``model`` is not a module, or ``reduce`` is not a method. ValueError: if it is not a Mini-Gemini
            model, its methods are not those of dvlab-research/MGM, the LayerNorms of keys and values differ in eps, or
            ``reduce`` is given and the tower is not CLIP's. RuntimeError: if it is patched already.

    Source:
        MGMMetaForCausalLM.unified_resampler and .encode_images of dvlab-research/MGM, mgm/model/mgm_arch.py.
    """
    reduce = spelled(reduce)
    if reduce is not None and not isinstance(reduce, Method):
        raise TypeError(f"reduce must be a method such as vlmfast.VisionZip(54, 10), got {told(reduce)}")
    if isinstance(reduce, SmallerImage):
        raise ValueError(f"{reduce} cannot make the pictures of Mini-Gemini smaller: they have a finer map")

    def reduction(modules: list[nn.Module]) -> Reduction | None:
        found = None if reduce is None else Reduction(reduce, tuple(dict.fromkeys(map(type, modules))))
        for module in modules:
            _check_norms(module)
            if found is not None:
                _check_encoder(module, found)
        return found

    return patch_projects(model, "Mini-Gemini", (_CLASS,), reduction)


# ---- what is refused ----


def _check_norms(module: Any) -> None:
    model = module.get_model()
    parts = [norm_and_linear(getattr(model, f"vlm_uni_{name}_projector")) for name in ("aux", "val")]
    eps = [part[0].eps for part in parts if part is not None]
    if len(set(eps)) > 1:
        raise ValueError(
            f"the LayerNorms of vlm_uni_aux_projector and vlm_uni_val_projector must have one eps, got {eps[0]} and "
            f"{eps[1]}: pixels are normalised once for both"
        )


def _check_encoder(module: nn.Module, reduction: Reduction) -> None:
    body = Body("encode_images", Named(_CLASS, _ENCODE), _encode_images_by(reduction), "Mini-Gemini")
    told = difference(type(module), _CLASS, body)
    if told:
        raise ValueError(f"the visual tokens of this Mini-Gemini cannot be reduced: encode_images: {told}")
    tower: Any = module.get_vision_tower()  # type: ignore[operator]
    if type(tower).__name__ != "CLIPVisionTower" or getattr(tower, "select_feature", None) != "patch":
        raise ValueError(
            "the visual tokens of a Mini-Gemini are reduced by the CLS token of a CLIPVisionTower that selects its "
            f"patches, got {type(tower).__name__} with select_feature {getattr(tower, 'select_feature', None)!r}"
        )


# ---- fewer tokens ----


@dataclass
class Reduction:
    """Reduces the images of a Mini-Gemini model, and remembers the last ones for the report."""

    method: Method
    classes: tuple[type, ...]
    images: list[ReducedImage] = field(default_factory=list)

    @property
    def videos(self) -> list[ReducedImage]:
        """Always empty: Mini-Gemini treats the frames of a video as images."""
        return []

    def replacements(self) -> Replacements:
        """Return the replacements: class -> method -> function."""
        function = _encode_images_by(self)
        return {cls: {"encode_images": function} for cls in self.classes}

    def report(self) -> str:
        """Describe the method and how it reduced each of the last images or, in HD, each crop."""
        if not self.images:
            return f"{self.method}: no images yet"
        sizes = ", ".join(f"{image.total} -> {image.features.shape[0]}" for image in self.images)
        return f"{self.method}: visual tokens of the last images {sizes}"


def _encode_images_by(reduction: Reduction) -> Callable[..., Tensor]:
    def encode_images(self: Any, images: Tensor, images_aux: Tensor | None = None, is_video: bool = False) -> Tensor:
        """Replace MGMMetaForCausalLM.encode_images: return (B, n, D), the kept tokens of each picture or crop."""
        grid = getattr(self.config, "image_grid", 1)
        has_global = grid > 1 and getattr(self.config, "image_global", False)
        batch = images.shape[0]
        encoded = _encode(self.get_vision_tower(), images.flatten(0, 1) if grid > 1 else images)
        maps = None if images_aux is None else _maps(self, images_aux, grid, has_global, encoded.hidden)
        rows, found = _reduced(self.get_model(), encoded, maps, reduction.method)
        reduction.images = [image.detach() for image in found]
        if grid == 1:
            return rows
        rows = rows.view(batch, -1, *rows.shape[1:])  # the whole picture comes last among its crops
        if maps is None:  # upstream then returns each crop as a batch element, without the whole picture
            return (rows[:, :-1] if has_global else rows).flatten(0, 1)
        return (rows.roll(1, 1) if has_global else rows).flatten(1, 2)

    return encode_images


def _encode(tower: Any, images: Tensor) -> EncodedImages:
    """Run CLIP as its tower does: without a gradient, unless ``is_optimize`` asks for one."""
    clip = tower.vision_tower
    with torch.set_grad_enabled(torch.is_grad_enabled() and tower.is_optimize):
        # Before transformers 5, CLIPVisionModel holds its layers in an inner `vision_model`.
        return encode(getattr(clip, "vision_model", clip), images.to(tower.device, tower.dtype), tower.select_layer)


def _maps(self: Any, images_aux: Tensor, grid: int, has_global: bool, like: Tensor) -> list[Tensor]:
    """Return the (B, Ca, height, width) map of each crop, views of one map, and that of the whole picture, if any."""
    whole = self.get_vision_tower_aux()(images_aux).to(like)
    maps = [crop for row in whole.chunk(grid, 2) for crop in row.chunk(grid, 3)]
    if has_global:
        small = F.interpolate(whole.float(), scale_factor=1 / grid, mode="bilinear", align_corners=False)
        maps.append(small.to(whole.dtype))
    return maps


def _reduced(
    model: Any, encoded: EncodedImages, maps: list[Tensor] | None, method: Method
) -> tuple[Tensor, list[ReducedImage]]:
    """Choose the tokens of each view (crop or whole picture), mine and project them: (B * views, n, D)."""
    tokens, side = encoded.patches, encoded.side

    def refined(rows: Tensor, kept: Tensor | None = None) -> Tensor:
        """Add to the tokens of each view what they mine from its map; ``kept`` are their places."""
        if maps is None:
            return rows
        views = len(maps)
        mined = [
            mine(model, rows[view::views], own, own.shape[-1] // side, None if kept is None else kept[view::views])
            for view, own in enumerate(maps)
        ]
        return rows + torch.stack(mined, 1).flatten(0, 1)

    selection = method.select(encoded.visual_tokens(lambda: model.mm_projector(refined(tokens)), False, side * side))
    if selection.contextual:  # a merging method: all tokens take part in the averages
        rows = selection.apply(refined(tokens))
    else:
        rows = refined(tokens.take_along_dim(selection.kept[..., None], 1), selection.kept)
    features = model.mm_projector(rows)
    return features, cut(selection, [features], (1, side, side), side * side, in_raster_order=False)
