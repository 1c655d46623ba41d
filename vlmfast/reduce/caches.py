"""A cache that remembers which shortened prompt it holds, so that the next turn can be given the full ids again.

Its class becomes a subclass of the same name. Copies keep the prompt too. Repeating, selecting and cropping rows of the
cache does the same to the prompt. A model that is not patched cannot continue from it, because it would count columns
that are not there.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.reduce.columns import Columns
from vlmfast.reduce.cuts.tap import RUN
from vlmfast.reduce.prompt import ShortenedPrompt
from vlmfast.torch_internals import is_compiling

# (layer, column, its keys (B, H, D)) of the last prompts that were shortened, see `refuse_rebuilt`
_LAST: deque[tuple[int, int, Tensor]] = deque(maxlen=16)
_CHECKED = "vlmfast_checked"  # an attribute of caches that `refuse_rebuilt` let pass


class Extended:
    """A base that adds memory to the class of a cache, which is the last base of the new class."""

    original_class: ClassVar[type]
    mixins: ClassVar[tuple[type, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the original class, because this one cannot be imported."""
        return _restored, (self.original_class, self.mixins), vars(self)

    def __iter__(self) -> Any:
        """Refuse: who iterates makes another cache of the layers, which would not know the prompt."""
        raise RuntimeError(
            "past_key_values holds a prompt whose visual tokens were reduced, which a cache made of its layers would "
            "not know: copy it with copy.deepcopy, or read past_key_values.layers"
        )


class HoldsCuts(Extended):
    """A cache whose layers hold different columns, because visual tokens were cut between them."""

    held_columns: Mapping[int, Columns]  # layer -> its columns, and those of the layers up to the next key

    def _select(self, samples: Sequence[int]) -> None:
        self.held_columns = {layer: columns.select(list(samples)) for layer, columns in self.held_columns.items()}

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Write, if the model that writes knows the columns."""
        if RUN.get() is None:
            raise RuntimeError(
                "past_key_values holds a prompt whose visual tokens were cut between layers: only a model patched with "
                "reduce=... can continue it"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the cache and of the columns."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = len(next(iter(self.held_columns.values())).index)
        self._select([row for row in range(rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Select rows of the cache and of the columns."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        rows = torch.arange(len(next(iter(self.held_columns.values())).index))
        self._select(rows[indices.cpu() if isinstance(indices, Tensor) else list(indices)].tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the cache and of the columns."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.held_columns = {layer: columns.reorder(beam_idx) for layer, columns in self.held_columns.items()}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: to crop to one length would remove different tokens from each layer."""
        raise RuntimeError("past_key_values cannot be cropped where its visual tokens were cut between layers")

    def reset(self) -> None:
        """Reset the cache and forget the columns."""
        super().reset()  # type: ignore[misc]
        _without(self, HoldsCuts)
        del self.held_columns


class KeepsPrompt(Extended):
    """A cache that remembers a shortened prompt."""

    shortened_prompt: ShortenedPrompt

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the cache and of the prompt."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.shortened_prompt = self.shortened_prompt.repeat(repeats)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Select rows of the cache and of the prompt."""
        selected = self.shortened_prompt.select(indices)
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.shortened_prompt = selected

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the cache and of the prompt."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.shortened_prompt = self.shortened_prompt.select(beam_idx)

    def reset(self) -> None:
        """Reset the cache and forget the prompt."""
        super().reset()  # type: ignore[misc]
        release(self)


def _refuse(self: KeepsPrompt, *args: Any, **kwargs: Any) -> Any:
    """Replace the methods that a model writes with; `lent` restores them while a patched model runs."""
    raise RuntimeError(
        "past_key_values holds a prompt whose visual tokens were reduced: only a model patched with reduce=... can "
        "continue it"
    )


@functools.cache
def _extended(cls: Any, mixins: tuple[type, ...]) -> Any:
    writing: dict[str, Any] = {}
    if KeepsPrompt in mixins:
        # linear attention asks for a previous state or gets it first, and then writes into it in place
        writing = {name: _refuse for name in dir(cls) if name.startswith("update") or name.endswith("_state")}
    passing = {"__module__": cls.__module__, "__doc__": cls.__doc__, "original_class": cls, "mixins": mixins}
    return type(cls.__name__, (*mixins, cls), {**passing, **writing})


