"""M-RoPE positions of kept tokens: those that they have in the full prompt, which depend on the picture.

Which tokens are kept is known only once the image is encoded, so their places travel with the embeddings, as additional
channels. All else about positions depends on the image's size alone: `get_mrope_input_positions` gives text its final
positions, and each token of an image, a video, or a frame that text stands before, the position of its first token.
`embed_input_ids` removes the channels, and `forward` adds them to the positions. So cached prefixes, chunks that end
within images, preempted requests and both of vLLM's runners work without special code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.utils import copy_mm_embedding_modality

BASE = 256  # bfloat16 is exact for integers up to this one: a number is two digits, a channel each
MOST = BASE**2 - 1  # the largest number that they write
CHANNELS = 6


def with_places(rows: Tensor, places: Tensor) -> Tensor:
    """(n, D) rows and (n, 3) times, rows and columns in the grid -> (n, D + CHANNELS)."""
    digits = torch.stack([places // BASE, places % BASE], -1).flatten(1)
    return torch.cat([rows, digits.to(rows)], 1)


def places_of(rows: Tensor) -> Tensor:
    """(n, D + CHANNELS) -> (n, 3) int64, the places given to `with_places`."""
    digits = rows[:, -CHANNELS:].round().long().view(len(rows), 3, 2)
    return digits[..., 0] * BASE + digits[..., 1]


def full_tokens(feature: Any, side: int) -> int:
    """Return the number of tokens of an image or a video in the full prompt: all of its grid."""
    return int(feature.data[f"{feature.modality}_grid_thw"].data.prod()) // side**2


class PlacedTokens:
    """Mixin for vLLM's models with M-RoPE."""

    config: Any
    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._make_buffers(vllm_config.scheduler_config.max_num_batched_tokens, None)
        # in the longest prompts, an image with fewer tokens than rows could exceed the table of angles
        modules = self.language_model.modules()
        tables = [module.cos_sin_cache for module in modules if hasattr(module, "cos_sin_cache")]
        self._last_position: int = min(len(table) for table in tables) - 1

    def _make_buffers(self, tokens: int, device: torch.device | None) -> None:
        """Make the buffers of the added places and of the sums, at addresses that stay, as CUDA graphs need."""
        self._offsets = torch.zeros(3, tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros(3, tokens, dtype=torch.int64, device=device)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return the positions of the full prompt for the tokens that are left; in images, that of the first.

        A video is several runs of placeholders where text stands between its frames.
        """
        side = self.config.vision_config.spatial_merge_size
        tokens: list[int] = []
        columns: list[int] = []
        features, done = [], 0

        def copy(end: int) -> None:
            columns.extend(range(len(tokens), len(tokens) + end - done))
            tokens.extend(input_tokens[done:end])

        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            copy(place.offset)
            start, done = len(tokens), place.offset
            runs = place.extract_embeds_range()
            for first, last in runs:
                copy(first)
                columns += [len(tokens)] * (last + 1 - first)
                tokens += [input_tokens[first]] * (full_tokens(feature, side) // len(runs))
                done = last + 1
            end = place.offset + place.length
            copy(end)
            done = end
            whole = replace(place, offset=start, length=len(tokens) - start, is_embed=None)
            features.append(replace(feature, mm_position=whole))
        copy(len(input_tokens))
        positions, delta = super().get_mrope_input_positions(tokens, features)  # type: ignore[misc]
        return positions[:, columns], delta + len(tokens) - len(input_tokens)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Store the places of the tokens for `forward`, and embed the tokens without them."""
        if multimodal_embeddings is not None and len(multimodal_embeddings) and is_multimodal is not None:
            multimodal_embeddings = self._take_places(input_ids, multimodal_embeddings, is_multimodal)
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def _take_places(self, input_ids: Tensor, embeddings: Sequence[Tensor], is_multimodal: Tensor) -> list[Tensor]:
        count = len(input_ids)
        self._reserve(count, input_ids.device)
        mask = is_multimodal.to(input_ids.device, non_blocking=True)
        places = torch.cat([places_of(rows) for rows in embeddings])
        self._offsets[:, :count] = places.new_zeros(count, 3).masked_scatter(mask[:, None], places).T
        return [copy_mm_embedding_modality(rows, rows[:, :-CHANNELS]) for rows in embeddings]

    def _reserve(self, tokens: int, device: torch.device) -> None:
        if self._offsets.device != device or self._offsets.shape[1] < tokens:
            self._make_buffers(max(tokens, self._offsets.shape[1]), device)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the language model at the final positions, and clear the places, also when a CUDA graph runs this."""
        count = positions.shape[-1]
        self._reserve(count, positions.device)
        offsets, final = self._offsets[:, :count], self._positions[:, :count]
        torch.add(positions, offsets, out=final).clamp_(max=self._last_position)
        offsets.zero_()
        return super().forward(input_ids, final, *args, **kwargs)  # type: ignore[misc]
