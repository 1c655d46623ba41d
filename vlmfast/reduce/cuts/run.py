"""One call of a language model whose visual tokens are cut between layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmfast.functions import accepting
from vlmfast.ops.attention_scores import last_row_attention
from vlmfast.ops.token_merge import top_tokens
from vlmfast.reduce.columns import Columns, squeezed
from vlmfast.reduce.cuts.masks import At, rewritten, take_rows
from vlmfast.reduce.methods import LayerMethod

Held = Mapping[int, Columns]  # layer -> its columns, and those of the layers up to the next key


@dataclass(frozen=True)
class Cut:
    """A cut of a call, at the input of a layer."""

    method: LayerMethod
    kept: list[int]  # the number of visual tokens of each sample that are left


class Raters(NamedTuple):
    """The words of a sample by which its visual tokens are chosen."""

    columns: Tensor  # (L,) int64, of all words of its text
    weights: Tensor  # (L,), equal for all raters, 0 for other words; their sum is 1


@dataclass
class Prompt:
    """The new columns of a call that brings images.

    Attributes:
        visual: (B, T) bool, the visual tokens that may be cut: not the masked ones.
        inside: (B, T) bool, everything but the padding at an end.
        valid: (B, past + T) bool, what the last token may see; None for everything.
        last: (B,) int64, the last column that is not padding.
        text: (B, T) bool, the text, if a method chooses by it.
        lengths: the length of each sample, without the padding at an end.
        counts: the number of visual tokens of each sample.
        words: the columns of the text of each sample.
        right: whether padding is on the right.
    """

    visual: Tensor
    inside: Tensor
    valid: Tensor | None
    last: Tensor
    text: Tensor
    lengths: list[int]
    counts: list[int]
    words: list[int]
    right: bool

    def left(self, kept: list[int]) -> list[int]:
        """Return the length of each sample with ``kept`` visual tokens left."""
        return [length - count + own for length, count, own in zip(self.lengths, self.counts, kept, strict=True)]


@dataclass
class Run:
    """A call of the language model, which calls the layers one after the other.

    Attributes:
        layers: the layers of the language model.
        held: the columns that the cache holds; layers before the first key hold all.
        at: the position and the setting of the call.
        cuts: layer -> the cut at its input.
        prompt: the new columns, or None without cuts.
    """

    layers: nn.ModuleList
    held: Held
    at: At
    cuts: dict[int, Cut] = field(default_factory=dict)
    prompt: Prompt | None = None
    tapped: nn.Module | None = None
    made: dict[int, Columns] = field(default_factory=dict)  # the columns that the cache will hold
    now: Columns | None = None  # the columns of this call that the layer sees, None for all
    keys: Columns | None = None  # those of the cache as well, None for all

    def __post_init__(self) -> None:
        self._numbers = {layer: number for number, layer in enumerate(self.layers)}
        self._row: Tensor | None = None
        self._raters: list[Raters | None] = []
        self._reading = False  # whether text chooses in the layer that is tapped
        self._given: tuple[Any, ...] = ()
        self._changed: dict[str, Any] = {}

    def call(
        self, layer: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a layer with the columns that are left for it."""
        number = self._numbers.get(layer)
        if number is None:
            return original(layer, *args, **kwargs)
        hidden, kwargs = (args[0], kwargs) if args else (kwargs["hidden_states"], without(kwargs, "hidden_states"))
        if len(args) > 1 or "position_embeddings" not in kwargs:
            raise ValueError(
                f"visual tokens cannot be cut between layers of {type(layer).__name__}: they are not given "
                f"hidden_states and, by name, position_embeddings"
            )
        if number == 0 and any(cut.method.reads_text for cut in self.cuts.values()):
            self._raters = raters(hidden, self.prompt)  # type: ignore[arg-type]
        if number in self.cuts:
            hidden = self._cut(number, hidden)
        elif number in self.held:
            self._enter(number)
        if self.keys is not None:
            kwargs = {**kwargs, **self._rewritten(kwargs)}
        following = self.cuts.get(number + 1)
        self.tapped = None if following is None else layer.self_attn  # type: ignore[assignment]
        self._reading = following is not None and following.method.reads_text
        output = original(layer, hidden, **kwargs)
        if number == len(self.layers) - 1 and self.now is not None:
            # a column that was left out gets the output of the last one before it, which predicts the same next token
            output = take_rows(output, self.now.latest())
        return output

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def see(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Take the attention of the last token of each sample, or of the words that say most about visual tokens."""
        prompt: Any = self.prompt
        now, keys, last = self.now, self.keys, prompt.last
        latest = None if now is None else now.latest()
        if latest is not None:
            last = latest.gather(1, last[:, None])[:, 0]
        samples = torch.arange(len(last), device=last.device)
        columns = self.at.past + self.at.tokens if keys is None else keys.index.shape[1]
        valid = prompt.valid
        if keys is not None:
            valid = keys.valid if valid is None else keys.take(valid, 0)
        row = accepting(last_row_attention, key)
        if self._reading:
            self._row = self._of_raters(query, key[:, :, :columns], valid, latest, scale)
            return
        valid = None if valid is None else valid.to(key.device)
        found = row(query[samples.to(query.device), :, last.to(query.device)], key[:, :, :columns], valid, scale)
        self._row = found.to(last.device)

    def _of_raters(
        self, query: Tensor, key: Tensor, valid: Tensor | None, latest: Tensor | None, scale: float | None
    ) -> Tensor:
        """(B, N): the mean attention of the raters of each sample, each to the columns before it."""
        batch, columns = len(key), key.shape[2]
        index = torch.arange(columns, device=key.device).expand(batch, -1)
        index = index if self.keys is None else self.keys.index.to(key.device)
        found = torch.zeros(batch, columns, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
        for sample, weighed in enumerate(self._raters):
            if weighed is None:
                continue
            words = weighed.columns
            rows = words if latest is None else latest[sample, words]
            seen = index[sample] <= self.at.past + words[:, None].to(key.device)
            if valid is not None:
                seen = seen & valid[sample].to(key.device)
            keys = key[sample].expand(len(words), -1, -1, -1)  # a view: all raters see the same keys
            attention = accepting(last_row_attention, key)(
                query[sample, :, rows.to(query.device)].transpose(0, 1), keys, seen, scale
            )
            found[sample] = weighed.weights.to(attention) @ attention
        return found.to(self.prompt.last.device)  # type: ignore[union-attr]

    def _cut(self, number: int, hidden: Tensor) -> Tensor:
        """Leave out columns at the input of a layer."""
        row, self._row = self._row, None
        if row is None:
            attention = type(getattr(self.layers[number - 1], "self_attn", None)).__name__
            raise RuntimeError(
                f"visual tokens cannot be cut at layer {number}: {attention} of the layer before did not call an "
                f"attention function of transformers"
            )
        prompt: Any = self.prompt
        all_now = Columns.all(prompt.visual) if self.now is None else self.now
        visual, inside = (all_now.take(flags, 0) for flags in (prompt.visual, prompt.inside))
        cut = self.cuts[number]
        scores = cut.method.scores(row)[:, -visual.shape[1] :]
        present = (inside & ~visual) | chosen(scores, visual, cut.kept)
        here = squeezed(present, prompt.left(cut.kept), prompt.right)
        self.now = here.of(all_now)
        self._enter(number)
        return take_rows(hidden, here.index)

    def _enter(self, number: int) -> None:
        """Set the columns of this layer."""
        before = max((layer for layer in self.held if layer <= number), default=None)
        self._given = ()
        if self.prompt is None:
            self.keys = None if before is None else self.held[before]
            return
        batch = self.prompt.visual
        new = Columns.all(batch) if self.now is None else self.now
        past = Columns.all(batch.new_empty(len(batch), self.at.past)) if before is None else self._up_to_here(before)
        self.keys = self.made[number] = past.then(new)

    def _up_to_here(self, layer: int) -> Columns:
        """Return the columns that a layer holds, and those of the text after them."""
        held = self.held[layer]
        since = held.index.new_empty(len(held.index), self.at.past - held.total)
        return held.then(Columns.all(since))

    def _rewritten(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Fit the other arguments to the columns, once for all layers that get the same ones."""
        given = tuple(kwargs.get(name) for name in ("attention_mask", "position_ids", "position_embeddings"))
        if len(self._given) != 3 or any(a is not b for a, b in zip(given, self._given, strict=True)):
            keys: Any = self.keys
            self._given, self._changed = given, rewritten(kwargs, self.now, keys, self.at)
        return self._changed


@torch.no_grad()  # type: ignore[untyped-decorator]
def raters(hidden: Tensor, prompt: Prompt) -> list[Raters | None]:
    """Weigh the words of each sample by what they say about its visual tokens, given the embeddings (B, T, D).

    Returns:
        The raters of each sample, None for one without visual tokens.
    """
    found: list[Raters | None] = []
    for sample, (count, words) in enumerate(zip(prompt.counts, prompt.words, strict=True)):
        if not count:
            found.append(None)
            continue
        flags = torch.stack([prompt.text[sample], prompt.visual[sample]]).to(torch.uint8)
        order = flags.argsort(dim=1, descending=True, stable=True)
        text, visual = order[0, :words].to(hidden.device), order[1, :count].to(hidden.device)
        rows = hidden[sample].to(torch.promote_types(hidden.dtype, torch.float32))
        shares = (rows[visual] @ rows[text].mT).softmax(1).mean(0)
        chosen = shares > shares.mean()
        chosen = chosen | ~chosen.any()
        found.append(Raters(text, chosen / chosen.sum()))
    return found


def without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments without one of them."""
    return {key: value for key, value in kwargs.items() if key != name}


def chosen(scores: Tensor, visual: Tensor, kept: list[int]) -> Tensor:
    """(B, N) scores -> (B, N) bool: the ``kept`` best visual tokens of each sample, the first of equal ones."""
    # below every score of a method, even the logarithm of 0
    worth = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~visual, -torch.inf)
    found = torch.zeros_like(visual)
    for count in sorted(set(kept)):
        samples = [sample for sample, own in enumerate(kept) if own == count]
        rows = worth if len(samples) == len(kept) else worth[samples]
        best = accepting(top_tokens, rows)(rows.contiguous(), count)
        found[samples] = torch.zeros_like(rows, dtype=torch.bool).scatter(1, best, True)
    return found
