"""A ``forward`` that takes encoded images, for transformers 5.17, whose own does not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmfast.reduce.families import Reducer
from vlmfast.reduce.kinds import KINDS, Kind
from vlmfast.reduce.prompt import ShortenedPrompt, image_output


@dataclass(frozen=True)
class Encoded:
    """Encoded images or videos on their way through the ``pixel_values`` of a forward."""

    output: Any

    def size(self, dim: int) -> int:
        """Return a size that tells LLaVA-NeXT that there are images."""
        return 1


def forward_with_features(original: Callable[..., Any], reducer: Reducer) -> Callable[..., Any]:
    """Make a ``forward`` of transformers 5.17 take a shortened prompt as ``mm_encoder_outputs``, as later ones do."""
    signature = inspect.signature(original)
    *others, last = signature.parameters.values()  # that is **kwargs
    added = inspect.Parameter("mm_encoder_outputs", inspect.Parameter.KEYWORD_ONLY, default=None)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, mm_encoder_outputs: ShortenedPrompt | None = None, **kwargs: Any) -> Any:
        # generate passes it to every step; only a prompt has several tokens
        if mm_encoder_outputs is not None and kwargs["input_ids"].shape[1] > 1:
            samples = mm_encoder_outputs.samples
            times = kwargs["input_ids"].shape[0] // len(samples)  # beams
            for kind in KINDS:
                if any(own := kind.of(samples)):
                    kwargs[kind.pixels] = Encoded(image_output(self.base_model, reducer, own, times))
        return original(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*others, added, last])  # type: ignore[attr-defined]
    return forward


def features_of(cls: type, kind: Kind) -> Callable[..., Any]:
    """Make a ``get_image_features`` or ``get_video_features`` return what is already encoded."""
    original = kind.encoder(cls)

    @functools.wraps(original)
    def get_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Encoded):
                return value.output
        return original(self, *args, **kwargs)

    return get_features
