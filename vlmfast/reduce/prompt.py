"""Rewrites a prompt before the language model sees it: fewer placeholders, and shorter arguments beside them."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.modules import at_hand
from vlmfast.reduce.columns import Columns, dealt, drop_columns, new_images, without_gaps
from vlmfast.reduce.families import Reducer
from vlmfast.reduce.families.shrinking import smaller_grids
from vlmfast.reduce.kinds import KINDS, Kind, is_placeholder, method_of_each
from vlmfast.reduce.methods import Method
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.reduced_image import ReducedImage
from vlmfast.reduce.text import MASK, Text, Texts, special_ids, text_columns, texts_of

FILLS = {"mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100}  # padding value of each input
# arguments that describe the columns of a prompt and are not rewritten here
REFUSED = ("inputs_embeds", "mm_encoder_outputs", "shift_labels", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position")


@dataclass(frozen=True)
class ShortenedPrompt:
    """A prompt whose visual tokens were reduced; its cache remembers it, and reports describe it."""

    ids: Tensor  # (B, L) the full prompt
    columns: Columns  # those that the language model sees
    rope_deltas: Tensor | None  # (B, 1) from the end of the short prompt to the next position, or None
    # the images and then the videos of each sample, without those that were already in the cache
    samples: list[list[ReducedImage]]

    @property
    def images(self) -> list[ReducedImage]:
        """All images, in the order of their placeholders."""
        return self.of_kind("image")

    @property
    def videos(self) -> list[ReducedImage]:
        """All videos, in the order of their placeholders."""
        return self.of_kind("video")

    def of_kind(self, kind: str) -> list[ReducedImage]:
        """All images or videos of one kind."""
        return [image for sample in self.samples for image in sample if image.kind == kind]

    def lengthen(self, ids: Tensor, samples: Sequence[int] | None = None) -> Tensor:
        """(B', N + n) ids that begin with the short prompt -> (B', L + n) that begin with the full one.

        B' is B, or a multiple of it where each sample has several rows, or the number of ``samples``.
        """
        full = self.ids if samples is None else self.ids[list(samples)]
        full = full.to(ids.device).repeat_interleave(ids.shape[0] // full.shape[0], 0)
        return torch.cat([full, ids[:, self.columns.index.shape[1] :]], 1)

    def detach(self) -> ShortenedPrompt:
        """Return it without gradients."""
        return replace(self, samples=[[image.detach() for image in sample] for sample in self.samples])

    def without_images(self) -> ShortenedPrompt:
        """Return it without images, for a cache: features are large, and the cache holds their keys and values."""
        return replace(self, samples=[[] for _ in self.samples])

    def repeat(self, times: int) -> ShortenedPrompt:
        """Return it with each sample repeated."""
        return self if times == 1 else self.select(torch.arange(len(self.ids)).repeat_interleave(times))

    def select(self, samples: Tensor | Sequence[int]) -> ShortenedPrompt:
        """Return the prompt of these samples, given as numbers or as a mask."""
        chosen = samples.cpu() if isinstance(samples, Tensor) else list(samples)
        rows: list[int] = torch.arange(len(self.ids))[chosen].tolist()
        deltas = None if self.rope_deltas is None else self.rope_deltas[rows]
        return ShortenedPrompt(self.ids[rows], self.columns.select(rows), deltas, [self.samples[row] for row in rows])

    def crop(self, held: int) -> ShortenedPrompt:
        """Return what a cache holds of it after cropping to ``held`` columns of the short prompt.

        Raises:
            ValueError: if other columns than these were cropped away, as a reduced image ends among them.
        """
        removed = self.columns.index.shape[1] - held
        if removed <= 0:
            return self
        index, total = self.columns.index, self.columns.total - removed
        if not bool((index[:, held:] == torch.arange(total, self.columns.total, device=index.device)).all()):
            raise ValueError(
                f"past_key_values must hold the images of its prompt: it was cropped by {removed} columns of the "
                f"prompt, where visual tokens were left out"
            )
        columns = replace(self.columns, index=index[:, :held], valid=self.columns.valid[:, :held], total=total)
        return replace(self, ids=self.ids[:, :total], columns=columns)


def named(arguments: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the arguments that have one of these names and are not None."""
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's own parameters."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "kwargs")]


