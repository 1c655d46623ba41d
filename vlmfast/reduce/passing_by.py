"""Refuse images that pass by the ``forward`` that shortens prompts.

A trainer may replace that ``forward`` on the instance, by one that computes a loss from the hidden states of the model
below: TRL's `SFTTrainer` and Liger do. Such a model would be trained on full prompts without a word. Within a graph of
torch.compile nothing is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vlmfast.reduce.encoded_images import Encoded
from vlmfast.reduce.families import Reducer
from vlmfast.reduce.kinds import brought
from vlmfast.reduce.prompt import parameters
from vlmfast.torch_internals import is_compiling

_INSIDE: ContextVar[bool] = ContextVar("vlmfast_inside", default=False)  # a forward that shortens prompts


@contextmanager
def entered() -> Iterator[None]:
    """Note for the block that a call came through the ``forward`` of the model with its head."""
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)


def refusing(forward: Callable[..., Any], reducer: Reducer, whole: str, shortens: bool) -> Callable[..., Any]:
    """Have the ``forward`` of the model below refuse images that do not come through the model with its head.

    Args:
        forward: of the model below.
        reducer: of the model.
        whole: the name of the class of the model with its head.
        shortens: whether a method reduces the tokens before the language model, so that `compress_inputs` can.

    Raises:
        RuntimeError: by the method that is returned.
    """
    names = parameters(forward)
    instead = ", and shorten each batch by vlmfast.compress_inputs" if shortens else ""

    @functools.wraps(forward)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or _INSIDE.get():
            return forward(self, *args, **kwargs)
        arguments = {**dict(zip(names, args)), **kwargs}  # noqa: B905
        kinds = [kind for kind in brought(reducer, arguments) if not isinstance(arguments[kind.pixels], Encoded)]
        if kinds:
            raise RuntimeError(
                f"{kinds[0].pixels} came to {type(self).__name__} without the forward of {whole} that reduces visual "
                "tokens: where a trainer replaces that forward (TRL's SFTTrainer and Liger do, for their losses), "
                f"patch without reduce{instead}; to call {type(self).__name__} itself, undo the patch"
            )
        return forward(self, *args, **kwargs)

    return method
