"""The ops on masked rows under the parameters of the upstream methods: DeepStack and the placement of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.ops.masked_rows import deepstack_add, place_embeddings, row_index
from vlmfast.patches.dtypes import accepting

# ---- DeepStack ----


def deepstack_process(self: Any, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    """Qwen3VLTextModel._deepstack_process and its copies.

    Transformers 4.57 adds in place. So do its recorded ``output_hidden_states`` contain what is added after a layer;
    here, as in transformers 5, they are the outputs of the layers.
    """
    mask = visual_pos_masks.to(hidden_states.device)
    embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype)
    return accepting(deepstack_add, hidden_states)(hidden_states, mask, embeds, _shared_row_index(mask))


def _shared_row_index(mask: Tensor) -> Tensor | None:
    """The row index of a mask, kept on the mask itself: the layers of one prefill are given the same one.

    None, which lets the op find its rows by itself, on a CPU, whose kernels need no index, and wherever a write to the
    mask would go unnoticed: inference tensors do not count their versions, and a traced or captured graph runs again
    without this code.
    """
    if mask.is_cpu or mask.is_inference() or torch.compiler.is_compiling():
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    version, index = getattr(mask, "_row_index", (None, None))
    if version != mask._version:
        index = row_index(mask)
        mask._row_index = mask._version, index  # type: ignore[attr-defined]
    return index


# ---- placement of image, video and audio embeddings ----


class PlaceholderMask(Tensor):
    """A (B, T, 1) bool mask of the placeholder tokens, with which ``masked_scatter`` is `place_embeddings`.

    Upstream's ``forward`` gets the mask from a method and hands it to ``inputs_embeds.masked_scatter(mask, features)``:
    so can that one line be replaced without a copy of the whole ``forward``. In every other operation it is a plain
    tensor and gives plain tensors.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run ``masked_scatter`` as `place_embeddings`, and anything else as it is."""
        if func in (Tensor.masked_scatter, torch.masked_scatter):
            return _place(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.masked_scatter_:
                return args[0].copy_(_place(*args, **(kwargs or {})))
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> PlaceholderMask:
        """Tensor's own would need a constructor."""
        return self.as_subclass(Tensor).clone().as_subclass(PlaceholderMask)


def _place(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """``masked_scatter``, under the names that torch gives its arguments."""
    try:
        return accepting(place_embeddings, input)(input, mask[..., 0], source.reshape(-1, input.shape[-1]))
    except ValueError as error:  # it names the op's arguments, which a model's user has not passed
        raise ValueError(f"placeholder tokens of input_ids and image features do not match: {error}") from error


def image_mask(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
    """LlavaModel.get_placeholder_mask and its copies.

    Upstream compares the numbers of tokens and of features here, which makes the host wait for a GPU.
    `place_embeddings` does so without waiting.
    """
    return placeholder_mask(self, input_ids, inputs_embeds, self.config.image_token_id)


def image_and_video_masks(
    self: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    image_features: Tensor | None = None,
    video_features: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Qwen2VLModel.get_placeholder_mask and its copies, as `image_mask`."""
    return (
        placeholder_mask(self, input_ids, inputs_embeds, self.config.image_token_id),
        placeholder_mask(self, input_ids, inputs_embeds, self.config.video_token_id),
    )


def merge_inputs(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, image_hidden_states: Tensor) -> Tensor:
    """Idefics3Model.inputs_merger, and up to transformers 5.17 that of SmolVLMModel, which goes block by block.

    Up to 5.17 ``generate(image_hidden_states=...)`` passes them along with every further token, where they have no
    place: such a call, with more rows than positions, is left to upstream, which ignores them.
    """
    if image_hidden_states.numel() > inputs_embeds.numel():
        merged: Tensor = type(self).original_class.inputs_merger(self, input_ids, inputs_embeds, image_hidden_states)
        return merged
    mask = placeholder_mask(self, input_ids, inputs_embeds, self.config.image_token_id)
    return inputs_embeds.masked_scatter(mask, image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype))


def placeholder_mask(self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, token: int) -> Tensor:
    """Where the token stands or, if there are no ids, where its embedding does."""
    if input_ids is not None:
        mask = (input_ids == token).unsqueeze(-1).to(inputs_embeds.device)
    else:
        ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
        mask = (inputs_embeds == self.get_input_embeddings()(ids)).all(-1, keepdim=True)
    # a tracer's tensor stays one: for it masked_scatter is an operator like any other
    return mask.as_subclass(PlaceholderMask) if type(mask) is Tensor else mask
