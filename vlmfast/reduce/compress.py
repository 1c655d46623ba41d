"""Inputs with fewer visual tokens for a model that is not patched, for callers with their own loop."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmfast.modules import hugging_face_model
from vlmfast.reduce.generation import reducible
from vlmfast.reduce.kinds import KINDS, brought, check_takes
from vlmfast.reduce.methods import LayerMethod, Method, told
from vlmfast.reduce.prompt import ShortenedPrompt, shorten, takes_features
from vlmfast.reduce.spelling import spelled
from vlmfast.reduce.text import MASK


def compress_inputs(model: nn.Module, inputs: Mapping[str, Any], method: Method | str) -> dict[str, Any]:
    """Encode and reduce the images and videos of a batch and shorten its prompt, for a model that is not patched.

    ``model(**short)`` and ``model.generate(**short)`` take what this returns; what ``generate`` returns begins with the
    short ids. With M-RoPE (Qwen-VL) ``position_ids`` are those that the tokens had, and the model is told how far from
    the end of the short prompt the next position is when it runs this prompt, or at once in a transformers without
    ``mm_encoder_outputs``: run each prompt there before the next is compressed. Inputs that were pickled do not know
    the model any more, and warn. Gradients reach the projector and the tower.

        short = vlmfast.compress_inputs(model, processor(...), vlmfast.VisionZip(dominant=54, contextual=10))
        loss = model(**short).loss

    Args:
        model: a Hugging Face model with its head, also inside PEFT, accelerate or DistributedDataParallel.
        inputs: the arguments of ``forward`` by name: ``input_ids``, ``pixel_values`` and what goes with it, and
            perhaps ``attention_mask``, ``labels``, ``position_ids``, ``mm_token_type_ids``. Others are passed on.
            ``text_mask`` (B, L) tells a method that chooses by text which columns are.
        method: how visual tokens are reduced; or its text, such as "scope:64".

    Returns:
        The inputs as they are where there are no images; otherwise with everything that follows the columns of the
        prompt shortened and the encoded images as ``mm_encoder_outputs``, for one call. In a transformers that has no
        such argument (5.17) with ``inputs_embeds`` in place of ``input_ids``: ``generate`` then returns the new ids
        alone.

    Raises:
        TypeError: if ``method`` is none, or ``inputs`` no mapping. ValueError: for a model or inputs whose visual
            tokens cannot be reduced.
    """
    method = spelled(method)
    if not isinstance(method, Method):
        between = isinstance(method, (LayerMethod, list, tuple))
        hint = "; only vlmfast.patch(model, reduce=...) cuts between layers" if between else ""
        raise TypeError(f"method must be one such as vlmfast.SCOPE(64), got {told(method)}{hint}")
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of the arguments of forward, got {type(inputs).__name__}")
    host, reducer = reducible(hugging_face_model(model))
    check_takes(reducer, method, type(host).__name__)
    if not brought(reducer, inputs):
        return {name: value for name, value in inputs.items() if name != MASK}
    base = host.base_model
    prompt, short = shorten(host, reducer, method, inputs)
    if not takes_features(type(base)):
        if prompt.rope_deltas is not None:
            base.rope_deltas = prompt.rope_deltas
        return _with_embeddings(base, prompt, short)
    if prompt.rope_deltas is not None:
        short["mm_encoder_outputs"] = _telling(weakref.ref(base), prompt.rope_deltas)(short["mm_encoder_outputs"])
    return short


class _Telling(dict[str, Any]):
    """Encoded images that set the ``rope_deltas`` of a model with M-RoPE when it reads them.

    The model's own prefill does the same: it remembers them for one prompt, the last one that it ran.
    """

    base: ClassVar[weakref.ref[Any] | None]  # None where it was loaded
    rope_deltas: ClassVar[Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        base = None if self.base is None else self.base()
        if base is None:
            warnings.warn(
                "these compressed inputs were loaded, or their model is gone: before generate, set rope_deltas of the "
                "base model to that of mm_encoder_outputs",
                stacklevel=2,
            )
        else:
            base.rope_deltas = self.rope_deltas
        return super().get(key, default)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Telling:
        """Refer to the same model."""
        return type(self)(copy.deepcopy(dict(self), memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle without the model, and as a class that can be imported."""
        return _loaded, (self.rope_deltas, dict(self))


def _telling(base: weakref.ref[Any] | None, rope_deltas: Tensor) -> type[_Telling]:
    """Make a class for one model, because code that moves inputs to a device makes another mapping of their class."""
    return type("_Telling", (_Telling,), {"base": base, "rope_deltas": rope_deltas})


def _loaded(rope_deltas: Tensor, outputs: dict[str, Any]) -> _Telling:
    return _telling(None, rope_deltas)(outputs)


def _with_embeddings(base: Any, prompt: ShortenedPrompt, arguments: dict[str, Any]) -> dict[str, Any]:
    """Put the images and videos among the embeddings of the text."""
    others = {
        name: value for name, value in arguments.items() if name not in ("mm_encoder_outputs", "mm_token_type_ids")
    }
    ids: Tensor = others.pop("input_ids")
    if any(image.levels for sample in prompt.samples for image in sample):
        raise ValueError("compress_inputs for a model with DeepStack needs a transformers with mm_encoder_outputs")
    embeddings: Tensor = base.get_input_embeddings()(ids)
    for kind in KINDS:
        if images := prompt.of_kind(kind.name):
            mask = (ids == kind.placeholder(base.config))[..., None]
            rows = torch.cat([image.features for image in images]).to(embeddings)
            embeddings = embeddings.masked_scatter(mask, rows)
    return {**others, "inputs_embeds": embeddings}
