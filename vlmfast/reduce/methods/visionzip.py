"""VisionZip: attention keeps, similarity merges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlmfast import checks
from vlmfast.ops.token_merge.definition import MERGES
from vlmfast.reduce.methods.method import Method, check_share, share
from vlmfast.reduce.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class VisionZip(Method, name="visionzip"):
    """VisionZip (CVPR 2025): the tokens with the most attention are kept, the others merged by similarity.

    Args:
        dominant: how many tokens are kept for each image, or for each crop where a model cuts images into crops: an
            int, or a float as the share of its visual tokens, those that the model shows of a crop. A CLS token is
            kept and counts as one, as published.
        contextual: how many tokens the others are merged into, as an int or a share.
        merge: "reference", as published, or "mean"; see `vlmfast.merge_tokens`.
        packing: how the tokens of LLaVA-NeXT's crops are arranged: "published", without row ends, or "model", in the
            model's own packing, with its row ends and without its padding, cut by position. That has no place for a
            CLS token, and padding that was chosen is left out. Or "whole", for LLaVA-OneVision too: the image is packed
            by the model and then reduced as one, so that its size alone tells how many tokens are left.

    Raises:
        TypeError or ValueError: for an argument that is none of these.

    Source:
        VisionZip, and its port to Qwen2.5-VL.
    """

    dominant: int | float
    contextual: int | float
    merge: str = "reference"
    packing: str = "published"
    keeps_cls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("dominant", self.dominant)
        check_share("contextual", self.contextual)
        shares = [value for value in (self.dominant, self.contextual) if isinstance(value, float)]
        if sum(shares) > 1 + 1e-9:
            raise ValueError(f"dominant and contextual must be shares of at most 1.0 together, got {shares}")
        checks.one_of("merge", self.merge, MERGES)
        checks.one_of("packing", self.packing, ("published", "model", "whole"))

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Count the CLS token as one of the dominant ones."""
        dominant = share(self.dominant, count, crops, least=1)
        contextual = share(self.contextual, count, crops)
        if not has_cls or not count:
            return dominant, contextual
        if not dominant:
            raise ValueError(
                f"dominant must be at least 1 of {count} visual tokens where the tower has a CLS token, which counts "
                f"as one, got {self.dominant}"
            )
        return dominant - 1, contextual

    def select(self, tokens: VisualTokens) -> Selection:
        """Merge as `merge` says."""
        return replace(super().select(tokens), merge=self.merge)
