"""CDPruner: tokens that are relevant to the question and unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vlmfast.ops.greedy_selection import dpp_map
from vlmfast.reduce.methods.greedy_method import Call, GreedyMethod
from vlmfast.reduce.methods.relevance import scaled, unlikeness
from vlmfast.reduce.tokens import VisualTokens


@dataclass(frozen=True)
class CDPruner(GreedyMethod, name="cdpruner"):
    """CDPruner (NeurIPS 2025): tokens that are relevant to the question and unlike each other.

    A token is the more relevant the less it is like the mean of the text's embeddings, from 0 to 1 in each image; the
    choice is `vlmfast.dpp_map`, on the tokens that the language model gets. The text is what follows the last image of
    a sample, or what ``text_mask`` of a call says: another question chooses other tokens.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither. ValueError: in a call, for a prompt without text.

    Source:
        CDPruner, as its authors' rule is carried over to models without a CLIP for texts: embeddings of the language
        model in place of CLIP's, which gives other tokens on LLaVA-1.5. Relevance is scaled in each image, or crop; the
        published code scales it over a whole batch.
    """

    reads_text: ClassVar[bool] = True

    def call(self, tokens: VisualTokens) -> tuple[Any, Call]:
        """Return `dpp_map` on the features and their relevance for the text."""
        features = tokens.features()
        relevance = scaled(unlikeness(features, tokens.text().mean()[:, None])[..., 0])
        return dpp_map, {"features": features, "relevance": relevance}
