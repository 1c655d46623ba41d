"""A cache that keeps the shortened prompt it holds, so that the next turn may be given the full ids again.

Its class becomes a subclass of the same name. Copies keep the prompt as well, and repeating or selecting rows, or
cropping, does the same to the prompt. A model that is not patched cannot go on from it: it would count columns that are
not there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from vlmfast.reduce.prompt import ShortenedPrompt


class KeepsPrompt:
    """First base of the class of a cache that keeps a prompt; the second one is its own class."""

    original_class: ClassVar[type]
    shortened_prompt: ShortenedPrompt

    def __iter__(self) -> Any:
        """Refuse: layers are iterated over to make another cache of them, which would not know the prompt."""
        raise RuntimeError(
            "past_key_values holds a prompt whose visual tokens were reduced, which a cache made of its layers would "
            "not know: copy it with copy.deepcopy, or read past_key_values.layers"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, also of the prompt."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.shortened_prompt = self.shortened_prompt.repeat(repeats)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Select rows, also of the prompt."""
        selected = self.shortened_prompt.select(indices)
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.shortened_prompt = selected

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, also of the prompt."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.shortened_prompt = self.shortened_prompt.select(beam_idx)

    def reset(self) -> None:
        """Forget the prompt as well."""
        super().reset()  # type: ignore[misc]
        release(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the original class, as nobody could import this one."""
        return _restored, (self.original_class,), vars(self)


def _refuse(self: KeepsPrompt, *args: Any, **kwargs: Any) -> Any:
    """Take the place of what a model calls to write: `lent` takes the prompt off while a patched one runs."""
    raise RuntimeError(
        "past_key_values holds a prompt whose visual tokens were reduced: only a model patched with reduce=... can "
        "continue it"
    )


@functools.cache
def _keeping(cls: Any) -> Any:
    # linear attention asks for a previous state or gets it first, and then writes into it in place, without an update
    writing = {name: _refuse for name in dir(cls) if name.startswith("update") or name.endswith("_state")}
    passing = {"__module__": cls.__module__, "__doc__": cls.__doc__, "original_class": cls, **writing}
    return type(cls.__name__, (KeepsPrompt, cls), passing)


def _restored(cls: type) -> Any:
    keeping = _keeping(cls)
    return keeping.__new__(keeping)


def kept_by(cache: Any) -> ShortenedPrompt | None:
    """Return the prompt that the cache keeps."""
    return getattr(cache, "shortened_prompt", None)


def keep(cache: Any, prompt: ShortenedPrompt) -> None:
    """Have the cache, if there is one, keep the prompt."""
    if cache is not None:
        if not isinstance(cache, KeepsPrompt):
            cache.__class__ = _keeping(cache.__class__)
        cache.shortened_prompt = prompt


def release(cache: Any) -> ShortenedPrompt | None:
    """Make the cache as it was before it kept a prompt, and return the prompt."""
    if not isinstance(cache, KeepsPrompt):
        return None
    cache.__class__ = cache.original_class
    prompt: ShortenedPrompt = vars(cache).pop("shortened_prompt")
    return prompt


@contextmanager
def lent(cache: Any) -> Iterator[ShortenedPrompt | None]:
    """Release the cache for a block, after which it keeps the prompt again unless it was given another one.

    The prompt is as long as the cache, which may have been cropped.

    Raises:
        ValueError: if what was cropped away is not text at the end of the prompt.
    """
    prompt = release(cache)
    try:
        if prompt is not None:
            held = int(cache.get_seq_length())
            prompt = prompt.crop(held) if held else None
        yield prompt
    finally:
        if prompt is not None and kept_by(cache) is None:
            keep(cache, prompt)
