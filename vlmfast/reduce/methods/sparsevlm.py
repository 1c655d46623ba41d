"""SparseVLM: the words of the question that an image concerns say which of its tokens matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vlmfast.reduce.methods.layer_method import LayerMethod, check_layer
from vlmfast.reduce.methods.method import check_share

# of LLaVA-1.5's 576 tokens, behind each cut: about as many as the name says on average over the layers
PUBLISHED = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


@dataclass(frozen=True)
class SparseVLM(LayerMethod, name="sparsevlm"):
    """SparseVLM (ICML 2025): at several layers, fewer of the visual tokens, those that words of the question attend to.

    The words are those of the text (what follows the last image of a sample, or what ``text_mask`` of a call says) that
    get more than their share of a softmax over the text of the products of its embeddings with those of the visual
    tokens; where none does, all of them.

    Args:
        keep: how many visual tokens of each sample are left behind each cut, those of all its images together: for
            each an int, or a float as the share of those that it began with, rounded down; none more than before it.
            Or 192, 128, 96 or 64: what is published for LLaVA-1.5's 576 tokens, in three cuts.
        layers: the first layers that see fewer tokens, counted from 0; published, the layers 2, 6 and 15 choose.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither, or that does not descend, or layers that are no ints of
            at least 1, do not ascend, or are not as many as the numbers. ValueError: in a call, for a prompt without
            text.

    Source:
        SparseVLM; the numbers are those of SparseVLM+, which like this drops tokens and leaves positions as they are.
        Its correction of attention by distance and its choice of 14 heads are left out, and so is the first version's
        recycling of dropped tokens.
    """

    keep: Any  # int | float | Sequence[int | float]; a tuple once it is made, and so are layers
    layers: Any = (3, 7, 16)  # int | Sequence[int]
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        layers: Any = (self.layers,) if isinstance(self.layers, int) else self.layers  # a single cut
        if not isinstance(layers, (list, tuple)):
            raise TypeError(f"layers must be an int or a sequence of them, got {layers!r}")
        keep: Any = (self.keep,) if isinstance(self.keep, (int, float)) and len(layers) == 1 else self.keep
        if isinstance(keep, int) and keep in PUBLISHED:
            keep = PUBLISHED[keep]
        if not isinstance(keep, (list, tuple)):
            raise TypeError(
                f"keep must be one of {', '.join(map(str, PUBLISHED))}, or a number or share for each of layers, got "
                f"{keep!r}"
            )
        object.__setattr__(self, "keep", tuple(keep))
        object.__setattr__(self, "layers", tuple(layers))
        for layer in self.layers:
            check_layer("layers", layer)
        for value in self.keep:
            check_share("keep", value)
        if not self.layers or len(self.layers) != len(self.keep):
            raise ValueError(
                f"keep must have a number or share for each of at least one layers, got {len(self.keep)} and "
                f"{len(self.layers)}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend, got {self.layers}")
        kinds = [[value for value in self.keep if isinstance(value, kind)] for kind in (int, float)]
        if any(values != sorted(set(values), reverse=True) for values in kinds):
            raise ValueError(f"keep must descend, got {self.keep}")

    @property
    def cut_before(self) -> tuple[int, ...]:
        """Each of the layers."""
        return tuple(self.layers)

    def budget(self, cut: int, count: int) -> int:
        """Round down, but keep at least one unless none are asked for."""
        value = self.keep[cut]
        if isinstance(value, int):
            return min(value, count)
        return max(int(value * count), min(1, count) if value > 0 else 0)
