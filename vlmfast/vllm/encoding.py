"""Shared by the reduced models: the methods of images, calls of the tower that fit its memory, and its attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vlmfast.reduce.kinds import method_for
from vlmfast.reduce.methods import Method
from vlmfast.reduce.towers import EncodedImages, recorded
from vlmfast.vllm.naming import KEY
from vlmfast.vllm.processing import FIELDS, decode_text, method_of, reduced_as
from vlmfast.vllm.registration import replaces


class ReducedEncoder:
    """Mixin for vLLM's models. A family passes the sizes of images, or videos, to `pieces`."""

    overridden: ClassVar[tuple[str, ...]] = ("embed_multimodal", "_process_image_input")  # of vLLM's model
    config: Any
    _methods: Mapping[str, Sequence[Method]] = MappingProxyType({})  # of the images, or videos, of the current call

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__mro__[1:]:
            if not base.__module__.startswith("vlmfast.") and issubclass(base, nn.Module) and base is not nn.Module:
                for name in cls.overridden:
                    replaces(name, base)
                break

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        # vLLM counts the encoder's output, which is shorter here: without a limit a call gets many times the images
        self._most_tokens: int = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images and videos, each with its own method."""
        texts = {kind: kwargs.pop(field, ()) for kind, field in FIELDS.items()}
        self._methods = {
            kind: [method_of(self.config, decode_text(row)) for row in rows] for kind, rows in texts.items()
        }
        try:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        finally:
            del self._methods

    def methods_of(self, count: int, kind: str = "image") -> list[Method]:
        """Return the methods of so many images or videos, those that `embed_multimodal` was given."""
        given = self._methods.get(kind) or [method_of(self.config, getattr(self.config, KEY))] * count
        return [method_for(reduced_as(self.config, kind), method) for method in given]

    def pieces(self, tokens: Sequence[int]) -> Iterator[slice]:
        """Split images, given their numbers of tokens, into calls as large as those of the model without reduction.

        The same for videos.
        """
        start = held = 0
        for number, count in enumerate(tokens):
            if number > start and held + count > self._most_tokens:
                yield slice(start, number)
                start, held = number, 0
            held += count
        yield slice(start, len(tokens))


def mean_over_ranks(part: Tensor) -> Tensor:
    """Return the mean over the ranks of tensor parallelism, which have equally many heads, so that all choose alike."""
    size = get_tensor_model_parallel_world_size()
    return part if size == 1 else tensor_model_parallel_all_reduce(part.contiguous()) / size


@contextmanager
def attention_inputs(attention: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the rotated queries and keys of vLLM's encoder attention within a block, for any backend.

    Raises:
        RuntimeError: as `recorded`.
    """
    found: dict[str, Tensor] = {}
    with recorded(attention=attention) as calls:
        yield found
    args, kwargs, _ = calls["attention"]
    found.update(zip(("query", "key"), args, strict=False))
    found.update({name: kwargs[name] for name in ("query", "key") if name in kwargs})


@dataclass(frozen=True)
class EncodedByRank(EncodedImages):
    """Encoded images whose heads are divided over the ranks."""

    def scores(self) -> Tensor:
        """(B, N): the mean over all heads of the attention that each patch gets."""
        return mean_over_ranks(super().scores())

    def metric(self) -> Tensor:
        """(B, N, head_dim): the mean over all heads of the keys."""
        return mean_over_ranks(super().metric())


def check_tower(config: Any) -> None:
    """Raise unless `encode_crops` knows the tower of this configuration.

    Raises:
        ValueError: for another one, or features of several layers.
    """
    if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"the vision tower must be CLIP or SigLIP, got {config.vision_config.model_type}")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer must be one layer, got {config.vision_feature_layer}")


def encode_crops(tower: Any, pixels: Tensor) -> EncodedImages:
    """Run CLIP or SigLIP once; vLLM has built their layers up to the one that gives the features."""
    inner = tower.vision_model
    has_cls = hasattr(inner.embeddings, "class_embedding")
    run = functools.partial(tower, feature_select_strategy="full")
    return encode(run, inner.encoder.layers[-1].self_attn.attn, pixels, has_cls)


def encode(run: Callable[[Tensor], Tensor], attention: Any, pixels: Tensor, has_cls: bool) -> EncodedImages:
    """Run a tower once.

    Args:
        run: the tower, (B, ...) pixels -> (B, T, C).
        attention: vLLM's `MMEncoderAttention` of the scored layer.
        pixels: the images, or crops of images.
        has_cls: whether the first of the T tokens is a CLS token.
    """
    with attention_inputs(attention) as seen:
        hidden = run(pixels)
    query, key = (seen[name].view(*hidden.shape[:2], attention.num_heads, -1) for name in ("query", "key"))
    return EncodedByRank(pixels, hidden, hidden, query, key, attention.scale, has_cls)
