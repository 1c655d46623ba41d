"""Oracle for reduction between layers: the full model, with visual tokens masked from some layers on.

It runs one sample at a time, without padding and without a cache: each generated token is a forward of the whole text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.reduce_models import WORD, Talk
from tests.helpers.tiny_models import IMAGE, VIDEO


@dataclass
class Masked:
    """One prompt of a full model, with a function for each cut layer that returns which visual tokens are kept.

    Attributes:
        dropped: layer -> the columns that it and all later layers do not see.
    """

    talk: Talk
    prompt: tuple[int, ...]
    cuts: Mapping[int, Callable[[int], int]]
    dropped: dict[int, set[int]] = field(default_factory=dict)
    near: float = 1.0  # smallest distance between the lowest score that is kept and the highest that is dropped

    def __post_init__(self) -> None:
        ids = self.talk.ids(*self.prompt)
        visual = [column for column, token in enumerate(ids) if token in (IMAGE, VIDEO)]
        left = list(visual)
        for layer, kept in self.cuts.items():
            row = self.row(layer - 1).tolist()
            ranked = sorted(left, key=lambda column: (-row[column], column))
            number = min(kept(len(visual)), len(left))
            if number < len(left):
                self.near = min(self.near, row[ranked[number - 1]] - row[ranked[number]]) if number else self.near
            left = sorted(ranked[:number])
            self.dropped[layer] = set(visual) - set(left)

    def row(self, layer: int) -> Tensor:
        """Return what each column is worth behind a layer: the attention that the last one pays to it."""
        return self._attention(layer)[-1]

    def inputs(self, tail: list[int]) -> dict[str, Tensor]:
        inputs = self.talk.batch(self.prompt)
        more = torch.tensor([tail], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self.talk.with_types(inputs)

    @torch.no_grad()
    def _attention(self, layer: int) -> Tensor:
        """Return the (L, L) attention of a layer, averaged over the heads, from a copy with eager attention."""
        model = copy.deepcopy(self.talk.model)
        model.set_attn_implementation("eager")
        with self.masked(model):
            return model(**self.inputs([]), output_attentions=True).attentions[layer][0].mean(0)

    @contextmanager
    def masked(self, model: Any) -> Iterator[None]:
        """Give each layer a mask of its own in the block."""
        is_eager = model.config.get_text_config()._attn_implementation == "eager"
        dtype = next(model.parameters()).dtype

        def change(number: int, _: nn.Module, args: tuple, kwargs: dict) -> tuple:
            dropped = next((d for layer, d in reversed(self.dropped.items()) if layer <= number), None)
            if dropped is None:
                return args, kwargs
            tokens, cache = args[0].shape[1], kwargs.get("past_key_values")
            total = tokens + (0 if cache is None else cache.get_seq_length(number))
            seen = torch.ones(total, total, dtype=torch.bool).tril()
            for column in dropped:
                seen[:, column] = False
                seen[column, column] = True  # a row without any visible column would be NaN
            mask: Any = seen[None, None, -tokens:].expand(len(args[0]), -1, -1, -1)
            if is_eager:
                mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        hooks = [
            layer.register_forward_pre_hook(lambda *a, n=number: change(n, *a), with_kwargs=True)
            for number, layer in enumerate(model.base_model.language_model.layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def logits(self, tail: list[int] | None = None) -> Tensor:
        """Return the (L, V) logits; a dropped column has those of the last column before it that is kept."""
        return self.differentiable(tail)

    def differentiable(self, tail: list[int] | None = None) -> Tensor:
        with self.masked(self.talk.model):
            found = self.talk.model(**self.inputs(tail or [])).logits[0]
        last = list(self.dropped.values())[-1]
        left, rows = 0, []
        for column in range(len(found)):
            left = left if column in last else column
            rows.append(left)
        return found[rows]

    def greedy(self, steps: int, tail: list[int] | None = None) -> tuple[list[int], Tensor]:
        """Return the next tokens and their logits."""
        words, logits = list(tail or []), []
        for _ in range(steps):
            logits.append(self.logits(words)[-1])
            words.append(WORD + int(logits[-1][WORD:].argmax()))
        return words[len(tail or []) :], torch.stack(logits)
