"""The text of a prompt that asks about its images: its columns, and its embeddings for a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MASK = "text_mask"  # the argument of a call that gives the columns instead


@dataclass(frozen=True)
class Text:
    """The text that goes with each of B images.

    Attributes:
        embeddings: (B, L, D), the input embeddings, without a gradient; L is the length of the longest text.
        mask: (B, L) bool, false at padding.
    """

    embeddings: Tensor
    mask: Tensor

    def __getitem__(self, images: Any) -> Text:
        """Return the text of some images."""
        return Text(self.embeddings[images], self.mask[images])

    def repeat(self, times: int) -> Text:
        """Return it with each text repeated, for crops or frames."""
        return Text(self.embeddings.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0))

    def mean(self) -> Tensor:
        """(B, D) float32, of a float64 model float64: the mean of the embeddings of each text."""
        kept, wide = self.mask[..., None], torch.promote_types(self.embeddings.dtype, torch.float32)
        return self.embeddings.to(wide).masked_fill(~kept, 0.0).sum(1) / kept.sum(1)


Texts = Callable[
    [Sequence[int]], Callable[[], Text]
]  # placeholders of each image -> a function that returns their text


def unknown() -> Text:
    """Raise, because these tokens were made without a prompt."""
    raise ValueError(
        "the text of the prompt is not known here: a method that chooses by it needs a model of transformers and "
        "vlmfast.patch(model, reduce=...) or vlmfast.compress_inputs"
    )


def unknown_texts(totals: Sequence[int]) -> Callable[[], Text]:
    """Return the function that raises."""
    return unknown


def text_columns(ids: Tensor, mask: Tensor, visual: Tensor, special: Iterable[int], given: Tensor | None) -> Tensor:
    """(B, L) bool: the columns of the text that asks about the images of each sample.

    That is everything behind the last image or video, without padding and tokens that the configuration names, such as
    those that begin and end a text; or what the caller gives.

    Args:
        ids: (B, L) of the prompt.
        mask: (B, L), false at padding.
        visual: (B, L) bool, true at the placeholders of images and videos.
        special: ids that are not text.
        given: (B, L), the caller's mask, or None.
    """
    if given is not None:
        return given.to(ids.device, torch.bool) & ~visual
    behind = visual.flip(1).cumsum(1).flip(1) == 0
    return behind & mask.bool() & ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device))


def special_ids(model: Any) -> set[int]:
    """Return the ids that a model's configurations name: every ``*_token_id``."""
    configs = model.config, model.config.get_text_config(), getattr(model, "generation_config", None)
    found: set[int] = set()
    for config in configs:
        values: Mapping[str, Any] = {} if config is None else config.to_dict()
        for name, value in values.items():
            if name.endswith("_token_id"):
                found.update(number for number in (value if isinstance(value, list) else [value]) if number is not None)
    return found


def check_lengths(lengths: Sequence[int], samples: Iterable[int]) -> None:
    """Raise unless these samples have text.

    Raises:
        ValueError: if one has none.
    """
    for sample in samples:
        if not lengths[sample]:
            raise ValueError(
                f"the method chooses by the text of a prompt, and sample {sample} has none behind its last image: put "
                f"the question there, or give {MASK}=, true at the columns of the text"
            )


@torch.no_grad()  # type: ignore[untyped-decorator]
def texts_of(embed: Any, ids: Tensor, columns: Tensor, samples: Sequence[int]) -> Text:
    """Look up the text of each image, given the sample that it belongs to.

    Raises:
        ValueError: where a sample has none.
    """
    lengths: list[int] = columns.sum(1).tolist()
    check_lengths(lengths, samples)
    longest = max(lengths[sample] for sample in samples)
    index = columns.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    mask = columns.gather(1, index)
    rows: Tensor = embed(ids.gather(1, index).masked_fill(~mask, 0))
    own = torch.tensor(list(samples), device=rows.device)
    return Text(rows[own], mask.to(rows.device)[own])