def _with(cache: Any, mixin: type) -> None:
    """Add a base to the class of the cache."""
    if not isinstance(cache, mixin):
        cls, mixins = (cache.original_class, cache.mixins) if isinstance(cache, Extended) else (type(cache), ())
        cache.__class__ = _extended(cls, (mixin, *mixins))


def _without(cache: Any, mixin: type) -> None:
    """Remove that base again."""
    mixins = tuple(other for other in cache.mixins if other is not mixin)
    cache.__class__ = _extended(cache.original_class, mixins) if mixins else cache.original_class


def _restored(cls: type, mixins: tuple[type, ...]) -> Any:
    extended = _extended(cls, mixins)
    return extended.__new__(extended)


def held_by(cache: Any) -> Mapping[int, Columns] | None:
    """Return the columns that the layers of the cache hold, or None if nothing was cut between them."""
    return getattr(cache, "held_columns", None)


def hold(cache: Any, columns: Mapping[int, Columns]) -> None:
    """Make the cache, if there is one, remember which columns its layers hold."""
    if cache is not None:
        _with(cache, HoldsCuts)
        cache.held_columns = columns


def kept_by(cache: Any) -> ShortenedPrompt | None:
    """Return the prompt that the cache remembers, or None."""
    return getattr(cache, "shortened_prompt", None)


def keep(cache: Any, prompt: ShortenedPrompt) -> None:
    """Make the cache, if there is one, remember the prompt."""
    if cache is not None:
        _with(cache, KeepsPrompt)
        cache.shortened_prompt = prompt


def keep_new(cache: Any, prompt: ShortenedPrompt) -> None:
    """Make the cache, if there is one, remember the prompt that it was filled with; `refuse_rebuilt` knows its keys."""
    keep(cache, prompt)
    if cache is None or not prompt.columns.dropped:
        return
    last, held = prompt.columns.index.shape[1] - 1, int(cache.get_seq_length())
    for number, layer in reversed(list(enumerate(cache.layers))):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2] >= held > last:  # not quantised, no window
            _LAST.append((number, last, keys[:, :, last].detach().clone()))
            return


def release(cache: Any) -> ShortenedPrompt | None:
    """Turn the cache into one of its original class, and return the prompt that it remembered."""
    if not isinstance(cache, KeepsPrompt):
        return None
    _without(cache, KeepsPrompt)
    setattr(cache, _CHECKED, True)
    prompt: ShortenedPrompt = vars(cache).pop("shortened_prompt")
    return prompt


def refuse_rebuilt(cache: Any) -> None:
    """Refuse a cache that does not remember the shortened prompt that its layers hold.

    It was made of the layers of another. The last keys of a prompt in a late layer depend on all of it, so that equal
    ones are of the same short prompt. They are compared once for each cache that comes filled, where the host waits.

    Raises:
        ValueError: for a cache with keys of one of the last shortened prompts.
    """
    if not _LAST or is_compiling() or not hasattr(cache, "layers") or getattr(cache, _CHECKED, False):
        return
    for number, last, rows in tuple(_LAST) if int(cache.get_seq_length()) else ():
        keys = getattr(cache.layers[number], "keys", None) if number < len(cache.layers) else None
        if not isinstance(keys, Tensor) or keys.dim() != 4 or keys.shape[2] <= last:
            continue
        own = keys[:1, :, last]
        alike = own.shape[1:] == rows.shape[1:] and own.dtype == rows.dtype and own.device == rows.device
        if alike and bool((own == rows).flatten(1).all(1).any()):
            raise ValueError(
                "past_key_values was made of the layers of a cache whose visual tokens were reduced, and does not know "
                "the prompt that they hold: copy that cache with copy.deepcopy"
            )
    setattr(cache, _CHECKED, True)


@contextmanager
def lent(cache: Any) -> Iterator[ShortenedPrompt | None]:
    """Release the cache within a block; afterwards it remembers the prompt again, unless it was given another one.

    If the cache was cropped, the prompt is too.

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