def takes_features(base_class: type[Any]) -> bool:
    """Tell whether these models take encoded images, as ``mm_encoder_outputs``."""
    return "mm_encoder_outputs" in inspect.signature(base_class.forward).parameters


def shorten(
    model: Any,
    reducer: Reducer,
    method: Method,
    arguments: Mapping[str, Any],
    cached: ShortenedPrompt | None = None,
) -> tuple[ShortenedPrompt, dict[str, Any]]:
    """Encode and reduce the images and videos, and rewrite the prompt.

    Args:
        model: a model with its head.
        reducer: the reducer of its type.
        method: how visual tokens are reduced.
        arguments: those of ``forward`` or ``generate``, by name, with ``input_ids`` of the full prompt.
        cached: the prompt that the cache holds, or None if it is empty.

    Returns:
        The prompt, and the arguments for the short one: without the vision inputs, and with ``mm_encoder_outputs`` if
        there are images. In a transformers without that argument, its value is the prompt itself.
    """
    check(arguments)
    base = model.base_model
    ids: Tensor = arguments["input_ids"]
    given = arguments.get("attention_mask")
    full_mask = torch.ones_like(ids) if given is None else given
    methods = method_of_each(reducer, method, arguments)
    start = 0 if cached is None else cached.columns.total
    samples, visual = _encode_all(model, reducer, methods, arguments, start)
    columns = drop_columns(full_mask[:, start:].bool(), *visual)
    if cached is not None:
        columns = cached.columns.then(columns)
    names = {"input_ids", "position_ids", "second_per_grid_ts", MASK}
    names = names.union(*(_vision(base, kind, arguments) for kind in methods))
    short = {name: value for name, value in arguments.items() if name not in names}
    short["input_ids"] = columns.take(ids, _padding(model))
    for name, rows in named(short, FILLS).items():
        missing = ids.shape[1] - rows.shape[1]
        if missing and (missing < 0 or cached is None or any(samples)):
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(ids.shape)}, where visual tokens are reduced, got "
                f"{tuple(rows.shape)}"
            )
        # the ones of the first turn may be given again: only text follows its images
        rows = nn.functional.pad(rows, (0, missing), value=FILLS[name])
        short[name] = columns.take(rows, FILLS[name])
        if name == "labels" and arguments.get("num_items_in_batch") is not None:
            lost = int((rows != FILLS[name]).sum() - (short[name] != FILLS[name]).sum())
            if lost:
                raise ValueError(
                    f"labels must be -100 at the visual tokens that are left out where num_items_in_batch is given, "
                    f"which counts them: {lost} are not"
                )
    mask = columns.take(full_mask, 0)
    if given is not None or columns.padded:
        short["attention_mask"] = mask
    deltas = None if cached is None else cached.rope_deltas
    if any(samples) or arguments.get("position_ids") is not None:
        positions, deltas = (
            _smaller_positions(base, arguments, short, mask, method)
            if isinstance(method, SmallerImage) and hasattr(base, "get_rope_index")
            else _positions(base, arguments, full_mask, mask, columns, deltas)
        )
        if positions is not None:
            short["position_ids"] = positions
    elif deltas is not None:
        short["position_ids"] = positions_after(mask, deltas)
    prompt = ShortenedPrompt(ids, columns, deltas, samples)
    if any(samples):
        short["mm_encoder_outputs"] = prompt
        if takes_features(type(base)):
            short["mm_encoder_outputs"] = {
                kind.name: image_output(base, reducer, own) for kind in KINDS if any(own := kind.of(samples))
            }
    return prompt, short


