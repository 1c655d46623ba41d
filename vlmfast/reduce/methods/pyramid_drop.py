"""PyramidDrop: fewer visual tokens after each stage of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmfast.reduce.methods.layer_method import LayerMethod, check_layer


@dataclass(frozen=True)
class PyramidDrop(LayerMethod, name="pyramiddrop"):
    """PyramidDrop (CVPR 2025): at several layers, fewer of the visual tokens, those that the last token attends to.

    Args:
        layers: the first layers of the stages that see fewer tokens, counted from 0, such as (8, 16, 24).
        shares: the share of a sample's visual tokens that each of these stages has, such as (0.5, 0.25, 0.125): of
            those that it began with, rounded down as published, but at least one unless it is 0.0.

    Raises:
        TypeError: for layers that are no ints, or shares that are no floats. ValueError: for a layer below 1, a share
            beyond 0.0 to 1.0, sequences that differ in length or are empty, layers that do not ascend, or shares that
            do not descend.

    Source:
        PyramidDrop. Published, the scores are those that the next layer would give, at positions that are numbered
        anew; here they are the attention in the layer before the cut, as it ran, and tokens keep their positions.
    """

    layers: Sequence[int]
    shares: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("layers", "shares"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                value = (value,)  # a single cut
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise TypeError(f"{name} must be a sequence, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        layers, shares = self.layers, self.shares
        for layer in layers:
            check_layer("layers", layer)
        for share in shares:
            if not isinstance(share, float):
                raise TypeError(f"shares must be floats, got {share!r}")
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"shares must be within 0.0 and 1.0, got {share}")
        if not layers or len(layers) != len(shares):
            raise ValueError(
                f"layers and shares must be as many, and at least one, got {len(layers)} and {len(shares)}"
            )
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must ascend, got {layers}")
        if list(shares) != sorted(set(shares), reverse=True):
            raise ValueError(f"shares must descend, got {shares}")

    @property
    def cut_before(self) -> tuple[int, ...]:
        """The layers."""
        return tuple(self.layers)

    def budget(self, cut: int, count: int) -> int:
        """Round down."""
        share = self.shares[cut]
        return max(int(share * count), min(1, count) if share > 0 else 0)
