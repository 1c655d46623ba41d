"""FastV: after a few layers, half of the visual tokens get hardly any attention."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.reduce.methods.layer_method import LayerMethod, check_layer
from vlmfast.reduce.methods.method import check_share


@dataclass(frozen=True)
class FastV(LayerMethod, name="fastv"):
    """FastV (ECCV 2024): from a layer on, the visual tokens that the last token attends to most.

    Args:
        layer: the first layer that sees fewer tokens, counted from 0; the attention of the layer before it chooses.
        keep: how many visual tokens of each sample are kept, those of all its images together: an int, or a float as
            their share, rounded to the nearest number, half to even, as published: but at least one unless it is 0.0.

    Raises:
        TypeError or ValueError: for a ``layer`` that is no int of at least 1, or a ``keep`` that is neither.

    Source:
        FastV. It has the choice of the first sample of a batch for all; here each sample has its own, from the last
        token that is not padding.
    """

    layer: int
    keep: int | float

    def __post_init__(self) -> None:
        check_layer("layer", self.layer)
        check_share("keep", self.keep)

    @property
    def cut_before(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)

    def budget(self, cut: int, count: int) -> int:
        """Round half to even."""
        if isinstance(self.keep, int):
            return min(self.keep, count)
        return max(round(self.keep * count), min(1, count) if self.keep > 0 else 0)
