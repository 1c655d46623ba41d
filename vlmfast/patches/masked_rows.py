"""Replacements that call the masked-row ops: DeepStack and the placement of embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.checks import expect
from vlmfast.functions import accepting
from vlmfast.host import kept, notices_writes
from vlmfast.ops.masked_rows import deepstack_add, place_embeddings, row_index
from vlmfast.ops.masked_rows.definition import take_rows
from vlmfast.patches.residual import forget

# ---- DeepStack ----


def deepstack_process(self: Any, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Replace Qwen3VLTextModel._deepstack_process and its copies.

    transformers 4.57 adds in place, so its recorded ``output_hidden_states`` include the visual embeddings that are
    added after a layer. Here, as in transformers 5, they are the outputs of the layers.
    """
    # The caller may keep this tensor among its hidden states; the norm that follows reads the sum instead.
    forget(hidden_states)
    mask = visual_pos_masks.to(hidden_states.device)
    embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype)
    return accepting(deepstack_add, hidden_states)(hidden_states, _plain(mask), embeds, _shared_row_index(mask))


def wide_deepstack_process(self: Any, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Replace Qwen3OmniMoeThinkerTextModel._deepstack_process of transformers 4.57, whose mask is (B, T, D)."""
    return deepstack_process(self, hidden_states, visual_pos_masks[..., 0], visual_embeds)


def _plain(mask: Tensor) -> Tensor:
    """Return the mask as a plain tensor: Granite-Docling passes its `PlaceholderMask` on to DeepStack."""
    return mask[...] if isinstance(mask, PlaceholderMask) else mask


def _shared_row_index(mask: Tensor) -> Tensor | None:
    """Return the row index of a mask, cached on the mask, which all layers of a prefill receive.

    Returns None, so that the op finds the rows by itself, on a CPU, whose kernels need no index, and where a later
    write to the mask would go unnoticed.
    """
    return kept(mask, "_row_index", lambda mask: row_index(_plain(mask))) if notices_writes(mask) else None


# ---- placement of image, video and audio embeddings ----

# Functions by which callers bring a (B, T) mask to the shape of the embeddings. Their results stay placeholder masks.
_FITTING = (Tensor.unsqueeze, Tensor.expand_as, Tensor.to)


class PlaceholderMask(Tensor):
    """A bool mask of the placeholder tokens that makes ``masked_scatter`` call `place_embeddings`.

    Upstream's ``forward`` gets the mask from a method and calls ``inputs_embeds.masked_scatter(mask, features)``. The
    subclass replaces that one line without a copy of the whole ``forward``. The mask has the shape of upstream's:
    (B, T, 1), (B, T, D), or (B, T), which the caller expands to one of the others. Every other operation treats it as a
    plain tensor and returns plain tensors.
    """

    words = "Image features and image tokens"  # the beginning of upstream's message where their numbers differ

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run ``masked_scatter`` as `place_embeddings`, and anything else as on a plain tensor."""
        if func in (Tensor.masked_scatter, torch.masked_scatter):
            return _place(cls.words, *args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.masked_scatter_:
                return args[0].copy_(_place(cls.words, *args, **(kwargs or {})))
            result = func(*args, **(kwargs or {}))
            if func in _FITTING and isinstance(args[0], PlaceholderMask):
                return result.as_subclass(cls) if result.dim() == 3 and result.dtype == torch.bool else result
            return result

    def __deepcopy__(self, memo: dict[int, Any]) -> PlaceholderMask:
        """Copy the mask; ``Tensor.__deepcopy__`` would need a constructor of the subclass."""
        return self.as_subclass(Tensor).clone().as_subclass(type(self))


class VideoMask(PlaceholderMask):
    """A mask of the placeholder tokens of videos."""

    words = "Video features and video tokens"


class AudioMask(PlaceholderMask):
    """A mask of the placeholder tokens of audio."""

    words = "Audio features and audio tokens"


class TokenMask(PlaceholderMask):
    """A mask of a placeholder token whose modality the method does not know."""

    words = "Multimodal features and placeholder tokens"


MASKS = {"image": PlaceholderMask, "video": VideoMask, "audio": AudioMask}


def _place(words: str, input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Do what ``masked_scatter`` does; the parameters have torch's names, since callers may pass them by name."""
    if mask.dim() != 3 or not (mask.shape[2] == 1 or mask.stride(2) == 0):  # the mask does not select whole rows
        with torch._C.DisableTorchFunctionSubclass():
            return input.masked_scatter(mask, source)
    rows, features = mask[..., 0], source.reshape(-1, input.shape[-1])
    try:
        return accepting(place_embeddings, input)(input, rows, features)
    except ValueError as error:  # it names arguments of the op, which the user of a model does not know
        if (tokens := int(rows.sum())) == len(features):
            raise
        raise ValueError(f"{words} do not match, tokens: {tokens}, features: {len(features)}") from error


def placeholder_mask(
    self: Any, input_ids: Tensor | None, inputs_embeds: Any, token: int, cls: type[PlaceholderMask] = PlaceholderMask
) -> Tensor:
    """Find the positions of a token by its id or, without ids, by its embedding. Returns a (B, T, 1) mask."""
    if input_ids is not None:
        mask = input_ids == token if inputs_embeds is None else (input_ids == token).to(inputs_embeds.device)
        return _as_mask(mask.unsqueeze(-1), cls)
    ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
    return _as_mask((inputs_embeds == self.get_input_embeddings()(ids)).all(-1, keepdim=True), cls)


def _as_mask(mask: Tensor, cls: type[Tensor]) -> Tensor:
    """Make a mask a `PlaceholderMask`, unless it is a tracer's tensor: a graph keeps ``masked_scatter`` itself."""
    return mask.as_subclass(cls) if type(mask) is Tensor else mask


def masks(*kinds: str, owner: str = "config") -> Callable[..., Any]:
    """Make the replacement of a ``get_placeholder_mask`` for these kinds of placeholders, such as "image" and "video".

    Upstream's method compares the numbers of tokens and features, which makes the host wait for a GPU.
    `place_embeddings` compares them without waiting, so the replacement ignores the features that it is given.

    Args:
        *kinds: keys of `MASKS`, in the order in which the method returns their masks.
        owner: the attribute of the model that holds the token ids.
    """

    def replacement(
        self: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        tokens = [(getattr(getattr(self, owner), f"{kind}_token_id"), MASKS[kind]) for kind in kinds]
        found = [placeholder_mask(self, input_ids, inputs_embeds, token, cls) for token, cls in tokens]
        return found[0] if len(found) == 1 else tuple(found)

    replacement.__name__ = f"{'_'.join(kinds)}_mask{'' if len(kinds) == 1 else 's'}"
    return replacement


def expanded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make the same replacement with masks of shape (B, T, D)."""
    return _changed(function, lambda mask, embeds: mask.expand_as(embeds))


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make the same replacement with masks of shape (B, T)."""
    return _changed(function, lambda mask, embeds: _as_mask(mask[..., 0], type(mask)))


def _changed(function: Callable[..., Any], change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    @functools.wraps(function)
    def replacement(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = function(self, input_ids, inputs_embeds, *args, **kwargs)
        if isinstance(found, Tensor):
            return change(found, inputs_embeds)
        return tuple(change(mask, inputs_embeds) for mask in found)

    return replacement


def video_as_image_masks(
    self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Replace Glm4vModel.get_placeholder_mask and its copies, whose video frames have the image token among the ids."""
    token = self.config.video_token_id if input_ids is None else self.config.image_token_id
    images = placeholder_mask(self, input_ids, inputs_embeds, self.config.image_token_id)
    return images, placeholder_mask(self, input_ids, inputs_embeds, token, VideoMask)


def token_mask(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor, token_id: int) -> Tensor:
    """Replace MiniCPMV4_6Model.get_placeholder_mask and its copies, which take the token id as an argument."""
    return placeholder_mask(self, input_ids, inputs_embeds, token_id, TokenMask)


def placeholder_token_mask(
    self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor, placeholder_token_id: int
) -> Tensor:
    """Replace PocketTTSModel.get_placeholder_mask."""
    return placeholder_mask(self, input_ids, inputs_embeds, placeholder_token_id, TokenMask)


def merge_inputs(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, image_hidden_states: Tensor) -> Tensor:
    """Replace Idefics3Model.inputs_merger of transformers 5.23, which needs as many features as placeholders."""
    mask = placeholder_mask(self, input_ids, inputs_embeds, self.config.image_token_id)
    return inputs_embeds.masked_scatter(mask, image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype))


def merge_first_inputs(
    self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, image_hidden_states: Tensor
) -> Tensor:
    """Replace Idefics3Model.inputs_merger up to transformers 5.17, which ignores features without a placeholder.

    ``generate(image_hidden_states=...)`` passes all features again with every further token.
    """
    return _merge_first(self, input_ids, inputs_embeds, image_hidden_states, 1)


def merge_blocks(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, image_hidden_states: Tensor) -> Tensor:
    """Replace SmolVLMModel.inputs_merger up to transformers 5.17: as `merge_first_inputs`, block by block."""
    return _merge_first(self, input_ids, inputs_embeds, image_hidden_states, image_hidden_states.shape[1])


def _merge_first(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor, block: int) -> Tensor:
    """Place the first features, one per placeholder, without waiting for their number on the host.

    Raises:
        ValueError: if a sample's number of placeholders is no multiple of ``block``, or there are too few features.
    """
    mask = _plain(placeholder_mask(self, input_ids, inputs_embeds, self.config.image_token_id))
    rows = features.to(inputs_embeds.device, inputs_embeds.dtype).reshape(-1, inputs_embeds.shape[-1])
    counts = mask.sum(1)
    try:
        expect((counts % block == 0).all(), "At least one sample has <image> tokens not divisible by patch_size.")
        expect(counts.sum() <= rows.shape[0], "Image features and image tokens do not match: there are more tokens.")
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return torch.where(mask, take_rows(rows, row_index(mask[..., 0])), inputs_embeds)
