"""Images and videos, the two kinds of input that a prompt shows, and which of them a method reduces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.reduce.families import Reducer, no_crops
from vlmfast.reduce.methods import Method
from vlmfast.reduce.methods.even_tokens import EvenTokens
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.reduced_image import ReducedImage


@dataclass(frozen=True)
class Kind:
    """Images or videos, and the names of their arguments in transformers."""

    name: str
    pixels: str  # the argument that brings them

    @property
    def one(self) -> str:
        """The name with its indefinite article."""
        return f"{'an' if self.name == 'image' else 'a'} {self.name}"

    @property
    def mismatch(self) -> str:
        """The beginning of upstream's message, which callers may look for."""
        return f"{self.name.capitalize()} features and {self.name} tokens do not match"

    def encoder(self, base: Any) -> Callable[..., Any]:
        """Return the encoding method of a base model or its class."""
        found: Callable[..., Any] = getattr(base, f"get_{self.name}_features")
        return found

    def placeholder(self, config: Any) -> int:
        """Return the id of the placeholders, or -1 for a model without any."""
        return getattr(config, f"{self.name}_token_id", -1)

    def reduce(self, reducer: Reducer) -> Callable[..., list[ReducedImage]] | None:
        """Return the function that encodes and reduces this kind, or None if it cannot be reduced."""
        return reducer.reduce if self.name == "image" else reducer.reduce_videos

    def of(self, samples: Sequence[Sequence[ReducedImage]]) -> list[list[ReducedImage]]:
        """Return those of each sample that have this kind."""
        return [[image for image in sample if image.kind == self.name] for sample in samples]


KINDS = Kind("image", "pixel_values"), Kind("video", "pixel_values_videos")


def brought(reducer: Reducer, arguments: Mapping[str, Any]) -> list[Kind]:
    """Return the kinds that a call brings and that can be reduced."""
    return [kind for kind in KINDS if arguments.get(kind.pixels) is not None and kind.reduce(reducer) is not None]


def check_takes(reducer: Reducer, method: Method, name: str) -> None:
    """Raise unless the model of that name has a kind that the method reduces.

    Raises:
        ValueError: if it has not.
    """
    if not any(kind.name in method.takes and kind.reduce(reducer) is not None for kind in KINDS):
        raise ValueError(f"{method} reduces {_names(method.takes)}, and those of {name} cannot be reduced")
    if isinstance(method, SmallerImage) and reducer.shrink is None:
        raise ValueError(no_crops(method, name))


def method_of_each(reducer: Reducer, method: Method, arguments: Mapping[str, Any]) -> dict[Kind, Method]:
    """Return the method for each kind that a call brings: this one, or one that keeps all tokens.

    Raises:
        ValueError: if there is nothing that the method reduces.
    """
    given = brought(reducer, arguments)
    if given and not any(kind.name in method.takes for kind in given):
        raise ValueError(
            f"{method} reduces {_names(method.takes)}, and the prompt has {_names([kind.name for kind in given])} "
            f"alone: patch with a method for these"
        )
    return {kind: method_for(kind.name, method) for kind in given}


def method_for(kind: str, method: Method) -> Method:
    """Return the method for "image" or "video": this one, or one that keeps all tokens."""
    return method if kind in method.takes else EvenTokens(1.0)


def is_placeholder(ids: Tensor, config: Any, kinds: Iterable[Kind] = KINDS) -> Tensor:
    """(B, L) bool: true at the placeholders of these kinds."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for kind in kinds:
        found |= ids == kind.placeholder(config)
    return found


def lacking(ids: Tensor, config: Any, arguments: Mapping[str, Any]) -> Tensor:
    """(B, L) bool: true at the placeholders of kinds that a call does not bring."""
    return is_placeholder(ids, config, [kind for kind in KINDS if arguments.get(kind.pixels) is None])


def _names(kinds: Sequence[str]) -> str:
    return " and ".join(f"{kind}s" for kind in kinds)