def _vision(base: Any, kind: Kind, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a kind's encoder; up to transformers 5.17 some call videos pixel_values."""
    return named(arguments, [*parameters(kind.encoder(type(base))), kind.pixels])


def asking(model: Any, arguments: Mapping[str, Any]) -> Tensor:
    """(B, L) bool: the columns of the text that asks about a prompt's images, see `text_columns`."""
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    return text_columns(ids, mask, is_placeholder(ids, model.config), special_ids(model), arguments.get(MASK))


def _encode_all(
    model: Any, reducer: Reducer, methods: Mapping[Kind, Method], arguments: Mapping[str, Any], start: int
) -> tuple[list[list[ReducedImage]], list[tuple[Tensor, list[ReducedImage]]]]:
    """Encode the images and videos of each sample behind the first ``start`` columns, which are cached.

    Returns:
        The images and videos of each sample, and those of each kind with the places of their placeholders.
    """
    base, ids = model.base_model, arguments["input_ids"]
    samples: list[list[ReducedImage]] = [[] for _ in ids]
    visual = []
    places = [ids == kind.placeholder(base.config) for kind in methods]
    counts = [place[:, part].sum(1) for place in places for part in (slice(start), slice(start, None))]
    asked: list[list[int]] = torch.stack(counts).tolist() if counts else []
    for kind, place, cached, new in zip(methods, places, asked[::2], asked[1::2], strict=True):
        vision, texts = _vision(base, kind, arguments), _texts(model, kind, arguments, cached, new)
        found = _encode(base, reducer, kind, methods[kind], vision, texts, cached, new)
        samples = [before + own for before, own in zip(samples, found, strict=True)]
        if own := [image for sample in found for image in sample]:
            visual.append((place[:, start:], own))
    return samples, visual


def _texts(model: Any, kind: Kind, arguments: Mapping[str, Any], cached: list[int], new: list[int]) -> Texts:
    """Make the function that returns the text of each image, for methods that read it."""

    def of(totals: Sequence[int]) -> Callable[[], Text]:
        def text() -> Text:
            numbers = dealt(totals, cached, new, kind.mismatch)
            samples = [sample for sample, parts in enumerate(numbers) for part in parts for _ in part]
            embed = model.base_model.get_input_embeddings()
            return texts_of(embed, arguments["input_ids"], asking(model, arguments), samples)

        return functools.cache(text)

    return of


def _encode(
    base: Any,
    reducer: Reducer,
    kind: Kind,
    method: Method,
    vision: dict[str, Any],
    texts: Texts,
    cached: list[int],
    new: list[int],
) -> list[list[ReducedImage]]:
    """Encode the images of each sample, given its numbers of placeholders in the cache and after it."""
    reduce = kind.reduce(reducer)
    if reduce is None or (any(cached) and not any(new)):
        return [[] for _ in new]  # cached images are not encoded again
    if not any((*cached, *new)):
        raise ValueError(f"{kind.mismatch}: there are {kind.name}s and no placeholders")
    with at_hand(base):  # such as the newline of LLaVA-NeXT
        if isinstance(method, SmallerImage):
            images = reducer.reduce_smaller(base, vision, method)
        else:
            images = reduce(base, vision, method, texts)
    for image in images:
        if image.features.shape[0] > image.total:
            raise ValueError(
                f"{method} makes {image.features.shape[0]} tokens of {kind.one} that has {image.total} placeholders"
            )
    samples = new_images(images, cached, new, kind.mismatch)
    if hasattr(base, "get_rope_index") and any(cached) and len(images) == sum(map(len, samples)):
        raise ValueError(
            f"the {kind.name}s must be those of the whole conversation, also those in the cache: the positions after "
            f"{kind.one} depend on its size"
        )
    return samples


def check(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that `shorten` cannot rewrite."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = "none" if ids is None else type(ids).__name__ if not isinstance(ids, Tensor) else tuple(ids.shape)
        raise ValueError(f"input_ids must be a tensor (B, L) where visual tokens are reduced, got {got}")
    if mask is not None and getattr(mask, "shape", None) != ids.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, where visual tokens are reduced, "
            f"got {got}"
        )
    text = arguments.get(MASK)
    if text is not None and getattr(text, "shape", None) != ids.shape:
        got = tuple(text.shape) if isinstance(text, Tensor) else f"a {type(text).__name__}"
        raise ValueError(f"{MASK} must have the shape of input_ids, {tuple(ids.shape)}, got {got}")
    for name in named(arguments, REFUSED):
        raise ValueError(f"{name} cannot be given where visual tokens are reduced: it belongs to the full prompt")
    if isinstance(arguments.get("logits_to_keep"), Tensor):
        raise ValueError("logits_to_keep must be an int where visual tokens are reduced, got a tensor of positions")


def _padding(model: Any) -> int:
    """Return a token id for padding that is not a placeholder's."""
    visual = [kind.placeholder(model.config) for kind in KINDS]
    configs = getattr(model, "generation_config", None), model.config.get_text_config()
    choices = (getattr(config, "pad_token_id", None) for config in configs)
    return next(pad for pad in (*choices, 0, 1) if isinstance(pad, int) and pad >= 0 and pad not in visual)


def _positions(
    base: Any, arguments: Mapping[str, Any], full_mask: Tensor, mask: Tensor, columns: Columns, deltas: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the positions of the short prompt, or None if the model counts them itself, and its ``rope_deltas``.

    With M-RoPE tokens keep their positions in the full prompt, and what follows continues from there. In other models
    the tokens that are left are counted again.
    """
    given = arguments.get("position_ids")
    if not hasattr(base, "get_rope_index"):
        return (None if given is None else without_gaps(given.expand_as(full_mask), columns)), None
    names = parameters(type(base).get_rope_index)
    if given is not None:
        rows = columns.take(given, 0)
        if given.dim() == 3 and given.shape[0] == 4:
            # the first row counts the text alone: gaps in it mean packed samples to transformers
            rows[0] = without_gaps(given[0], columns)
        return rows, deltas
    if "mm_token_type_ids" in names and arguments.get("mm_token_type_ids") is None:
        raise ValueError("mm_token_type_ids must be given beside images, as the processor does: they tell positions")
    found, deltas = base.get_rope_index(**{**named(arguments, names), "attention_mask": full_mask})
    # the next position is further away from the end of the short prompt
    deltas = deltas + full_mask.sum(1, keepdim=True) - mask.sum(1, keepdim=True)
    text = (mask.cumsum(1) - 1).clamp(min=0)
    return torch.cat([text[None], columns.take(found, 0)]), deltas


def _smaller_positions(
    base: Any, arguments: Mapping[str, Any], short: Mapping[str, Any], mask: Tensor, method: SmallerImage
) -> tuple[Tensor, Tensor]:
    """Return the M-RoPE positions and ``rope_deltas`` of a prompt with smaller pictures."""
    if arguments.get("position_ids") is not None:
        raise ValueError(f"position_ids cannot be given beside {method}: they are those of the pictures as they were")
    names = parameters(type(base).get_rope_index)
    own = {**named(arguments, names), **named(short, names), "attention_mask": mask}
    if own.get("image_grid_thw") is not None:
        own["image_grid_thw"] = smaller_grids(base, own["image_grid_thw"], method)
    found, deltas = base.get_rope_index(**own)
    text = (mask.cumsum(1) - 1).clamp(min=0)
    return torch.cat([text[None], found]), deltas


def positions_after(mask: Tensor, rope_deltas: Tensor) -> Tensor:
    """(B, N) mask of a short prompt and the text after it -> (4, B, N) positions, which are valid for the text only.

    As in transformers the first row counts the tokens, and the others are the positions of M-RoPE.
    """
    text = (mask.cumsum(1) - 1).clamp(min=0)
    return torch.stack([text, *[text + rope_deltas.to(text.device)] * 3])


def image_output(base: Any, reducer: Reducer, samples: list[list[ReducedImage]], times: int = 1) -> Any:
    """Return reduced images or videos in the form of ``get_image_features``, with each sample ``times`` times."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    images = [image for sample in samples for _ in range(times) for image in sample]
    rows: Any = [image.features for image in images]
    if images[0].kind == "video":
        if reducer.videos_end_with_newline:  # videos have one size, and up to 5.17 forward itself appends it
            rows = torch.stack(rows if takes_features(type(base)) else [row[:-1] for row in rows])
    elif reducer.one_tensor:
        # images of several sizes are split into blocks of one size, none of which spans two images
        size = max(1, math.gcd(*(row.shape[0] for row in rows)))
        rows = torch.cat(rows).view(-1, size, rows[0].shape[1])
    module = sys.modules[type(base).__module__]
    if not images[0].levels:
        return BaseModelOutputWithPooling(pooler_output=rows)
    levels: Any = [list(level) for level in zip(*(image.levels for image in images), strict=True)]
    if not takes_features(type(base)):
        levels = [torch.cat(level) for level in levels]
    return module.BaseModelOutputWithDeepstackFeatures(pooler_output=rows, deepstack_features=levels)
